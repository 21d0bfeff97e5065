"""`spf lock`: extract, apply, remove, inspect and tune a SafetyLock."""

import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AllowInfNan
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.arguments import ApplyArguments, ExtractArguments, InspectArguments, RemoveArguments, TuneArguments
from spf.config import Count, File, Interval, NotNegative, Share, read_json
from spf.data import packaged_prompts
from spf.errors import keeping, working
from spf.evaluation import neutral_texts
from spf.files import check_output_file, claim, claimed_for, directory_lock, weights_at, write_json
from spf.models import load_model, look_up, machine_device, refuse_beside
from spf.safetylock.extraction import extract
from spf.safetylock.lock import SafetyLock
from spf.safetylock.pairs import echoed, load_pairs, packaged_pairs
from spf.safetylock.saved import save_locked, unlock_saved
from spf.safetylock.tune import PERPLEXITY_RISE, TunePoint, assert_acts, choose, next_token_log_probs, plot_sweep, sweep

Number = TypeVar("Number", int, float)


def extract_lock(args: ExtractArguments) -> None:
    """`spf lock extract`."""
    check_output_file(Path(args.output))
    with keeping(lambda: "nothing was written"):
        given = None if args.pairs is None else load_pairs(args.pairs)
        model, tokenizer = _load(args.model)
        pairs = packaged_pairs(model, tokenizer, args.count) if given is None else given
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
        with working():
            path = lock.save(args.output)
    _show(lock)
    print(f"Lock: {path}")


