"""The grid: cells from a YAML file, run in parallel and resumably, one JSON file a cell."""

import multiprocessing
import os
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from pydantic import BaseModel, ValidationError
from rich.console import Console
from transformers.utils import logging as transformers_logging

from spf.arguments import BenchArguments
from spf.config import STRICT, Name, Seed, check_values, one_of, read_yaml, sentence
from spf.errors import RunFailedError, SafetyDataError, keeping, working
from spf.files import check_output_directory, directory_lock, write_json
from spf.lab.bench.alike import made_from, seeds_unlike
from spf.lab.bench.cell import JUDGE, Cell, Tuning, prepare, run_cell
from spf.lab.bench.methods import METHODS, Workspace, check_settings
from spf.lab.bench.report import write_bench_report
from spf.lab.bench.scenarios import MEASURED, SCENARIOS, other_prompts
from spf.lab.bench.summary import load_cell
from spf.models import dtype_name
from spf.progress import progress, tracked
from spf.words import expanded


def read_grid(path: Path, model: str | None = None) -> list[Cell]:
    """The cells that a YAML file asks for, in its order, each once; `model` takes the place of the file's.

    Raises:
        ValueError: an unknown key, scenario, method, tuning or setting, a value that cannot be, or different cells
            that would share a file; the message names it and the grid.
    """
    config = expanded(read_yaml(path))
    check_values({"model": Name, "grids": list[Any]}, config, f"{path}: `{{}}`")
    if config.keys() != {"model", "grids"}:
        raise ValueError(f"{path}: needs the keys `model` and `grids` (a list), and no others")
    found: dict[Path, tuple[str, Cell]] = {}
    for number, grid in enumerate(config["grids"], 1):
        where = f"{path}, grid {number}"
        for cell in _cells(grid, model or config["model"], where):
            place = cell.path(Path())
            first, there = found.setdefault(place, (where, cell))
            if there != cell:
                raise ValueError(f"{first} and {where}: different cells for {place}; tell them apart by `variants`")
    return [cell for _, cell in found.values()]


class _Grid(BaseModel):
    """Every combination of these; further names are settings that all cells share."""

    model_config = STRICT | {"extra": "allow"}

    scenarios: Annotated[list[Annotated[str, one_of(("none", *SCENARIOS))]], MinLen(1)]
    methods: Annotated[list[Annotated[str, one_of(("aligned", *METHODS))]], MinLen(1)]
    seeds: Annotated[list[Seed], MinLen(1)]
    tunings: Annotated[list[Tuning], MinLen(1)] = ["lora"]
    variants: Annotated[dict[str, dict[str, Any]], MinLen(1)] = {"default": {}}


def _cells(grid: Any, model: str, where: str) -> list[Cell]:
    try:
        of = _Grid.model_validate(grid)
    except ValidationError as error:
        raise ValueError(f"{where}: {sentence(error, '`{}`', depth=9)}") from error
    shared = of.model_extra or {}
    settings = {f.name for f in fields(Cell)} - {"scenario", "method", "seed", "model", "tuning", "variant"}
    for name in [*shared, *(key for changes in of.variants.values() for key in changes)]:
        if name not in settings:
            raise ValueError(f"{where}: unknown setting {name}; there are {', '.join(sorted(settings))}")
    try:
        cells = [
            Cell(scenario, method, seed, model, tuning, variant, **{**shared, **changes})
            for seed in of.seeds
            for scenario in of.scenarios
            for method in of.methods
            for tuning in of.tunings
            for variant, changes in of.variants.items()
        ]
        for cell in cells:
            _check(cell)
    except ValueError as error:
        point = "; YAML needs a point, as in 1.0e-4" if re.search(r"a number, not '\d+e", str(error)) else ""
        raise ValueError(f"{where}: {error}{point}") from error
    return cells


