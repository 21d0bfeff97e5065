"""Audit: which training examples answer harmful prompts that the aligned model refuses (conflicts)."""

import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.data import Anchor, SafetyRow, ask_refusals, tokenise
from spf.data.examples import COLUMNS, Example, Examples, read_examples
from spf.errors import SafetyDataError
from spf.files import replace_file
from spf.next_token import Known, ask
from spf.over_refusal import clearly_harmless
from spf.sharding import is_first
from spf.text.refusal import is_refusal

CONFIRM = 0.2
"""A prompt is refused if the likeliest first token begins a refusal, and it goes on as one with this probability. A
token such as "I" begins other answers, too."""

STREAM_ROWS = 1000
"""As many rows of a stream are read ahead of training."""

BEGINNINGS = 32
"""Own refusals that tell how the model's refusals begin."""

MOST_HELD = 256
"""Conflicts that are held, spread over the data, if there are more: the directions are fewer than that."""

APART = 9
"""Of the conflicts, one of so many is watched, not held; at most `MOST_WATCHED`."""

MOST_WATCHED = 16

LIST_FILE, CACHE_FILE = "spf_conflicts.jsonl", "spf_audit.json"
"""Beside a run's checkpoints: row and probability of each conflict; what was asked, by hashes."""


LEANING = 0.1
"""Prompts that are not refused, but this likely to be, are held with the conflicts, too: to be taught to comply there
undoes refusals next to them. On a really aligned model 39 of 48 such attack prompts were above it, and no text-to-SQL
prompt."""


@dataclass(frozen=True)
class Conflict:
    """An example whose prompt the aligned model refuses and whose target does not.

    row: of the data set. probability: that the answer begins as a refusal. refusal_ids: the refusal of the model's own
    that begins so. prompt_ids: the prompt as tokens.
    """

    row: int
    probability: float
    prompt_ids: tuple[int, ...]
    refusal_ids: tuple[int, ...]

    def anchor(self) -> Anchor:
        """As a safety sample."""
        return Anchor(list(self.prompt_ids), list(self.refusal_ids), f"training row {self.row}")


@dataclass
class Audit:
    """What training data attack.

    rows, unread, why: as in `Examples`. prompts: distinct ones that were asked. refused: of these, by the aligned
    model. conflicts: one an example, in the order of the rows. leaning: the same of prompts that the model does not
    refuse, though it might (`LEANING`). seconds: that it took. stream: the data go on after
    these rows. refuses: the model refuses at least one of the safety prompts; else nothing can be found.
    """

    rows: int = 0
    unread: int = 0
    why: str = ""
    prompts: int = 0
    refused: int = 0
    conflicts: list[Conflict] = field(default_factory=list)
    leaning: list[Conflict] = field(default_factory=list)
    over_refusals: list[Conflict] = field(default_factory=list)
    seconds: float = 0.0
    stream: bool = False
    refuses: bool = True

    def split(self) -> tuple[list[Anchor], list[Anchor]]:
        """Those to hold, and those to watch instead, as safety samples."""
        anchors = spread(self.conflicts, MOST_HELD)
        watched = anchors[::APART][:MOST_WATCHED] if len(anchors) >= 2 * APART else []
        names = {id(anchor) for anchor in watched}
        held = [anchor for anchor in anchors if id(anchor) not in names]
        return held + spread(self.leaning, MOST_HELD - len(anchors)), watched

    def set_apart(self, harmless: Collection[tuple[int, ...]]) -> None:
        """Conflicts whose prompts (token ids) are `harmless` are over-refusals instead."""
        self.over_refusals = [conflict for conflict in self.conflicts if conflict.prompt_ids in harmless]
        self.conflicts = [conflict for conflict in self.conflicts if conflict.prompt_ids not in harmless]
        self.leaning = [conflict for conflict in self.leaning if conflict.prompt_ids not in harmless]

    @property
    def conflicting_rows(self) -> list[int]:
        """Rows of the data set with a conflict, in order, each once."""
        return rows_of(self.conflicts)

    @property
    def over_refused_rows(self) -> list[int]:
        """Rows of the data set with an over-refusal, in order, each once."""
        return rows_of(self.over_refusals)

    def without(self, dataset: Dataset) -> Dataset:
        """The data set that was audited, less the rows with a conflict."""
        left_out = set(self.conflicting_rows)
        return dataset.select([row for row in range(len(dataset)) if row not in left_out])

    @property
    def share(self) -> float:
        """Rows with a conflict, of those that could be read."""
        return len(self.conflicting_rows) / max(1, self.rows - self.unread)

    def counts(self) -> str:
        """What was found, in words."""
        rows = f"{self.rows - self.unread} training rows"
        asked = f"{self.prompts} distinct prompts asked, {self.refused} refused; {self.seconds:.0f} s"
        over = len(self.over_refused_rows)
        more = f", and {over} answer prompts that it refuses although they look harmless to it" if over else ""
        return f"{len(self.conflicting_rows)} of {rows} answer prompts that the model refuses{more} ({asked})"

    def write(self, path: Path) -> None:
        """A JSON line a conflict or over-refusal, without its text: row, probability, and which of the two."""
        records = [
            {"row": c.row, "probability": round(c.probability, 4), "over_refusal": over}
            for over, found in ((False, self.conflicts), (True, self.over_refusals))
            for c in found
        ]
        replace_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def rows_of(conflicts: Sequence[Conflict]) -> list[int]:
    """The rows of conflicts, in order, each once."""
    return sorted({conflict.row for conflict in conflicts})