def _load(name: str, dtype: Literal["auto"] | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_model(name, dtype)
    return model.to(machine_device()), tokenizer  # type: ignore[arg-type]


def apply_lock(args: ApplyArguments) -> None:
    """`spf lock apply`."""
    output = Path(args.output)
    refuse_beside(output, ())
    with directory_lock(output), keeping(lambda: _saved(output)):
        lock = SafetyLock.load(args.lock)
        model, tokenizer = _load(args.model, "auto")  # not rounded: unlocked, it is to be what it was
        text = neutral_texts()[0]
        before = next_token_log_probs(model, tokenizer, text)
        lock.apply(model, tokenizer, alpha=args.alpha, stack=args.stack)
        assert_acts(model, tokenizer, text, before, lock.info.alpha if args.alpha is None else args.alpha)
        print(f"The locked model was saved in {save_locked(model, tokenizer, output)}")


def remove_lock(args: RemoveArguments) -> None:
    """`spf lock remove`."""
    output = Path(args.output)
    refuse_beside(output, ())
    with directory_lock(output), keeping(lambda: _saved(output)):
        model, tokenizer = unlock_saved(args.model)
        with working():
            model.save_pretrained(output)
            tokenizer.save_pretrained(output)
    print(f"The unlocked model was saved in {output}")


def _saved(output: Path) -> str:
    there = (output / "config.json").is_file()
    return f"the model in {output} may not be whole" if there else "nothing was written"


def inspect_lock(args: InspectArguments) -> None:
    """`spf lock inspect`."""
    lock = SafetyLock.load(args.lock)
    _show(lock)
    if args.model is not None:
        model, tokenizer = _load(args.model)
        cosines = lock.check(model, tokenizer)
        Console().print(
            f"It fits {args.model}: cosine of o_proj's responses {min(cosines.values()):.4f} or more in "
            f"{len(cosines)} layers"
        )


TUNED = ("sweep.json", "sweep.png", "lock.safetensors")


def tune_lock(args: TuneArguments) -> None:
    """`spf lock tune`: settings that were measured before are not measured again."""
    lock = SafetyLock.load(args.lock)
    alphas, ks = _numbers("alphas", args.alphas, float), _numbers("ks", args.ks, int)
    for k in ks:
        lock.top(k)
    output = Path(args.output)
    grid = [(ks[0], 0.0), *((k, alpha) for k in ks for alpha in alphas if alpha != 0)]
    # what is chosen among the measured settings costs nothing, so its bound may change
    others = ("lock", "output", "overwrite", "max_over_refusal")
    settings = {name: value for name, value in asdict(args).items() if name not in others}
    settings |= {"lock": lock.fingerprint, "weights": weights_at(args.model)}
    with directory_lock(output):
        if args.overwrite:
            look_up(args.model)  # before anything is removed
        claim(output / "settings.json", settings, overwrite=args.overwrite, parts=TUNED)
        with claimed_for(output / "settings.json", TUNED), keeping(lambda: _measured(output, len(grid))):
            _tune(args, lock, grid, output)


def _measured(output: Path, wanted: int) -> str:
    count = len(_read_sweep(output)[0])
    if count == 0:
        return "nothing was measured yet"
    return f"{count} of {wanted} settings are measured and kept in {output / 'sweep.json'}; the same command goes on"


class _Point(File):
    k: Count
    alpha: float
    asr: Share
    asr_ci: Interval
    over_refusal: Share
    over_refusal_ci: Interval
    perplexity: Annotated[float, AllowInfNan(True)]


class _Sweep(File):
    """What sweep.json holds; without a choice the sweep is not finished."""

    model: str
    lock: str
    points: list[_Point]
    max_over_refusal: NotNegative | None = None
    max_perplexity: Annotated[float, AllowInfNan(True)] | None = None
    chosen: _Point | None = None


def _read_sweep(output: Path) -> tuple[list[TunePoint], float | None]:
    """The settings that are measured, and the bound by which one was chosen; None if the run is not finished."""
    path = output / "sweep.json"
    if not path.exists():
        return [], None
    found = read_json(_Sweep, path, "damaged; --overwrite starts over")
    return [TunePoint.from_dict(point.model_dump()) for point in found.points], found.max_over_refusal


def _tune(args: TuneArguments, lock: SafetyLock, grid: list[tuple[int, float]], output: Path) -> None:
    points, chosen_by = _read_sweep(output)
    found: dict[str, Any] = {"model": args.model, "lock": lock.fingerprint}
    if points and chosen_by is None:
        print(f"{len(points)} of {len(grid)} settings were measured before, kept")
    if pending := grid[len(points) :]:
        model, tokenizer = _load(args.model)

        def keep(point: TunePoint) -> None:
            points.append(point)
            write_json(output / "sweep.json", found | {"points": [p.as_dict() for p in points]})

        with working():
            sweep(
                model,
                tokenizer,
                lock,
                pending,
                packaged_prompts("harmful_validation"),
                packaged_prompts("benign_validation"),
                neutral_texts(),
                done=keep,
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
            )
    unlocked = points[0]
    limit = unlocked.over_refusal + 0.05 if args.max_over_refusal is None else args.max_over_refusal
    finished = chosen_by == limit
    if chosen_by is not None:
        what = "kept" if finished else f"kept; now chosen with over-refusal up to {limit:.1%}"
        print(f"{output}: finished before with the same settings, {what} (--overwrite starts over)")
    best = choose(points, limit, PERPLEXITY_RISE * unlocked.perplexity)
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
    if finished:
        return
    with working():
        print(f"Curves: {plot_sweep(points, output / 'sweep.png', f'SafetyLock on {args.model}')}")
        if best is None or best.alpha == 0:
            (output / "lock.safetensors").unlink(missing_ok=True)
            warnings.warn("no setting lowers ASR within the bounds; no tuned lock was written", stacklevel=2)
        else:
            print(f"Tuned lock: {lock.top(best.k).with_alpha(best.alpha).save(output / 'lock.safetensors')}")
        found |= {"max_over_refusal": limit, "max_perplexity": PERPLEXITY_RISE * unlocked.perplexity}
        found |= {"points": [p.as_dict() for p in points], "chosen": best.as_dict() if best else None}
        write_json(output / "sweep.json", found)


def _numbers(name: str, text: str, kind: type[Number]) -> list[Number]:
    try:
        found = [kind(part) for part in text.split(",")]
        if not all(map(math.isfinite, found)) or (kind is int and min(found) < 1):
            raise ValueError
    except ValueError:
        raise ValueError(f"--{name} {text}: {'whole ' if kind is int else ''}numbers separated by commas") from None
    return found


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
