"""The bridge: the safety-tuned model of the controlled world learns new operators, with and without our rule.

Plain fine-tuning, the null-space rule held during it (full fine-tuning), and SafetyLock put on either afterwards.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from spf.data import Anchor
from spf.lab.analysis.inputs import Prompts
from spf.lab.study.data import EOT, ID, PAD, SEGMENT_1, SEGMENT_2, VOCABULARY, EvalSet, Sampler, WorldSettings
from spf.lab.study.evaluation import evaluate
from spf.lab.study.measure import measure_world
from spf.lab.study.training import STAGE_NUMBER, Schedule, copied, forward, run_stage, sequence_nll
from spf.optimizer import attach
from spf.probe import SafetyProbe
from spf.rules import NullSpace
from spf.safetylock.extraction import extract
from spf.safetylock.pairs import Pair


@dataclass(frozen=True)
class BridgeSettings:
    """Fine-tuning on new operators; anchors: refusals the rule protects; heads: of the lock; alpha: its strength."""

    schedule: Schedule
    anchors: int = 128
    heads: int = 3
    alpha: float = 2.0


def anchors_of(test: EvalSet) -> list[Anchor]:
    """Prompts with their null answers, as safety samples."""
    anchors = []
    for number, (row, part) in enumerate(zip(test.null.ids, test.null.part, strict=True)):
        end = int((row == EOT).int().argmax()) + 1
        wanted = (part == SEGMENT_1) | (part == SEGMENT_2)
        anchors.append(Anchor(row[:end].tolist(), row[wanted].tolist(), f"unsafe prompt {number}"))
    return anchors


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """The world's vocabulary with words split at spaces, and a chat template that adds nothing."""
    words = Tokenizer(WordLevel({**ID, "<unk>": len(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="#")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %} {% endif %}"
    )
    return tokenizer


def pairs_of(test: EvalSet) -> list[Pair]:
    """Unsafe prompts with the null answer (safe) and the executed one (unsafe), for SafetyLock."""

    def text(ids: Tensor) -> str:
        return " ".join(VOCABULARY[i] for i in ids.tolist())

    pairs = []
    for number, anchor in enumerate(anchors_of(test)):
        begin = len(anchor.prompt_ids)
        wanted = test.instruct.part[number, begin:] >= SEGMENT_1
        executed = test.instruct.ids[number, begin:][wanted]
        question = [{"role": "user", "content": text(torch.tensor(anchor.prompt_ids))}]
        pairs.append(Pair(question, text(torch.tensor(anchor.refusal_ids)), text(executed), f"unsafe prompt {number}"))
    return pairs


def run_bridge(
    safe: LlamaForCausalLM,
    settings: BridgeSettings,
    world: WorldSettings,
    tests: dict[str, EvalSet],
    prompts: dict[str, Prompts],
    seed: int,
    directory: Path,
) -> dict[str, Any]:
    """Fine-tune a safety-tuned model on new operators in two ways, lock both; rates and measurements of all.

    The anchors are unsafe prompts of their own seed, so the test prompts are new to the rule and the lock.
    """
    stage = STAGE_NUMBER["bridge"]
    anchor_set = Sampler(world, (seed, stage, 1_000_000)).test("unsafe", settings.anchors)
    tests = {**tests, "new_operators": Sampler(world, (seed, stage, 1_000_001)).new_operators(len(tests["safe"]))}

    def step_loss(model: PreTrainedModel, step: int) -> Tensor:
        samples = Sampler(world, (seed, stage, step)).new_operators(settings.schedule.batch).instruct
        return sequence_nll(forward(model, samples), samples.labels(SEGMENT_1, SEGMENT_2).to(model.device)).mean()

    models: dict[str, LlamaForCausalLM] = {}
    curves: dict[str, Any] = {}
    for name in ("plain", "null-space"):
        model = copied(safe)

        def hold(optimizer: torch.optim.Optimizer, model: LlamaForCausalLM = model) -> None:
            attach(SafetyProbe(model, anchors_of(anchor_set), pad_token_id=PAD, seed=seed), optimizer, NullSpace())

        models[name], history = run_stage(
            model,
            settings.schedule,
            step_loss,
            directory / name,
            f"new operators, {name}",
            prepare=hold if name == "null-space" else None,
        )
        curves[name] = history["loss"]
    lock = extract(safe, toy_tokenizer(), pairs_of(anchor_set), k=settings.heads, alpha=settings.alpha, seed=seed)
    for name in ("plain", "null-space"):
        locked = copied(models[name])
        # As a hook, so that the parameters stay those of the fine-tuned model and can be compared.
        lock.apply(locked, mode="hook")
        models[f"{name}+lock"] = locked
    evaluation = {name: evaluate(model, tests) for name, model in {"before": safe, **models}.items()}
    measurements = measure_world(safe, models, prompts, seed=seed, batch_size=128)
    return {"evaluation": evaluation, "measurements": measurements, "loss": curves}