def spread(conflicts: Sequence[Conflict], most: int) -> list[Anchor]:
    """Conflicts as safety samples, each prompt once, at most so many, spread over the data."""
    distinct = list({conflict.prompt_ids: conflict for conflict in conflicts}.values())
    step = max(1.0, len(distinct) / max(1, most))
    return [distinct[int(i * step)].anchor() for i in range(min(most, len(distinct)))]


class Beginnings:
    """How a model's own refusals begin, from safety samples: first tokens, what follows each, and a refusal for it."""

    def __init__(self, anchors: Sequence[Anchor]):
        refusals = [tuple(anchor.refusal_ids) for anchor in anchors if anchor.refusal_ids]
        self.seconds: dict[int, set[int]] = {}
        self.refusal: dict[int, tuple[int, ...]] = {}
        for first, _ in Counter(refusal[0] for refusal in refusals).most_common():
            begun = [refusal for refusal in refusals if refusal[0] == first]
            self.seconds[first] = {refusal[1] for refusal in begun if len(refusal) > 1}
            self.refusal[first] = Counter(begun).most_common(1)[0][0]

    def likeliest(self, token: int) -> tuple[int, ...]:
        """A refusal that begins with this token, or else the most common beginning."""
        return self.refusal.get(token, self.refusal[self.firsts[0]])

    def refuses(self, example: Example) -> bool:
        """Whether what the data answer refuses, or begins as the model's own refusals do."""
        first, second = (*example.target_ids[:2], -1, -1)[:2]
        return is_refusal(example.target) or second in self.seconds.get(first, ())

    @property
    def firsts(self) -> list[int]:
        """Tokens that begin a refusal, the most common first."""
        return list(self.seconds)


def audit(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    anchors: Sequence[Anchor],
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> Audit:
    """Ask the aligned model every distinct prompt of the training data, the prompt alone, for its first token.

    No answer is generated: one forward pass over the prompts, and one over those whose likeliest first token begins a
    refusal of `anchors` (the model's own), for the token after it. All processes of a run share the prompts; each has
    to call it. cache: JSON file in which what was asked is kept; an audit that was interrupted goes on from it.
    """
    start = time.perf_counter()
    begins = Beginnings(anchors)
    by_prompt: dict[tuple[int, ...], list[Example]] = {}
    for example in examples.examples:
        by_prompt.setdefault(example.prompt_ids, []).append(example)
    prompts = list(by_prompt)
    known = Known(model, cache, f"{tokenizer.chat_template}\n{sorted(begins.seconds.items())}")
    first = ask(model, prompts, [begins.firsts] * len(prompts), known, progress)
    likely = [i for i, (_, token) in enumerate(first) if token in begins.seconds]
    longer = [(*prompts[i], first[i][1]) for i in likely]
    second = ask(model, longer, [sorted(begins.seconds[first[i][1]]) for i in likely], known, progress)
    confirmed = {
        # a refusal of one token has none after it
        i: share if begins.seconds[first[i][1]] else 1.0
        for i, (share, _) in zip(likely, second, strict=True)
    }
    known.save()
    refused = {i: first[i][0] * share for i, share in confirmed.items() if share >= CONFIRM}
    leaning = {i: share for i, (share, _) in enumerate(first) if i not in refused and share > LEANING}

    def conflicts(found: dict[int, float]) -> list[Conflict]:
        return sorted(
            (
                Conflict(example.row, probability, prompts[i], begins.likeliest(first[i][1]))
                for i, probability in found.items()
                for example in by_prompt[prompts[i]]
                if not begins.refuses(example)
            ),
            key=lambda conflict: conflict.row,
        )

    return Audit(
        examples.rows,
        examples.unread,
        examples.why,
        len(prompts),
        len(refused),
        conflicts(refused),
        conflicts(leaning),
        seconds=time.perf_counter() - start,
    )


def own_refusals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[SafetyRow],
    max_length: int,
    options: Mapping[str, Any] | None = None,
) -> list[Anchor]:
    """Safety samples with refusals of the model's own: those of the rows, or, if the model does not begin as they do,
    what it answers itself; none where it refuses nothing."""
    own = [row for row in rows if row.own]
    anchors = tokenise((own or rows)[:BEGINNINGS], tokenizer, max_length, options)
    if not own:
        first = ask(
            model,
            [a.prompt_ids for a in anchors],
            [[]] * len(anchors),
            Known(model),
            False,
        )
        begins = Beginnings(anchors).seconds
        if 2 * sum(token in begins for _, token in first) < len(first):
            try:
                bare = [replace(row, refusal=None) for row in rows]
                rows = ask_refusals(bare, model, tokenizer, wanted=BEGINNINGS, options=options).rows
            except SafetyDataError:
                return []
            return tokenise(rows, tokenizer, max_length, options)
    return anchors


