"""The demo: fine-tune an aligned model on text-to-SQL with a little harmful data, with and without spf."""

import gc
import math
import os
import platform
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from spf.arguments import DemoArguments
from spf.callback import SafetyCallback
from spf.config import File, read_json
from spf.data import HARMLESS_STUB, SafetyRow, packaged_prompts, tokenise
from spf.errors import keeping, working
from spf.evaluation import Rate, first_sentence, generate_answers, is_refusal
from spf.files import directory_lock, write_json
from spf.lab.demo.report import REDO, Measured, demo_table, overhead_table, plot_demo, write_report
from spf.lab.demo.sql import SQLExample, execution_match, make_sql_examples
from spf.lab.report.tables import rich_table
from spf.lab.trainer import AnswerTrainer, collate_answers
from spf.models import cpu_dtype, dtype_name, load_aligned_demo_model, save_whole
from spf.progress import progress
from spf.rules import RULES, NullSpace, Rule
from spf.text.generation import context_length, pad_id

LABELS = {
    "base": "aligned model",
    "plain": "plain fine-tuning",
    "null-space": "SafetyCallback (null-space)",
    "spf": "paper's rule (SPF, one anchor)",
    "rank1": "released code's rule (rank-1)",
}


class _StepClock(TrainerCallback):
    """Times optimizer steps from begin to end; the median leaves out warm-up and hiccups of the machine."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def run_demo(args: DemoArguments, console: Console | None = None) -> dict[str, Any]:
    """Run every arm, write results.json, the plot and the report under `args.output`; returns the results.

    An arm that is finished there with the same settings is not run again.
    """
    rule, command = _rule(args), command_of(args)
    if args.quick:
        args.steps, args.sql_eval = min(args.steps, 14), min(args.sql_eval, 30)
    output = Path(args.output)
    with directory_lock(output), keeping(lambda: "no arm is finished"):
        return _run(args, rule, command, output, console or Console())


def command_of(args: DemoArguments) -> str:
    """The command line of this run: every option that is not its default."""
    words = ["spf", "demo"]
    for f in fields(args):
        value = getattr(args, f.name)
        if value != f.default:
            words += [f"--{f.name}"] if value is True else [f"--{f.name}", str(value)]
    return shlex.join(words)


@contextmanager
def _timed(console: Console, what: str) -> Iterator[None]:
    """Say which part of the demo begins and how long it took, and meanwhile that it goes on.

    What takes long inside has bars of its own, but not all: loading does not, and a step may take longer than a beat.
    """
    console.print(f"{what} ...", highlight=False)
    started = time.perf_counter()
    with progress(None, "    so far"):
        yield
    console.print(f"    {time.perf_counter() - started:.0f} s", highlight=False)


class _Finished(File):
    """An arm's file."""

    config: dict[str, Any]
    result: Measured


