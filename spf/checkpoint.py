"""What a checkpoint holds of a run: counters, refusals by hash of their prompts, and where the run's bases are."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import MinLen
from pydantic import BaseModel, Field
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from spf.config import STRICT, Conflicts, File, NotNegative, Positive, Share, Whole, read_json
from spf.data import SafetyDataError, SafetyRow
from spf.files import read_tensors, write_json
from spf.sharding import object_of_rank_0
from spf.subspace import SafetySubspace

STATE_FILE = "spf_state.json"
TRAINER_FILE = "trainer_state.json"
"""The Trainer writes it last, when a checkpoint is whole."""

SUBSPACE_FILE = "spf_subspace-{hash}.safetensors"
"""The bases of a run, beside its checkpoints: they seldom change, and are written when they do."""

FORMAT = 4

EARLIER = "go on from an earlier checkpoint"
DAMAGED = f"damaged, or written by another version of spf; {EARLIER}"


PromptHash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
"""`Known.name` of a prompt."""


class _Monitor(File):
    loss: NotNegative
    refused: Share
    conflicts_refused: Share
    answered: list[PromptHash] = Field(default_factory=list)
    further: list[PromptHash] = Field(default_factory=list)


class _Growth(File):
    pool: list[PromptHash]
    rounds: Whole
    place: Whole
    flips: Whole
    pressed: bool


class _Correction(BaseModel):
    """Of the rule, which may keep more."""

    model_config = STRICT | {"extra": "allow"}

    multiplier: NotNegative
    lr_scale: Positive
    acted: dict[str, Whole] = {}
    feedback: "_Correction | None" = None
    growth: _Growth | None = None


class _Conflict(File):
    """A conflict of the training data that is held or watched."""

    row: Whole
    prompt: PromptHash
    refusal: Annotated[list[Whole], MinLen(1)]


class LeftOut(File):
    """What was done about conflicts, and which rows of the training data, of so many, were not trained on.

    places: each row with the document of it, if it is packed, else 0. content: a hash of these rows; nothing where
    there are none. data: a hash of all rows, where other data would have to be audited.
    """

    conflicts: Conflicts
    places: list[tuple[Whole, Whole]]
    of: Whole
    content: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
    data: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""


class _Kept(File):
    """What `keep` named: a hash of it."""

    prompts: Annotated[str, Field(pattern="^[0-9a-f]{24}$")] | None


class _State(File):
    rule: str
    steps: Whole
    skipped: Whole
    corrected: Whole
    position: Whole
    monitor: _Monitor
    correction: _Correction
    reference_nll: list[tuple[float, float]]
    held: list[_Conflict]
    watched: list[_Conflict]
    kept: _Kept
    left_out: LeftOut


class _Sample(File):
    prompt: Annotated[str, Field(pattern="^[0-9a-f]{24}$")]
    refusal: str | None
    cut: bool


class _Bases(File):
    file: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _File(File):
    """STATE_FILE."""

    format: Literal[4]
    state: _State
    samples: Annotated[list[_Sample], MinLen(1)]
    subspace: _Bases | None


@dataclass
class Saved:
    """What was read from a checkpoint or written: the attachment's state, the safety samples' entries, and the bases.

    bases: name and sha256 of the file, None for rules that hold nothing. run: the directory it is in. directions: how
    many the file's bases have in all.
    """

    state: dict[str, Any]
    entries: list[dict[str, Any]]
    bases: dict[str, str] | None = None
    run: Path | None = None
    directions: int = 0
    subspace: SafetySubspace | None = field(default=None, repr=False)

    def rows(self, data: Sequence[SafetyRow]) -> list[SafetyRow]:
        """The safety samples of the run, from the safety data.

        Raises:
            SafetyDataError: a sample of the run is not in the data any more.
        """
        known = {_hash(row): row for row in data}
        rows = []
        for entry in self.entries:
            if entry["prompt"] not in known:
                raise SafetyDataError(
                    "the safety data are not those that the checkpoint was made with: a prompt is missing; give "
                    "the same "
                    "safety_data, or start a new run"
                )
            row = known[entry["prompt"]]
            rows.append(
                row if row.refusal is not None else replace(row, refusal=entry["refusal"], cut=entry["cut"], own=True)
            )
        return rows


def write_checkpoint(
    directory: Path, state: dict[str, Any], rows: Sequence[SafetyRow], subspace: SafetySubspace, before: Saved | None
) -> Saved:
    """Write the state into a checkpoint's directory, and the bases beside it unless they are there as they are.

    No prompt and no path is written: a sample is named by the hash of its prompt, and the model's own refusal goes
    with it.
    """
    entries = [
        {"prompt": _hash(replace(row, refusal=None)), "refusal": row.refusal, "cut": row.cut}
        if row.own
        else {"prompt": _hash(row), "refusal": None, "cut": row.cut}
        for row in rows
    ]
    bases, run = (before.bases, before.run) if before else (None, None)
    grown = before is not None and before.directions != subspace.directions
    if subspace.right and (bases is None or run != directory.parent or grown):
        bases, run = write_bases(directory.parent, subspace), directory.parent
    write_json(directory / STATE_FILE, {"format": FORMAT, "state": state, "samples": entries, "subspace": bases})
    return Saved(state, entries, bases, run, subspace.directions)


def read_checkpoint(directory: Path) -> Saved:
    """Read what `write_checkpoint` wrote.

    Raises:
        FileNotFoundError: the state or the bases are missing.
        ValueError: a file is damaged, or the bases are not those of the checkpoint.
    """
    refuse_unwritten(directory)
    path = directory / STATE_FILE
    content = read_json(_File, path, DAMAGED).model_dump(exclude_unset=True)
    saved = Saved(content["state"], content["samples"], content["subspace"], directory.parent)
    if saved.bases is not None:
        name, wanted = saved.bases["file"], saved.bases["sha256"]
        places = [place for place in (directory.parent / name, directory / name) if place.is_file()]
        if not places:
            raise FileNotFoundError(
                f"{directory.parent / name} is missing: the run's safety subspace is kept once, beside its "
                f"checkpoints; "
                "copy it there from the directory of the run"
            )
        if _sha256(places[0]) != wanted:
            raise ValueError(
                f"{places[0]}: not the safety subspace that the checkpoint was made with, or damaged; copy it anew"
            )
        saved.subspace, saved.run = SafetySubspace.load(places[0]), places[0].parent
        saved.directions = saved.subspace.directions
    return saved


def refuse_unwritten(directory: Path) -> None:
    """
    Raises:
        FileNotFoundError: a checkpoint has no state of the callback's, which is written after the model.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so the run cannot go on: the checkpoint was made without SafetyCallback, or the run "
            f"was ended while it was written; {EARLIER}. "
            "A checkpoint outside output_dir has to be named in TrainingArguments(resume_from_checkpoint=...)"
        )


