"""A workspace for cells of the benchmark.

Not in conftest.py: every worker process would import spf.lab.bench for it.
"""

import json
from pathlib import Path

from spf.data import packaged_prompts
from spf.lab.bench.methods import Workspace
from tests.conftest import PLAIN_TEMPLATE, REFUSAL, make_model, make_tokenizer


def make_bench_workspace(place: Path) -> Workspace:
    """What `spf bench` would have prepared: a tiny aligned model, one before alignment, and refusals."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}" + PLAIN_TEMPLATE
    for name, seed in (("aligned", 0), ("unaligned", 1)):
        make_model(seed=seed).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    rows = [{"prompt": prompt, "refusal": REFUSAL} for prompt in packaged_prompts("harmful_anchors")[:18]]
    (place / "refusals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Workspace(place / "aligned", place / "unaligned", place / "refusals.jsonl")