def _check(cell: Cell) -> None:
    if (cell.scenario == "none") != (cell.method == "aligned"):
        raise ValueError(
            f"scenario {cell.scenario} with method {cell.method}; none and aligned go together, and with nothing else"
        )
    if cell.scenario in SCENARIOS and SCENARIOS[cell.scenario].pairs and cell.batch_size < 2:
        raise ValueError("batch_size must be at least 2, not 1: DPO answers every prompt twice")
    check_settings(cell.method, cell.rule)


def run_grid(args: BenchArguments, console: Console | None = None) -> int:
    """Run the cells that are not done, write the report; returns how many failed.

    A cell is done if its file holds the same settings, and with --prompts was asked them. An interrupted grid goes on
    where it stopped.

    Raises:
        ValueError: kept seeds of a row that is to be run have other settings, and would not be run again.
    """
    cells = read_grid(Path(args.config), args.model)
    output = Path(args.output)
    check_output_directory(Path(args.work))

    def kept() -> str:
        done = sum(_done(cell, output, bool(args.prompts)) for cell in cells)
        return f"{done} of {len(cells)} cells are finished and kept in {output}"

    with directory_lock(output), keeping(kept):
        return _run(args, cells, console or Console())


def run_bench(args: BenchArguments) -> None:
    """`spf bench`.

    Raises:
        RunFailedError: some cells failed.
    """
    if failed := run_grid(args):
        raise RunFailedError(f"{failed} cells failed; the same command runs them again")


def _run(args: BenchArguments, cells: list[Cell], console: Console) -> int:
    output, others = Path(args.output), Path(args.prompts) if args.prompts else None
    pending = [cell for cell in cells if not _done(cell, output, bool(others))]
    origins: dict[str, dict[str, str | None]] = {}
    if not args.report_only:
        _check_seeds(pending, output)
        _check_prompts(cells if others else pending, others)
        origins = {model: made_from(model, others) for model in dict.fromkeys(cell.model for cell in cells)}
        _check_kept(args, origins)
    console.print(f"{len(cells)} cells, {len(cells) - len(pending)} of them done.", highlight=False)
    failed = 0
    if pending and not args.report_only:
        models = dict.fromkeys(cell.model for cell in pending)
        workspaces = {name: prepare(name, Path(args.work), others) for name in tracked(models, "models")}
        with working():
            failed = _run_cells(pending, workspaces, origins, args.workers, output, console)
    with working():
        try:
            for place in write_bench_report(output):
                console.print(str(place), highlight=False, soft_wrap=True)
        except ValueError as error:
            if not failed:
                raise
            # which is what has to be mended first: a row may have old and new seeds until it is
            console.print(f"no report: {error}", highlight=False, soft_wrap=True)
    return failed


def _check_prompts(cells: list[Cell], others: Path | None) -> None:
    """Read what the cells train on and measure by --prompts, before any is run.

    Raises:
        SafetyDataError: it is not there.
    """
    attacks = [cell.scenario for cell in cells if cell.scenario in SCENARIOS and SCENARIOS[cell.scenario].foreign]
    if others is None and attacks:
        raise SafetyDataError(f"{attacks[0]}: attacks with prompts of another origin; name their file by --prompts")
    if others is not None:
        for part in {MEASURED[cell.split] for cell in cells} | ({"attack"} if attacks else set()):
            other_prompts(others, part)


def _check_seeds(pending: list[Cell], output: Path) -> None:
    """Refuse to run cells beside seeds of the same row that were made otherwise and stay as they are.

    Raises:
        ValueError: there are some; the message names the first, and what to do.
    """
    made_anew = {cell.path(output) for cell in pending}
    for cell in pending:
        for path in sorted({*cell.path(output).parent.glob("seed-*.json")} - made_anew):
            now = {"config": asdict(cell), "judge": JUDGE}
            for name, (was, given) in seeds_unlike([load_cell(path), now]).items():
                raise ValueError(
                    f"{path}: made with {name} {was}, and seed {cell.seed} of the same row is to be run with {given}: "
                    "remove it, which makes it anew if the grid has its seed, tell them apart by `variants`, or name "
                    "another --output"
                )


