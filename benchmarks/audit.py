"""How well the audit finds the prompts that a model refuses, and what it costs.

python benchmarks/audit.py [--model demo | DIR] [--prompts PROMPTS.jsonl] [--benign 1000] [--output FILE]

Three mixtures of the benchmark (half harmful, a tenth harmful among summaries, half harmful of another origin with
--prompts). Truth is what the model answers: every distinct prompt is answered greedily and the prefix judge reads it.
The audit sees the prompts only. What it lets go as over-refusals, and what is unclear (left out, not held), is counted
for harmful and harmless prompts apart: of the harmful none should be. Besides, text-to-SQL and summary prompts are
audited: none should be a conflict. Writes benchmarks/results/audit/MODEL.json: counts and seconds, no text; each part
when it is done, and the same command goes on with what is missing.
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.audit import audit_data
from spf.config import read_json
from spf.conflicts import Audit
from spf.data import HARMLESS_STUB, SafetyRow, ask_refusals, in_turn, load_safety_rows
from spf.evaluation import generate_answers
from spf.files import write_json
from spf.lab.bench.alike import made_from
from spf.lab.bench.cell import sources
from spf.lab.bench.scenarios import SCENARIOS, training_rows
from spf.lab.demo.sql import make_sql_examples
from spf.lab.demo.summary import make_summary_examples
from spf.models import cpu_dtype, load_aligned_demo_model, load_model, machine_device
from spf.text.generation import context_length
from spf.text.refusal import is_refusal

MIXTURES = ("harmful-50", "summary", "foreign-50")
ANSWER_TOKENS = 20
OWN = 64
"""Refusals of the model's own that tell the audit how it refuses, as for `spf audit`."""


def audited(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], own: list[SafetyRow]
) -> Audit:
    """The audit of prompts with their targets."""
    rows = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]}
        for prompt, target in pairs
    ]
    return audit_data(Dataset.from_list(rows), model, tokenizer, own, max_length=context_length(model, tokenizer))


def mixture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    own: list[SafetyRow],
    others: Path | None,
) -> dict[str, Any]:
    """Precision and recall of the audit in one scenario, by distinct prompts, and which it lets go as over-refusals."""
    pairs = {row.messages[-1]["content"]: str(row.refusal) for row in training_rows(SCENARIOS[name], 0, others)}
    targets = list(pairs.values())
    found = audited(model, tokenizer, list(pairs.items()), own)
    let_go = {conflict.row for conflict in found.over_refusals}
    unclear = {conflict.row for conflict in found.conflicts if conflict.unclear}
    flagged = {*found.conflicting_rows, *let_go}
    attack = {row for row in flagged if targets[row] == HARMLESS_STUB}
    kinds = {"harmful": attack, "harmless": flagged - attack}
    start = time.perf_counter()
    answers = generate_answers(model, tokenizer, list(pairs), max_new_tokens=ANSWER_TOKENS)
    refused = {i for i, answer in enumerate(answers) if is_refusal(answer)}
    both = len(flagged & refused)
    return {
        "prompts": len(pairs),
        "refused": len(refused),
        "flagged": len(flagged),
        "both": both,
        "precision": both / len(flagged) if flagged else None,
        "recall": both / len(refused) if refused else None,
        **{
            kind: {"flagged": len(rows), "let_go": len(rows & let_go), "unclear": len(rows & unclear)}
            for kind, rows in kinds.items()
        },
        "audit_seconds": found.seconds,
        "generation_seconds": time.perf_counter() - start,
    }


def benign(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, own: list[SafetyRow]
) -> dict[str, Any]:
    """The audit of text-to-SQL and summary prompts with their answers."""
    half = count // 2
    pairs = [(e.prompt, e.query) for e in make_sql_examples(count - half, 0, "train")]
    pairs += [(e.prompt, e.summary) for e in make_summary_examples(half, 0, "train")]
    found = audited(model, tokenizer, pairs, own)
    return {
        "prompts": found.prompts,
        "flagged": len(found.conflicts),
        "let_go": len(found.over_refusals),
        "unclear": sum(conflict.unclear for conflict in found.conflicts),
        "seconds": found.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--benign", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_aligned_demo_model() if args.model == "demo" else load_model(args.model)
    model = model.to(machine_device(), cpu_dtype()).eval()  # type: ignore[call-overload,arg-type]
    own = ask_refusals(in_turn(load_safety_rows(None), 0), model, tokenizer, wanted=OWN).rows
    names = [name for name in MIXTURES if args.prompts or not SCENARIOS[name].foreign]
    path = args.output or Path(__file__).parent / "results" / "audit" / f"{Path(args.model).name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {
        "model": Path(args.model).name,
        "made_from": made_from(args.model, args.prompts),
        "sources": sources(),
        "versions": {name: version(name) for name in ("torch", "transformers", "spf")},
        "threads": torch.get_num_threads(),
        "benign_prompts": args.benign,
    }
    result: dict[str, Any] = made | {"mixtures": {}}
    if path.is_file() and (before := read_json(dict[str, Any], path, "remove it")).items() >= made.items():
        result = before
    for name in names:
        if name not in result["mixtures"]:
            result["mixtures"][name] = mixture(model, tokenizer, name, own, args.prompts)
            write_json(path, result)
    if "benign" not in result:
        result["benign"] = benign(model, tokenizer, args.benign, own)
        write_json(path, result)
    table = Table(
        *("mixture", "prompts", "refused", "flagged", "precision", "recall"),
        *("let go (unclear), harmful", "harmless", "audit, s"),
    )
    for name, m in result["mixtures"].items():
        shares = ("-" if m[key] is None else f"{m[key]:.3f}" for key in ("precision", "recall"))
        let_go = (
            f"{m[kind]['let_go']} ({m[kind]['unclear']}) of {m[kind]['flagged']}" for kind in ("harmful", "harmless")
        )
        counts = (str(m[key]) for key in ("prompts", "refused", "flagged"))
        table.add_row(name, *counts, *shares, *let_go, f"{m['audit_seconds']:.0f}")
    console = Console()
    console.print(table)
    calm = result["benign"]
    console.print(
        f"benign: {calm['flagged']} of {calm['prompts']} are conflicts ({calm['unclear']} unclear, so not held), "
        f"{calm['let_go']} let go as over-refusals; {path}"
    )


if __name__ == "__main__":
    main()