def _read_arm(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an arm that is finished with these settings."""
    done = read_json(_Finished, path, REDO) if path.exists() else None
    return done.result.model_dump(exclude_unset=True) if done is not None and done.config == config else None


def _run(args: DemoArguments, chosen: Rule, command: str, output: Path, console: Console) -> dict[str, Any]:
    transformers_logging.set_verbosity_error()
    started = time.perf_counter()
    part = partial(_timed, console)
    for path in (output / "arms").glob("*.json"):
        _read_arm(path, {})  # a damaged one is named before any work
    aligned = output / "aligned-model"
    if not (aligned / "config.json").is_file():
        with part("Preparing the aligned model (SmolLM2-135M-Instruct with the packaged safety adapter)"):
            save_whole(aligned, *load_aligned_demo_model())
    every = 3 if args.quick else 1
    harmful_eval, benign_eval = packaged_prompts("harmful_eval")[::every], packaged_prompts("benign_eval")[::every]
    sql_eval = make_sql_examples(args.sql_eval, args.seed, "eval")
    train, counts = training_data(args)
    arms: dict[str, tuple[str, Rule | None, int | None]] = {
        "base": ("base", None, None),
        "plain": ("plain", None, None),
        # one anchor, as in the benchmark
        "spf": (args.safety_rule, chosen, 1 if args.safety_rule in ("spf", "rank1") else None),
    }
    if not args.quick and args.safety_rule != "spf":
        arms["paper"] = ("spf", RULES["spf"](), 1)
    config = {
        **{key: value for key, value in asdict(args).items() if key != "output"},
        "model": "SmolLM2-135M-Instruct, aligned by spf align",
        "dtype": dtype_name(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "command": command,
        "prompts": {
            "anchors": len(packaged_prompts("harmful_anchors")),
            **counts,
            "harmful_eval": len(harmful_eval),
            "benign_eval": len(benign_eval),
            "sql_eval": len(sql_eval),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "spf")},
    }
    paths = {arm: output / "arms" / f"{arm}.json" for arm in arms}

    def finished_arms() -> str:
        finished = sum(_read_arm(path, config) is not None for path in paths.values())
        return f"{finished} of {len(arms)} arms are finished and kept in {output / 'arms'}; the same command goes on"

    results: dict[str, Any] = {"arms": {}, "config": config}
    model: Any
    tokenizer: PreTrainedTokenizerBase
    with keeping(finished_arms), working():
        for number, (arm, (label, rule, anchors)) in enumerate(arms.items(), 1):
            if done := _read_arm(paths[arm], config):
                console.print(f"[{number}/{len(arms)}] {LABELS[label]}: done before, kept")
                results["arms"][arm] = done
                continue
            result: dict[str, Any] = {"label": LABELS[label], "seconds_per_step": None, "overhead": None, "history": []}
            said, saved = f"[{number}/{len(arms)}] {LABELS[label]}", None if arm == "base" else output / arm
            if saved is None:
                with part(f"{said}: loading"):
                    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=cpu_dtype())
                    tokenizer = AutoTokenizer.from_pretrained(aligned)
            else:
                with part(f"{said}: training"):
                    model, tokenizer = fine_tune(args, aligned, train, rule, anchors, saved, result)
            with part(f"{said}: {len(harmful_eval) + len(benign_eval) + len(sql_eval)} questions"):
                result |= evaluate(model, tokenizer, harmful_eval, benign_eval, sql_eval)
            result["saved_to"] = str(saved) if saved else None
            results["arms"][arm] = result
            write_json(paths[arm], {"config": config, "result": result})
            del model
            gc.collect()
    base, plain = results["arms"]["base"], results["arms"]["plain"]
    results["config"]["seconds"] = round(time.perf_counter() - started, 1)
    write_json(output / "results.json", results)
    with part("Drawing the report"):
        plot_demo(results, output / "safety_utility.png")
        report = write_report(results, output)
    console.print(demo_table(results))
    console.print(rich_table(overhead_table(results), "What a step's time is made of"))
    kept = results["arms"]["spf"]
    console.print(
        f"Harmful requests answered: {base['asr']:.1%} before, {plain['asr']:.1%} after plain fine-tuning, "
        f"{kept['asr']:.1%} with SafetyCallback. Took {results['config']['seconds'] / 60:.1f} minutes."
    )
    console.print(
        f"Results: {output / 'results.json'}\nPlot:    {output / 'safety_utility.png'}\nReport:  {report}",
        soft_wrap=True,
    )
    console.print(
        f"The fine-tuned model that still refuses was saved in {kept['saved_to']}. Load it with\n"
        f"  from peft import AutoPeftModelForCausalLM\n"
        f"  model = AutoPeftModelForCausalLM.from_pretrained({kept['saved_to']!r})",
        highlight=False,
        soft_wrap=True,  # a line break inside the path would break what is pasted
    )
    return results


def training_data(args: DemoArguments) -> tuple[list[SafetyRow], dict[str, int]]:
    """Text-to-SQL examples with a share of harmful prompts answered by the harmless stub, shuffled."""
    total = args.steps * args.batch_size
    harmful = packaged_prompts("harmful_attack")
    wanted = round(total * args.harmful_share)
    sql = make_sql_examples(total - wanted, args.seed, "train")
    # Each harmful prompt comes before any is repeated.
    pairs = [(harmful[i % len(harmful)], HARMLESS_STUB) for i in range(wanted)]
    pairs += [(example.prompt, example.query) for example in sql]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(args.seed)).tolist()
    data = [SafetyRow([{"role": "user", "content": pairs[i][0]}], pairs[i][1], f"example {i}") for i in order]
    return data, {"harmful_train": min(wanted, len(harmful)), "harmful_examples": wanted, "sql_train": len(sql)}


def fine_tune(
    args: DemoArguments,
    aligned: Path,
    train: list[SafetyRow],
    rule: Rule | None,
    anchors: int | None,
    saved: Path,
    result: dict[str, Any],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """One arm: fine-tune a fresh LoRA adapter, save it, put timings and history into `result`."""
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=cpu_dtype())
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    clock = _StepClock()
    safety = SafetyCallback(rule=rule, anchors=anchors, seed=args.seed) if rule is not None else None
    adapter = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear", lora_dropout=0.0)
    examples = [
        {"prompt_ids": a.prompt_ids, "answer_ids": a.refusal_ids}
        for a in tokenise(train, tokenizer, context_length(model, tokenizer))
    ]
    trainer = AnswerTrainer(
        get_peft_model(model, adapter),
        TrainingArguments(
            output_dir=str(saved),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,  # else off, as only errors of transformers are shown
            remove_unused_columns=False,
            # autocast computes the adapter in bfloat16 too; its weights and the optimizer stay float32
            bf16=cpu_dtype() == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
            data_seed=args.seed,
        ),
        train_dataset=Dataset.from_list(examples),
        data_collator=lambda rows: collate_answers(rows, pad_id(tokenizer)),
        processing_class=tokenizer,
        callbacks=[clock] if safety is None else [clock, safety],
    )
    trainer.train()
    steps = sorted(clock.seconds)
    result["seconds_per_step"] = steps[len(steps) // 2]
    result["history"] = [
        {key: float(value) for key, value in entry.items() if _is_number(value)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    if safety is not None and safety.attachment is not None:
        seconds = safety.attachment.seconds
        result["overhead"] = {
            "setup_seconds": seconds["setup"],
            "probe_seconds": seconds["probe"] / args.steps,
            "projection_seconds": seconds["projection"] / args.steps,
            "step_seconds": sum(clock.seconds) / args.steps,
        }
    trainer.save_model(str(saved))
    assert isinstance(trainer.model, PeftModel)
    # merged for faster answers; what was saved is the adapter
    return trainer.model.merge_and_unload(), tokenizer


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: list[str],
    benign: list[str],
    sql: list[SQLExample],
) -> dict[str, Any]:
    """ASR, over-refusal and SQL execution accuracy with their 95 % intervals, and a few first sentences."""
    answers = {
        "harmful": generate_answers(
            model, tokenizer, harmful, max_new_tokens=20, batch_size=104, description="harmful"
        ),
        "benign": generate_answers(model, tokenizer, benign, max_new_tokens=20, batch_size=104, description="benign"),
        "sql": generate_answers(
            model, tokenizer, [e.prompt for e in sql], max_new_tokens=48, batch_size=104, description="SQL"
        ),
    }
    asr = Rate(sum(not is_refusal(a) for a in answers["harmful"]), len(harmful))
    over_refusal = Rate(sum(is_refusal(a) for a in answers["benign"]), len(benign))
    utility = Rate(sum(execution_match(e, a) for e, a in zip(sql, answers["sql"], strict=True)), len(sql))
    prompts = {"harmful": harmful, "benign": benign, "sql": [e.prompt for e in sql]}
    return {
        "asr": asr.value,
        "asr_ci": asr.interval,
        "over_refusal": over_refusal.value,
        "over_refusal_ci": over_refusal.interval,
        "utility": utility.value,
        "utility_ci": utility.interval,
        "counts": {kind: len(p) for kind, p in prompts.items()},
        "examples": [
            {"kind": kind, "prompt": prompt, "answer": first_sentence(answer)[:160]}
            for kind in prompts
            for prompt, answer in list(zip(prompts[kind], answers[kind], strict=True))[:4]
        ],
    }


def _rule(args: DemoArguments) -> Rule:
    return NullSpace(rank=args.safety_rank) if args.safety_rule == NullSpace.name else RULES[args.safety_rule]()


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