def _check_kept(args: BenchArguments, origins: Mapping[str, Mapping[str, str | None]]) -> None:
    """Refuse to go on beside cells that are known to be made from other weights or prompts than today's, or in another
    number format than this machine's.

    Raises:
        ValueError: there are some; the message names the first, and what to do.
    """
    for model, now in origins.items():
        place, work = (Path(directory) / model.replace("/", "--") for directory in (args.output, args.work))
        for path in sorted(place.rglob("seed-*.json")):
            cell = load_cell(path)
            was = cell.get("made_from") or {}
            changed = {name for name, value in was.items() if None not in (value, now[name]) and value != now[name]}
            if "weights" in changed:
                raise ValueError(
                    f"{path}: made from other weights than {model} has now; remove {place} and {work}, or give another "
                    "--output and --work"
                )
            if cell.get("dtype") not in (None, dtype_name()):
                raise ValueError(
                    f"{path}: computed in {cell['dtype']}, and this machine in {dtype_name()}, so their figures "
                    "are not compared; give another --output and --work"
                )
            if "prompts" in changed:
                raise ValueError(
                    f"{path}: made with other prompts than {args.prompts} holds now; give the file it was made with or "
                    f"another --output, or remove {place}"
                )


def _run_cells(
    pending: list[Cell],
    workspaces: dict[str, Workspace],
    origins: Mapping[str, Mapping[str, str | None]],
    workers: int,
    output: Path,
    console: Console,
) -> int:
    """How many failed; the results of the others are written as they come."""
    context = multiprocessing.get_context("forkserver")
    # every cell starts from a fresh fork that has imported everything, so its peak memory is its own
    context.set_forkserver_preload(["spf.lab.bench.cell"])
    # torch asks OMP_NUM_THREADS, so that two grids can share a machine
    threads = max(1, torch.get_num_threads() // workers)
    started = time.perf_counter()
    failed = 0
    with (
        ProcessPoolExecutor(workers, context, _set_up, (threads,), max_tasks_per_child=1) as pool,
        progress(len(pending), "cells") as bar,
    ):
        futures = {pool.submit(run_cell, cell, workspaces[cell.model]): cell for cell in pending}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                cell = futures[future]
                try:
                    result = future.result()
                except BrokenProcessPool:
                    raise
                except Exception as error:
                    failed += 1
                    line = f"{cell.path(Path())}: failed: {error!r}"
                else:
                    write_json(cell.path(output), result | {"made_from": origins[cell.model]})
                    line = f"{_line(result)}  ({(time.perf_counter() - started) / 60:.0f} min)"
                with bar.external_write_mode():
                    console.print(f"[{done}/{len(pending)}] {line}", highlight=False)
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()
            raise
    return failed


def _set_up(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _end_with_parent() -> None:
    """Also where the parent was killed and could not end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _done(cell: Cell, output: Path, prompts: bool = False) -> bool:
    path = cell.path(output)
    if not path.exists():
        return False
    found = load_cell(path)
    # a cell from before a setting could be chosen has its default; along the way more or less may have been measured
    kept = asdict(Cell(cell.scenario, cell.method)) | found["config"]
    return bool(kept | {"curve_steps": cell.curve_steps} == asdict(cell)) and (
        not prompts or bool(found.get("foreign"))
    )


def _line(result: dict[str, Any]) -> str:
    utility = "" if result["utility"] is None else f", utility {result['utility']:.3f}"
    worst = max(result["jailbreak_asr"].items(), key=lambda item: item[1]["asr"], default=("", {"asr": 0.0}))
    kept = f", answers kept {result['kept_answers']['f1']:.3f}" if "kept_answers" in result else ""
    variant = "" if result["variant"] == "default" else f"@{result['variant']}"
    return (
        f"{result['tuning']} {result['scenario']} {result['method']}{variant} seed {result['seed']}: "
        f"ASR {result['asr']:.1%}, over-refusal {result['over_refusal']:.1%}{utility}{kept}, "
        f"worst jailbreak {worst[0]} {worst[1]['asr']:.0%}"
    )
