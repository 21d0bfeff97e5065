"""Trains on the CPU and on a simulated GPU, and writes what came out: python -m tests.device.worker OUTPUT.json"""

import functools
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._pytree import tree_map
from transformers import TrainingArguments

from spf import SPF, NullSpace, SafetyOptimizer, SafetyProbe
from spf.data import SafetyRow, packaged_prompts, tokenise
from spf.lab.bench import cell as cells
from spf.lab.bench.cell import Cell
from spf.lab.bench.methods import Workspace
from spf.lab.bench.scenarios import Scenario
from spf.rules import Aggregate, Constrained, DualAscent, Mix, Rank1, Rule, SafeGrad
from tests.conftest import REFUSAL, make_model, make_tokenizer
from tests.device.simulated import SimulatedDevice, SimulatedTensor, register
from tests.lab.bench_workspace import make_bench_workspace

CPU = torch.device("cpu")
RULES: dict[str, Rule] = {
    "null-space": NullSpace(rank=8),
    "null-space, contrast": NullSpace(rank=8, contrast=2),
    "null-space, feedback": NullSpace(rank=8, feedback=DualAscent(rate=50.0, margin=0.0)),
    "spf": SPF(rank=2),
    "spf right": SPF(rank=2, side="right", gate="matrix"),
    "spf both": SPF(rank=2, side="both"),
    "rank1": Rank1(),
    "mix": Mix(),
    "safegrad": SafeGrad(),
    "aggregate": Aggregate(),
    "constrained": Constrained(margin=0.0),
}
FEW = 4
"""Tokens of an answer in a cell: the first, and some with a cache. Every operation there goes through Python."""
METHODS = ["null-space", "kl", "constrained-sft", "lisa", "one-shot", "resta", "null-space-post", "safetylock"]


def spread(model: Any) -> None:
    """The second half of a model on another device, as `device_map="auto"` does it; here the CPU is the second."""

    def move(module: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda x: x.to("cpu") if isinstance(x, torch.Tensor) else x, (args, kwargs))

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    for module in (inner.model.layers[1], inner.model.norm, inner.lm_head):
        module.to("cpu").register_forward_pre_hook(move, with_kwargs=True)


def trained(
    rule: Rule, lora: bool, device: torch.device, moved_late: bool = False, two: bool = False
) -> dict[str, torch.Tensor]:
    """Parameters after three steps.

    moved_late: to the device after the optimizer was made, as a Trainer moves it. two: half on a second device.
    """
    tokenizer = make_tokenizer()

    def anchors(name: str, count: int, answer: str) -> Any:
        prompts = packaged_prompts(name)[:count]
        rows = [SafetyRow([{"role": "user", "content": p}], answer, f"{name} {i}") for i, p in enumerate(prompts)]
        return tokenise(rows, tokenizer, 256)

    model: Any = make_model()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    if not moved_late:
        model.to(device)
    if two:
        spread(model)
    optimizer = SafetyOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        SafetyProbe(model, anchors("harmful_anchors", 20, REFUSAL), pad_token_id=1),
        rule,
        calibration=anchors("benign_anchors", 8, "Sure."),
        monitor_steps=1,
    )
    if moved_late:
        model.to(device)
    for step in range(3):
        ids = torch.randint(5, 600, (4, 16), generator=torch.Generator().manual_seed(step)).to(device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.attachment.metrics()
    optimizer.finish()
    return {
        name: p.detach().raw if isinstance(p, SimulatedTensor) else p.detach().clone()
        for name, p in model.named_parameters()
    }


def planted_fault(device: torch.device) -> None:
    """A basis that stays on the CPU: the pretended device has to notice, or it proves nothing."""
    from spf.rules.constraint import Constraint

    follow = Constraint.follow
    Constraint.follow = lambda self: None  # type: ignore[method-assign]
    try:
        trained(NullSpace(rank=8), False, device, moved_late=True)
    finally:
        Constraint.follow = follow  # type: ignore[method-assign]


def benchmark_cell(method: str, tuning: Any, workspace: Workspace) -> dict[str, Any]:
    """A cell of the benchmark, from loading the model to its figures, through the Trainer."""
    rule = {"rank": 4} if method.startswith("null-space") else {"k": 4} if method == "safetylock" else {}
    cell = Cell("harmful-50", method, model="tiny", tuning=tuning, batch_size=4, rule=rule)
    result = cells.run_cell(cell, workspace)
    return {"steps": result["steps"], "counts": result["counts"]}


def prepare(directory: Path, device: torch.device) -> Workspace:
    """A tiny workspace, and what the benchmark asks about the machine answered with the pretended device."""
    workspace = make_bench_workspace(directory)
    cells.SCENARIOS["harmful-50"] = Scenario("tiny", "sql", 8, 1, 0.5)
    measured_task, answers = cells.measure_task, cells._answers
    cells.measure_task = lambda *given: measured_task(*given, count=4)
    cells._answers = lambda model, tokenizer, prompts, tokens: answers(model, tokenizer, prompts, FEW)
    cells.ANSWER_TOKENS = FEW
    cells.packaged_prompts = lambda name: packaged_prompts(name)[:6]
    cells.cpu_dtype = lambda: torch.float32  # the pretended device has no autocast
    cells.machine_device = lambda: device
    # a process whose first model is loaded under a dispatch mode gets rotary frequencies that nobody set
    cells.AutoModelForCausalLM.from_pretrained(workspace.aligned)
    trainer_device = TrainingArguments.device.fget

    def pretended(self: TrainingArguments) -> torch.device:
        trainer_device(self)
        PartialState._shared_state["device"] = device
        return device

    TrainingArguments.device = property(pretended)
    return workspace


def main() -> None:
    device = register()
    results: dict[str, Any] = {}

    def note(name: str, run: Callable[[], Any]) -> None:
        try:
            results[name] = run()
        except Exception as error:
            at = [frame for frame in traceback.extract_tb(error.__traceback__) if "/spf/" in frame.filename]
            where = f" ({Path(at[-1].filename).name}, {at[-1].name})" if at else ""
            results[name] = f"{type(error).__name__}: {str(error)[:300]}{where}"

    @functools.cache
    def on_the_cpu(name: str, lora: bool) -> dict[str, torch.Tensor]:
        return trained(RULES[name], lora, CPU)

    def difference(name: str, lora: bool, moved_late: bool, two: bool = False) -> float:
        expected = on_the_cpu(name, lora)
        with SimulatedDevice():
            found = trained(RULES[name], lora, device, moved_late, two)
        return max(float((expected[name] - found[name]).abs().max()) for name in expected)

    for lora in (False, True):
        for name in RULES:
            note(f"{name}, {'LoRA' if lora else 'full'}", lambda n=name, a=lora: difference(n, a, False))
    for name in RULES:
        note(f"{name}, two devices", lambda n=name: difference(n, n.startswith("spf"), False, True))
    for name in ("null-space", "safegrad"):
        note(f"{name}, moved late", lambda n=name: difference(n, False, True))
    with SimulatedDevice():
        note("planted fault", lambda: planted_fault(device))
    with tempfile.TemporaryDirectory() as made:
        workspace = prepare(Path(made), device)
        for method in METHODS:
            with SimulatedDevice():
                note(f"cell {method}", lambda m=method: benchmark_cell(m, "full", workspace))
        with SimulatedDevice():
            note("cell safe-lora", lambda: benchmark_cell("safe-lora", "lora", workspace))
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
