"""What the audit costs: its seconds beside those of three epochs of plain LoRA fine-tuning on the same rows.

python benchmarks/audit_cost.py [--model demo | DIR] [--prompts PROMPTS.jsonl] [--rounds 3] [--output FILE]

Of each mixture of the benchmark's (benign, half harmful, a tenth harmful among summaries; half harmful of another
origin with --prompts), in alternation in one process: the whole audit, with nothing known from before, and some
optimizer steps of 8 rows (forward, backward, AdamW; r = 8). Writes the seconds and the audit's share of three epochs,
of the medians, to benchmarks/results/audit_cost/MODEL.json; each mixture when it is done.
"""

import argparse
import random
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track

from spf.audit import audit_data
from spf.data import SafetyRow, ask_refusals, in_turn, load_safety_rows, tokenise
from spf.files import write_json
from spf.lab.bench.alike import made_from
from spf.lab.bench.cell import sources
from spf.lab.bench.scenarios import SCENARIOS, training_rows
from spf.lab.trainer import collate_answers
from spf.models import cpu_dtype, load_aligned_demo_model, load_model, machine_device
from spf.text.generation import context_length, pad_id

MIXTURES = ("benign", "harmful-50", "summary", "foreign-50")
OWN = 64
"""Refusals of the model's own that tell the audit how it refuses, as for `spf audit`."""

BATCH, STEPS, EPOCHS = 8, 4, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    base, tokenizer = load_aligned_demo_model() if args.model == "demo" else load_model(args.model)
    base = base.to(machine_device(), cpu_dtype()).eval()  # type: ignore[call-overload,arg-type]
    own = ask_refusals(in_turn(load_safety_rows(None), 0), base, tokenizer, wanted=OWN).rows
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    length, pad = context_length(base, tokenizer), pad_id(tokenizer)
    path = args.output or Path(__file__).parent / "results" / "audit_cost" / f"{Path(args.model).name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "model": Path(args.model).name,
        "made_from": made_from(args.model, args.prompts),
        "sources": sources(),
        "versions": {name: version(name) for name in ("torch", "transformers", "spf")},
        "threads": torch.get_num_threads(),
        "mixtures": {},
    }
    console = Console()

    def steps(examples: list[dict[str, list[int]]], numbers: random.Random) -> list[float]:
        """Seconds of some optimizer steps."""
        seconds = []
        model.train()
        for _ in range(STEPS):
            batch = collate_answers(numbers.sample(examples, BATCH), pad)
            start = time.perf_counter()
            model(**{key: value.to(model.device) for key, value in batch.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            _wait()
            seconds.append(time.perf_counter() - start)
        model.eval()
        return seconds

    for name in MIXTURES:
        if SCENARIOS[name].foreign and not args.prompts:
            continue
        rows: list[SafetyRow] = training_rows(SCENARIOS[name], 0, args.prompts)
        data = Dataset.from_list(
            [{"messages": [*row.messages, {"role": "assistant", "content": row.refusal}]} for row in rows]
        )
        examples = [
            {"prompt_ids": a.prompt_ids, "answer_ids": a.refusal_ids} for a in tokenise(rows, tokenizer, length)
        ]
        audits, all_steps, numbers = [], [], random.Random(0)
        for _ in track(range(args.rounds), name, console=console):
            start = time.perf_counter()
            found = audit_data(data, model, tokenizer, own, max_length=length, progress=False)
            _wait()
            audits.append(time.perf_counter() - start)
            all_steps.append(steps(examples, numbers))
        step = median(second for some in all_steps for second in some)
        result["mixtures"][name] = {
            "rows": len(rows),
            "prompts": found.prompts,
            "refused": found.refused,
            "let_go": len(found.over_refusals),
            "audit_seconds": audits,
            "step_seconds": all_steps,
            "share_of_three_epochs": median(audits) / (EPOCHS * len(rows) / BATCH * step),
        }
        write_json(path, result)
        console.print(f"{name}: {result['mixtures'][name]['share_of_three_epochs']:.1%} of {EPOCHS} epochs; {path}")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