def audit_data(
    dataset: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[SafetyRow],
    *,
    max_length: int,
    options: Mapping[str, Any] | None = None,
    directory: Path | None = None,
    progress: bool = True,
    tell_apart: bool = True,
) -> Audit:
    """`audit` of a data set as a Trainer has it; of a stream its first rows.

    rows: safety samples, of which the model's own refusals tell how it refuses. directory: gets the list of conflicts
    and keeps what was asked. tell_apart: over-refusals are no conflicts.
    """
    stream = isinstance(dataset, IterableDataset)
    if isinstance(dataset, Dataset | IterableDataset):
        # images and sound would be decoded
        columns = [column for column in dataset.column_names or () if column in COLUMNS]
        dataset = dataset.select_columns(columns) if columns else dataset
    why = ""
    if stream:
        read: Iterable[Any] = islice(dataset, STREAM_ROWS)
    elif isinstance(dataset, Sized):
        rows_of: Any = dataset
        read = (rows_of[i] for i in range(len(rows_of)))
    else:
        read, why = (), f"a {type(dataset).__name__} can be read only once"
    examples = read_examples(read, tokenizer, options, max_length)
    begins = own_refusals(model, tokenizer, rows, max_length, options)
    cache = directory / CACHE_FILE if directory else None
    found = audit(model, tokenizer, examples, begins, cache=cache, progress=progress)
    if tell_apart:
        start = time.perf_counter()
        refused = list(dict.fromkeys(conflict.prompt_ids for conflict in [*found.conflicts, *found.leaning]))
        cleared = clearly_harmless(
            model, tokenizer, refused, rows, options=options, max_length=max_length, progress=progress
        )
        found.set_apart({prompt for prompt, harmless in zip(refused, cleared, strict=True) if harmless})
        found.seconds += time.perf_counter() - start
    found.stream, found.why = stream, why or found.why
    found.refuses = bool(begins)
    if directory and is_first():
        (directory / LIST_FILE).unlink(missing_ok=True)
        if found.conflicts or found.over_refusals:
            found.write(directory / LIST_FILE)
    return found


def anchor_entries(conflicts: Sequence[Anchor]) -> list[dict[str, Any]]:
    """Conflicts for a checkpoint: row, hash of the prompt and refusal, not the prompt."""
    return [
        {"row": int(a.where.split()[-1]), "prompt": Known.name(a.prompt_ids), "refusal": a.refusal_ids}
        for a in conflicts
    ]


def anchors_again(
    entries: Sequence[Mapping[str, Any]],
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None = None,
) -> list[Anchor]:
    """The conflicts of a checkpoint, from the training data; those that are not there any more are left out."""
    if isinstance(dataset, IterableDataset):
        rows = list(islice(dataset, STREAM_ROWS))
    else:
        rows = [dataset[i] for i in sorted({e["row"] for e in entries}) if i < len(dataset)]
    prompts = {Known.name(e.prompt_ids): e.prompt_ids for e in read_examples(rows, tokenizer, options).examples}
    return [
        Anchor(list(prompts[entry["prompt"]]), list(entry["refusal"]), f"training row {entry['row']}")
        for entry in entries
        if entry["prompt"] in prompts
    ]
