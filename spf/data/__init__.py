"""Safety data: load, validate, complete with the model's own refusals, tokenise, rotate anchors."""

from spf.data.anchors import (
    WORDINGS,
    Anchor,
    AnchorBatch,
    AnchorRotation,
    collate,
    prompt_tokens,
    reword,
    reworded_anchors,
    tokenise,
    tokenise_fitting,
    unused_tokens,
)
from spf.data.chat import render
from spf.data.refusals import Completed, ask_refusals, complete_refusals, read_as_refusals
from spf.data.rows import (
    ENOUGH,
    PACKAGED,
    SafetyRow,
    benign_rows,
    check_source,
    in_turn,
    is_local,
    load_safety_rows,
    packaged_prompts,
    packaged_rows,
    read_csv,
    read_jsonl,
)
from spf.errors import SafetyDataError
from spf.text.refusal import HARMLESS_STUB

__all__ = [
    "ENOUGH",
    "HARMLESS_STUB",
    "PACKAGED",
    "WORDINGS",
    "Anchor",
    "AnchorBatch",
    "AnchorRotation",
    "Completed",
    "SafetyDataError",
    "SafetyRow",
    "ask_refusals",
    "benign_rows",
    "check_source",
    "collate",
    "complete_refusals",
    "in_turn",
    "is_local",
    "load_safety_rows",
    "packaged_prompts",
    "packaged_rows",
    "prompt_tokens",
    "read_as_refusals",
    "read_csv",
    "read_jsonl",
    "render",
    "reword",
    "reworded_anchors",
    "tokenise",
    "tokenise_fitting",
    "unused_tokens",
]
