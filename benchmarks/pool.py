"""What asking the pool costs (constraint generation): 32 held prompts every five steps, beside steps of 8 x 512 tokens.

python benchmarks/pool.py [--model demo | DIR] [--rounds 3] [--output FILE]

In alternation in one process: a step of plain LoRA fine-tuning (forward, backward, AdamW), one look at the pool (every
prompt's first answer token), and one round of growth for 8 prompts (their inputs through the model). Writes the seconds
and the share of a step that a look costs to benchmarks/results/pool/MODEL.json.
"""

import argparse
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from spf import NullSpace, SafetyProbe, attach
from spf.data import SafetyRow, packaged_prompts, tokenise
from spf.files import write_json
from spf.models import cpu_dtype, load_aligned_demo_model, load_model, machine_device
from spf.rules.growth import AT_ONCE, EVERY
from spf.text.generation import context_length, pad_id

REFUSAL = "I'm sorry, but I can't help with that."


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes, on a GPU too."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    base, tokenizer = load_aligned_demo_model() if args.model == "demo" else load_model(args.model)
    base = base.to(machine_device(), cpu_dtype())  # type: ignore[call-overload,arg-type]
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    rows = [
        SafetyRow([{"role": "user", "content": prompt}], REFUSAL, f"row {i}")
        for i, prompt in enumerate(packaged_prompts("harmful_anchors")[: AT_ONCE + 8])
    ]
    anchors = tokenise(rows, tokenizer, context_length(base, tokenizer))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    probe = SafetyProbe(model, anchors, pad_token_id=pad_id(tokenizer))
    attachment = attach(probe, optimizer, NullSpace(rank=64, reserve=64), tighten=True)
    ids = torch.randint(5, 1000, (8, 512), device=model.device)

    def step() -> None:
        attachment.stepping.expect()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    prompts = [anchor.prompt_ids for anchor in anchors[:AT_ONCE]]
    reserves = attachment.subspace.reserve
    times: dict[str, list[float]] = {"step": [], "look": [], "growth": []}
    for _ in range(args.rounds):
        times["step"].append(seconds(step))
        times["look"].append(seconds(lambda: probe.first_answer_tokens(prompts)))
        times["growth"].append(seconds(lambda: probe.input_moments(anchors[:8], reserves, 8.0)))
    middle = {name: median(values) for name, values in times.items()}
    result = {
        "model": Path(args.model).name,
        "versions": {name: version(name) for name in ("torch", "transformers", "spf")},
        "threads": torch.get_num_threads(),
        "seconds": times,
        "share_of_a_step": middle["look"] / EVERY / middle["step"],
    }
    path = args.output or Path(__file__).parent / "results" / "pool" / f"{result['model']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"{result['share_of_a_step']:.1%} of a step for looks at the pool, every {EVERY} steps; {path}")


if __name__ == "__main__":
    main()