def read_left_out(directory: Path | None) -> LeftOut | None:
    """The rows that a checkpoint's run left out, as rank 0 reads it; None where there is no checkpoint. All processes
    call it.

    Raises:
        FileNotFoundError, ValueError: the file is missing, or damaged.
    """
    found = None
    if directory is not None and directory.is_dir():  # of one that is not there transformers tells
        refuse_unwritten(directory)
        if not (directory / TRAINER_FILE).is_file():
            raise FileNotFoundError(
                f"{directory / TRAINER_FILE} is missing: the run was ended while the checkpoint was written; {EARLIER}"
            )
        found = read_json(_File, directory / STATE_FILE, DAMAGED).state.left_out
    return object_of_rank_0(found)


def checkpoint_directory(run: Path, state: TrainerState) -> Path:
    """Where the Trainer has just written a checkpoint of a run."""
    return run / f"checkpoint-{state.global_step}"


def best_directions(args: TrainingArguments, state: TrainerState) -> dict[str, int]:
    """In how many directions each matrix was held in the checkpoint whose weights the Trainer has loaded at the end of
    training (`load_best_model_at_end`); nothing if it has loaded none."""
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    if best is None or not (Path(best) / STATE_FILE).is_file():
        return {}
    held = read_checkpoint(Path(best)).subspace or SafetySubspace()
    return {name: V.shape[1] for name, V in held.right.items()}


def named_checkpoint(args: TrainingArguments, given: str | bool | None) -> Path | None:
    """The checkpoint that `train` was given, by its name or as the last of the run."""
    last = get_last_checkpoint(str(args.output_dir)) if given is True else given
    return Path(last) if isinstance(last, str) else None


def resumed_from(args: TrainingArguments, state: TrainerState, given: str | bool | None) -> Path:
    """The checkpoint that a run goes on from: what `train` was given, else what fits the state."""
    if (checkpoint := named_checkpoint(args, given)) is not None:
        return checkpoint
    # the callback was added after the trainer was made, so what `train` was given is not known
    own, named = checkpoint_directory(Path(str(args.output_dir)), state), args.resume_from_checkpoint
    candidates = [own, *([Path(named)] if isinstance(named, str) else [])]
    for candidate in candidates:
        file = candidate / TRAINER_FILE
        if file.exists() and read_json(dict[str, Any], file, EARLIER).get("global_step") == state.global_step:
            return candidate
    return own


def write_bases(run: Path, subspace: SafetySubspace) -> dict[str, str]:
    """Write SUBSPACE_FILE into a directory, unless there is one that holds the same; its name and sha256."""
    run.mkdir(parents=True, exist_ok=True)
    there = list(run.glob(SUBSPACE_FILE.format(hash="*")))
    # under a name of its own: another run in the directory may write at the same time
    with tempfile.TemporaryDirectory(dir=run, prefix=".spf_") as own:
        unnamed = Path(own) / "subspace"
        subspace.save(unnamed)
        path = next((path for path in there if _hold_the_same(path, unnamed)), None)
        if path is not None:
            os.utime(path)  # where adapters cannot be compared, the newest is taken
            return {"file": path.name, "sha256": _sha256(path)}
        digest = _sha256(unnamed)
        path = run / SUBSPACE_FILE.format(hash=digest[:12])
        unnamed.replace(path)
    return {"file": path.name, "sha256": digest}


def _hold_the_same(one: Path, other: Path) -> bool:
    """Whether two files do; the entries of their headers come in any order."""
    try:
        if one.stat().st_size != other.stat().st_size:
            return False
        (tensors, header), (others, about) = (read_tensors(path, "a safety subspace", EARLIER) for path in (one, other))
    except (OSError, ValueError):
        return False  # removed meanwhile, or damaged
    return (
        header == about and tensors.keys() == others.keys() and all(torch.equal(tensors[n], others[n]) for n in tensors)
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(row: SafetyRow) -> str:
    content = json.dumps([row.messages, row.refusal], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:24]
