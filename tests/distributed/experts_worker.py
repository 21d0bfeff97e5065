"""One process of runs with packed experts: python -m [torch.distributed.run ... -m] tests.distributed.experts_worker
MODE OUTPUT, where MODE is single or ddp. Writes every case's losses, parameters and how far they are off what is held.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from spf import CorrectionError, NullSpace, SafetyCallback
from spf.rules.holding import Holding
from tests.conftest import make_tokenizer
from tests.support_matrix import FAMILIES
from tests.test_callback import token_data

MODE, OUTPUT = sys.argv[1], Path(sys.argv[2])
WORLD, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
TARGETS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "full": (False, {"optim": "sgd", "learning_rate": 0.5}),
    "lora": (True, {"optim": "sgd", "learning_rate": 5.0}),
    "fault": (False, {"optim": "sgd", "learning_rate": 0.5}),
}


def run(name: str) -> dict[str, Any]:
    lora, settings = CASES[name]
    model: Any = {family.kind: family for family in FAMILIES}["qwen3_moe"].model()
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, **TARGETS))
    callback = SafetyCallback(str(OUTPUT / "safety.jsonl"), NullSpace(rank=8), monitor_steps=2, cosines=not lora)
    args = TrainingArguments(
        output_dir=str(OUTPUT / MODE / name), max_steps=4, per_device_train_batch_size=4 // WORLD, use_cpu=True,
        save_strategy="no", logging_steps=1, report_to="none", seed=3, disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=token_data(32), processing_class=make_tokenizer(), callbacks=[callback]
    )
    error = ""
    try:
        trainer.train()
    except CorrectionError as stopped:
        error = str(stopped)
    running = callback.attachment
    assert running is not None
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    off, experts = 0.0, 0
    for each, matrix in running.matrices.items():
        W, V = matrix.view(matrix.weight).detach().float(), running.subspace.right[each]
        off = max(off, float((W @ V - running.subspace.target[each]).norm() / W.norm()))
        experts += "[" in each
    return {
        "error": error,
        "off": off,
        "experts": experts,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "corrected": running.corrected,
        "parameters": {each: p.detach().clone() for each, p in unwrapped.named_parameters()},
    }


def without_one(self: Holding, names: list[str], dtype: torch.dtype) -> None:
    hold(self, [name for name in names if not name.endswith("gate_up_proj[1]")], dtype)


hold = Holding._hold
for name in CASES:
    if name == "fault":
        Holding._hold = without_one  # type: ignore[method-assign, assignment]
    torch.save(run(name), OUTPUT / f"{MODE}-{name}-{RANK}.pt")
    Holding._hold = hold  # type: ignore[method-assign]
