"""The grid: cells from a YAML file, run in parallel and resumably, one JSON file a cell."""

import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from rich.console import Console
from transformers.utils import logging as transformers_logging

from spf.arguments import BenchArguments, expanded
from spf.errors import RunFailedError, keeping, working
from spf.files import check_output_directory, directory_lock, write_json
from spf.lab.bench.cell import Cell, Split, Tuning, prepare, run_cell
from spf.lab.bench.methods import METHODS, Workspace, check_settings, refuse_text
from spf.lab.bench.report import write_bench_report
from spf.lab.bench.scenarios import SCENARIOS
from spf.progress import progress, tracked

GRID_KEYS = ("scenarios", "methods", "seeds", "tunings", "variants")


def read_grid(path: Path, model: str | None = None) -> list[Cell]:
    """The cells that a YAML file asks for, in its order, each once; `model` takes the place of the file's.

    Raises:
        ValueError: an unknown key, scenario, method, tuning or setting, a value that cannot be, or different cells
            that would share a file; the message names it and the grid.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such benchmark config")
    try:
        config = expanded(yaml.safe_load(path.read_text("utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not a YAML file ({error})") from error
    if not isinstance(config, dict) or set(config) != {"model", "grids"} or not isinstance(config["grids"], list):
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


def _cells(grid: Any, model: str, where: str) -> list[Cell]:
    if not isinstance(grid, dict):
        raise ValueError(f"{where}: must be keys and values, not {grid!r}")
    grid = {"tunings": ["lora"], **grid}
    known = {"scenarios": ("none", *SCENARIOS), "methods": ("aligned", *METHODS), "tunings": get_args(Tuning)}
    for key in ("seeds", *known):
        if not isinstance(grid.get(key), list) or not grid[key]:
            raise ValueError(f"{where}: `{key}` must be a list, not {grid.get(key)!r}")
    for key, names in known.items():
        for name in grid[key]:
            if name not in names:
                raise ValueError(f"{where}: unknown {key.removesuffix('s')} {name}; there are {', '.join(names)}")
    for seed in grid["seeds"]:
        if type(seed) is not int:
            raise ValueError(f"{where}: a seed is a whole number, not {seed!r}")
    variants = grid.get("variants") or {"default": {}}
    if not isinstance(variants, dict) or not all(isinstance(changes, dict) for changes in variants.values()):
        raise ValueError(f"{where}: `variants` must give settings by name, not {variants!r}")
    shared = {key: value for key, value in grid.items() if key not in GRID_KEYS}
    settings = {f.name for f in fields(Cell)} - {"scenario", "method", "seed", "model", "tuning", "variant"}
    for name in [*shared, *(key for changes in variants.values() for key in changes)]:
        if name not in settings:
            raise ValueError(f"{where}: unknown setting {name}; there are {', '.join(sorted(settings))}")
    cells = [
        Cell(scenario, method, seed, model, tuning, variant, **{**shared, **changes})
        for seed in grid["seeds"]
        for scenario in grid["scenarios"]
        for method in grid["methods"]
        for tuning in grid["tunings"]
        for variant, changes in variants.items()
    ]
    for cell in cells:
        try:
            _check(cell)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return cells


def _check(cell: Cell) -> None:
    if (cell.scenario == "none") != (cell.method == "aligned"):
        raise ValueError(
            f"scenario {cell.scenario} with method {cell.method}; none and aligned go together, and with nothing else"
        )
    if cell.split not in get_args(Split):
        raise ValueError(f"split must be {' or '.join(get_args(Split))}, not {cell.split}")
    refuse_text("learning_rate", cell.learning_rate)
    if type(cell.learning_rate) not in (int, float) or not cell.learning_rate > 0:
        raise ValueError(f"learning_rate must be a positive number, not {cell.learning_rate!r}")
    refuse_text("adam_beta1", cell.adam_beta1)
    if type(cell.adam_beta1) not in (int, float) or not 0 <= cell.adam_beta1 < 1:
        raise ValueError(f"adam_beta1 must be at least 0 and below 1, not {cell.adam_beta1!r}")
    # DPO answers every prompt twice
    for name, least in (("batch_size", 2 if cell.scenario == "dpo" else 1), ("curve_steps", 0)):
        value = getattr(cell, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if not isinstance(cell.rule, dict):
        raise ValueError(f"rule must give settings by name, not {cell.rule!r}")
    check_settings(cell.method, cell.rule)


def run_grid(args: BenchArguments, console: Console | None = None) -> int:
    """Run the cells that are not done, write the report; returns how many failed.

    A cell is done if its file holds the same settings. An interrupted grid goes on where it stopped.
    """
    cells = read_grid(Path(args.config), args.model)
    output = Path(args.output)
    check_output_directory(Path(args.work))

    def kept() -> str:
        return f"{sum(_done(cell, output) for cell in cells)} of {len(cells)} cells are finished and kept in {output}"

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
    output = Path(args.output)
    pending = [cell for cell in cells if not _done(cell, output)]
    console.print(f"{len(cells)} cells, {len(cells) - len(pending)} of them done.", highlight=False)
    failed = 0
    if pending and not args.report_only:
        models = dict.fromkeys(cell.model for cell in pending)
        workspaces = {name: prepare(name, Path(args.work)) for name in tracked(models, "models")}
        with working():
            failed = _run_cells(pending, workspaces, args.workers, output, console)
    with working():
        for place in write_bench_report(output):
            console.print(str(place), highlight=False, soft_wrap=True)
    return failed


def _run_cells(
    pending: list[Cell], workspaces: dict[str, Workspace], workers: int, output: Path, console: Console
) -> int:
    """How many failed; the results of the others are written as they come."""
    context = multiprocessing.get_context("forkserver")
    # every cell starts from a fresh fork that has imported everything, so its peak memory is its own
    context.set_forkserver_preload(["spf.lab.bench.cell"])
    threads = max(1, (os.cpu_count() or 1) // workers)
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
                    write_json(cell.path(output), result)
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


def _done(cell: Cell, output: Path) -> bool:
    path = cell.path(output)
    if not path.is_file():
        return False
    # a cell from before a setting could be chosen has its default; along the way more or less may have been measured
    kept = asdict(Cell(cell.scenario, cell.method)) | json.loads(path.read_text("utf-8"))["config"]
    return bool(kept | {"curve_steps": cell.curve_steps} == asdict(cell))


def _line(result: dict[str, Any]) -> str:
    utility = "" if result["utility"] is None else f", utility {result['utility']:.3f}"
    worst = max(result["jailbreak_asr"].items(), key=lambda item: item[1]["asr"], default=("", {"asr": 0.0}))
    variant = "" if result["variant"] == "default" else f"@{result['variant']}"
    return (
        f"{result['tuning']} {result['scenario']} {result['method']}{variant} seed {result['seed']}: "
        f"ASR {result['asr']:.1%}, over-refusal {result['over_refusal']:.1%}{utility}, "
        f"worst jailbreak {worst[0]} {worst[1]['asr']:.0%}"
    )
