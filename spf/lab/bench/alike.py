"""What cells must share for their figures to be compared: training settings, judge, number format, weights, prompts."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from spf.lab.bench.cell import Cell, weights_of

SETTINGS = ("steps", "learning_rate", "lora_rank", "batch_size", "adam_beta1")
"""Of a cell's configuration what is no choice of the method's."""

_DEFAULTS = asdict(Cell("none", "aligned"))

FIRST_JUDGE = "prefix-1"
"""Of cells from before judges had versions."""

_OF_ITS_OWN = {"scenario", "method", "seed", "model", "tuning", "variant", "curve_steps", "jailbreaks", "forgetting"}
"""Of a cell's configuration what its path says, and what more is measured."""

Unlike = dict[str, tuple[Any, Any]]
"""In what cells differ from others, and both values."""


def made_from(model: str, prompts: Path | None) -> dict[str, str | None]:
    """Hashes of a model directory's weights and of the file of prompts; None for what is no directory, and no file."""
    weights = [Path(model) / name for name in weights_of(model)]
    return {"weights": _digest(weights), "prompts": _digest([prompts] if prompts else [])}


def _digest(paths: Iterable[Path]) -> str | None:
    # of what the files hold, not of their times: a copied model is the same model
    found = []
    for path in paths:
        with path.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").digest())
    return hashlib.sha256(b"".join(found)).hexdigest()[:12] if found else None


def unlike(pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], settings: Iterable[str] = SETTINGS) -> Unlike:
    """In what the first cells differ from the second ones, as far as both are known; rules may differ."""
    found: Unlike = {}
    for cell, other in pairs:
        found = _differences(cell, other, (*settings, "judge", "dtype", "weights", "prompts")) | found
    return found


def seeds_unlike(cells: Iterable[Mapping[str, Any]]) -> Unlike:
    """In what cells of one group differ but for the seed, and what is measured besides (jailbreaks, a curve)."""
    found: Unlike = {}
    for cell, other in combinations(cells, 2):
        found = _differences(cell, other, sorted(_known(cell).keys() - _OF_ITS_OWN)) | found
    return found


def _differences(cell: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str]) -> Unlike:
    ours, theirs = _known(cell), _known(other)
    if ours["steps"] != theirs["steps"]:  # as many as the scenario has may be asked for by their number, too
        ours["steps"], theirs["steps"] = (c.get("steps") or s["steps"] for c, s in ((cell, ours), (other, theirs)))
    both = {name: (ours.get(name), theirs.get(name)) for name in names}
    return {
        name: (one, another) for name, (one, another) in both.items() if None not in (one, another) and one != another
    }


def settings_of(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The `SETTINGS` of a cell as they were given; from before a setting was one it has its default."""
    config = {**_DEFAULTS, **cell["config"]}
    return {name: config[name] for name in SETTINGS}


def _known(cell: Mapping[str, Any]) -> dict[str, Any]:
    more = {"judge": cell.get("judge", FIRST_JUDGE), "dtype": cell.get("dtype"), "weights": None, "prompts": None}
    return _DEFAULTS | cell["config"] | more | (cell.get("made_from") or {})
