"""Keep anything: what the model answers to any prompts (style, a language, knowledge) is held as refusals are."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.data import Anchor, SafetyDataError, ask_refusals, check_source, in_turn, load_safety_rows, tokenise
from spf.rules import Rule
from spf.sharding import object_of_rank_0

MOST = 256
"""So many prompts are held at most: the directions of a matrix are shared with the refusals."""

ANSWER = 64
"""Tokens of an answer that is the model's own."""


class Keep:
    """Further samples for the rule to hold.

    Raises:
        ValueError: the rule holds nothing.
    """

    def __init__(self, source: str | Path | Dataset | None, rule: Rule, seed: int, options: Mapping[str, Any] | None):
        """source: the data, None for none. seed: of their order. options: variables of the chat template.

        Raises:
            TypeError, SafetyDataError: the data are of another kind, or there is a mistake in the file.
            ValueError: the rule holds nothing.
        """
        check_source("keep", source)
        if source is not None and not rule.holds:
            raise ValueError(f"keep: the rule {rule.name} does not hold answers; null-space does")
        self.source, self.seed, self.options = source, seed, options
        self._prompts: str | None = None
        self.lines: list[str] = []

    def samples(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limit: int,
        saved: Mapping[str, Any] | None,
    ) -> list[Anchor]:
        """Prompts with their answers, the model's own where the data have none, tokenised.

        saved: the state in the checkpoint that the run goes on from, whose bases hold the samples already: then none.

        Raises:
            SafetyDataError: data that cannot be used, or an answer that is too long.
            ValueError: the checkpoint was made with other prompts.
        """
        rows = load_safety_rows(self.source) if self.source is not None else []
        asked = json.dumps([[row.messages, row.refusal] for row in rows], sort_keys=True)
        prompts = hashlib.sha256(asked.encode("utf-8")).hexdigest()[:24] if rows else None
        if saved is not None and saved["kept"]["prompts"] != prompts:
            raise ValueError("the checkpoint was made with other prompts in `keep`; give the same, or start a new run")
        self._prompts = prompts
        chosen = in_turn(rows, self.seed)[:MOST]
        own = sum(row.refusal is None for row in chosen)
        held = f"keep: {len(chosen)} of {len(rows)} prompts held with their answers, {own} the model's own"
        self.lines = [held] if chosen else []
        if saved is not None or not chosen:
            return []
        found = ask_refusals(
            chosen,
            model,
            tokenizer,
            max_new_tokens=ANSWER,
            options=self.options,
            accept=lambda answer: True,
            what="answers to keep",
        )
        return tokenise(object_of_rank_0(found.rows), tokenizer, limit, self.options)

    def refuse_unheld(self, held: str | None) -> None:
        """held: the hash of the prompts that an earlier run's directions were taken from, which this one goes on with.

        Raises:
            SafetyDataError: they are others.
        """
        if self._prompts is not None and self._prompts != held:
            raise SafetyDataError(
                "keep: the adapter is held already, to the directions of an earlier run, and these prompts were not "
                "among what those were taken from, so their answers would not be held; give the same prompts, or put a "
                "fresh adapter above it (spf.going_on.add_adapter)"
            )

    @property
    def entry(self) -> dict[str, Any]:
        """What a checkpoint holds of it: no text."""
        return {"prompts": self._prompts}
