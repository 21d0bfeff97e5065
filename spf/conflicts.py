"""Conflicts that an audit found: their rows, and which of them are held, watched or left out."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from spf.data import Anchor
from spf.data.examples import read_examples
from spf.files import replace_file
from spf.leaving_out import Place, name_of, rows_in
from spf.next_token import Known

STREAM_ROWS = 1000
"""As many rows of a stream are read ahead of training."""

MOST_HELD = 256
"""Conflicts that are held, spread over the data, if there are more: the directions are fewer than that."""

TASK_REFUSED = 0.1
TASK_ROWS = 8
"""From this share, and this number, of over-refusals on the model refuses much of the task itself."""

APART = 9
"""Of the conflicts, one of so many is watched, not held; at most `MOST_WATCHED`."""

MOST_WATCHED = 16


REFUSES_NONE = "the model refuses none of the safety prompts, so conflicts with the data cannot be found"
REFUSES_NONE_REMEDY = "look at its answers (`spf eval`): is it aligned, and is the chat template its own?"

TAKE_OUT = (
    "first take what is harmful out of the data (`spf audit DATA --model MODEL --show` prints them all), then say "
    "conflicts='allow'"
)
"""Where what is left out is the user's task: `allow` trains on attacks among it, too."""

TOLD_BY = (
    "refusals are told by how those to the safety prompts begin, in their languages; for another language give safety "
    "prompts in it, with refusals as the model writes them"
)


@dataclass(frozen=True)
class Conflict:
    """An example whose prompt the aligned model refuses and whose target does not.

    row: of the data set; document: of a packed row. probability: that the answer begins as a refusal.
    refusal_ids: the refusal of the model's own that begins so. prompt_ids: the prompt as tokens. unclear: much of what
    the model refuses in these data is a harmless task, and this is like it as a whole, though some of it looks harmful.
    """

    row: int
    probability: float
    prompt_ids: tuple[int, ...]
    refusal_ids: tuple[int, ...]
    document: int = 0
    unclear: bool = False

    @property
    def place(self) -> Place:
        return self.row, self.document

    def anchor(self) -> Anchor:
        """As a safety sample."""
        return Anchor(list(self.prompt_ids), list(self.refusal_ids), f"training row {self.row}")


@dataclass
class Verdicts:
    """What the model says to the prompts (token ids) that were `asked`: how its refusals begin, and which it refuses,
    or might, each with the probability of a refusal and the likeliest first token; what looks `harmless`, `unclear`."""

    asked: Collection[tuple[int, ...]]
    refusals: list[list[int]]
    refused: Mapping[tuple[int, ...], tuple[float, int]]
    leaning: Mapping[tuple[int, ...], tuple[float, int]]
    harmless: Collection[tuple[int, ...]] = ()
    unclear: Collection[tuple[int, ...]] = ()


@dataclass
class Audit:
    """What training data attack.

    rows, unread, undesired, why: as in `Examples`. prompts: distinct ones that were asked. refused: of these, by the
    aligned model. conflicts: one an example, in the order of the rows. leaning: the same of prompts that the model does
    not refuse, though it might (`LEANING`). seconds: that it took. stream: these rows are what one pass gives first.
    refuses: the model refuses at least one of the safety prompts; else nothing can be found.
    refusing: so many answers to refused prompts begin as refusals do.
    answers: how many answers each row, or document of a packed one, teaches, of those that could be read. unlike: how
    many prompts are in a script that no refusal has by which others are told. new: no run has begun with it.
    source: the directory of the earlier audit that it was taken from, if any; other_weights: which asked a model with
    other weights.
    """

    rows: int = 0
    unread: int = 0
    undesired: int = 0
    why: str = ""
    prompts: int = 0
    refused: int = 0
    conflicts: list[Conflict] = field(default_factory=list)
    leaning: list[Conflict] = field(default_factory=list)
    over_refusals: list[Conflict] = field(default_factory=list)
    seconds: float = 0.0
    stream: bool = False
    refuses: bool = True
    refusing: int = 0
    answers: Counter[Place] = field(default_factory=Counter, repr=False)
    unlike: Counter[str] = field(default_factory=Counter)
    new: bool = True
    verdicts: Verdicts | None = field(default=None, repr=False)
    source: str = ""
    other_weights: bool = False

    def split(self, left_out: Collection[Place] = ()) -> tuple[list[Anchor], list[Anchor]]:
        """Those to hold, and those to watch instead, as safety samples.

        What is unclear and left out of training is neither: if it is of the task, holding it keeps the task from
        being learned, and if it is an attack, it is not trained on.
        """
        neither = set(self.unclear(left_out))
        conflicts, leaning = ([c for c in kind if c.place not in neither] for kind in (self.conflicts, self.leaning))
        anchors = spread(conflicts, MOST_HELD)
        watched = anchors[::APART][:MOST_WATCHED] if len(anchors) >= 2 * APART else []
        names = {id(anchor) for anchor in watched}
        held = [anchor for anchor in anchors if id(anchor) not in names]
        return held + spread(leaning, MOST_HELD - len(anchors)), watched

    def unclear(self, left_out: Collection[Place]) -> list[Place]:
        """Of the places that are left out, those with nothing but unclear prompts."""
        clear = {c.place for c in [*self.conflicts, *self.leaning] if not c.unclear}
        return [place for place in left_out if place not in clear]

    def set_apart(self, harmless: Collection[tuple[int, ...]], unclear: Collection[tuple[int, ...]] = ()) -> None:
        """Conflicts whose prompts (token ids) are `harmless` are over-refusals instead; some others are `unclear`."""
        if self.verdicts is not None:
            self.verdicts.harmless, self.verdicts.unclear = harmless, unclear
        self.over_refusals = [conflict for conflict in self.conflicts if conflict.prompt_ids in harmless]
        self.conflicts, self.leaning = (
            [replace(c, unclear=c.prompt_ids in unclear) for c in kind if c.prompt_ids not in harmless]
            for kind in (self.conflicts, self.leaning)
        )

    @property
    def conflicting_rows(self) -> list[int]:
        """Rows of the data set with a conflict, in order, each once."""
        return rows_of(self.conflicts)

    @property
    def over_refused_rows(self) -> list[int]:
        """Rows of the data set with an over-refusal, in order, each once."""
        return rows_of(self.over_refusals)

    @property
    def pressing(self) -> list[Place]:
        """Rows, or documents of packed ones, whose prompts the model refuses or might, and that do not refuse, in
        order, each once."""
        return sorted({conflict.place for conflict in [*self.conflicts, *self.leaning]})

    @property
    def futile(self) -> list[Place]:
        """Of these, what teaches nothing else: where its prompts are held, nothing is learned from it."""
        pressing = Counter(conflict.place for conflict in [*self.conflicts, *self.leaning])
        return sorted(place for place, count in pressing.items() if count == self.answers[place])

    @property
    def share(self) -> float:
        """Rows, or examples of packed ones, with a conflict, of those that could be read."""
        found = distinct(self.conflicts)
        # of a row that could not be read some answers may be
        return found / max(1, len(self.answers) if self.packed else self.rows - self.unread, found)

    @property
    def near_task(self) -> bool:
        """Whether the model refuses much of the task itself, although it looks harmless to it."""
        return distinct(self.over_refusals) >= max(TASK_REFUSED * len(self.answers), TASK_ROWS)

    @property
    def packed(self) -> bool:
        """Whether several examples are in a row."""
        return any(document for _, document in self.answers)

    @property
    def unit(self) -> str:
        """What is counted, in words."""
        return name_of(self.answers)

    def counts(self) -> str:
        """What was found, in words."""
        # of packed rows the examples, which are the rows that were given
        whole = (
            f"{len(self.answers)} examples in {self.rows} packed"
            if self.packed
            else f"{self.rows - self.unread} training"
        )
        how = f"as the audit in {self.source} found" if self.source else f"{self.seconds:.0f} s"
        asked = f"{self.prompts} distinct prompts asked, {self.refused} refused as the safety prompts are; {how}"
        over = distinct(self.over_refusals)
        more = f", and {over} answer prompts that it refuses although they look harmless to it" if over else ""
        return f"{distinct(self.conflicts)} of {whole} rows answer prompts that the model refuses{more} ({asked})"

    def other_scripts(self) -> str:
        """What is in another script than the refusals by which others are told, in words."""
        count = self.unlike.total()
        return (
            f"{count} of {self.prompts} prompts {'is' if count == 1 else 'are'} in another script "
            f"({', '.join(self.unlike)}) than the refusals by which others are told, so that the model refuses them "
            "may not be seen: give safety prompts in it, with refusals as the model writes them"
        )

    def labelled(self) -> str:
        """How the column `label` was read where it is KTO's, in words."""
        return (
            f"{self.undesired} rows are undesirable by their column label, as KTO reads it: of these, refusals are the "
            "conflicts; if it is another label, leave the column out"
        )

    def write(self, path: Path) -> None:
        """A JSON line each without its text: row, which document of a packed one, a hash of the prompt (the same in the
        list of the same data in another form), probability, refused or only leaning to it, over-refusal, unclear."""
        kinds = ((True, False, self.conflicts), (False, False, self.leaning), (True, True, self.over_refusals))
        records = [
            {
                "row": c.row,
                "document": c.document,
                "prompt": Known.name(c.prompt_ids),
                "probability": round(c.probability, 4),
                "refused": refused,
                "over_refusal": over,
                "unclear": c.unclear,
            }
            for refused, over, found in kinds
            for c in found
        ]
        replace_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def rows_of(conflicts: Sequence[Conflict]) -> list[int]:
    """The rows of conflicts, in order, each once."""
    return rows_in(conflict.place for conflict in conflicts)


def distinct(conflicts: Sequence[Conflict]) -> int:
    """How many rows, or documents of packed ones, these are in."""
    return len({conflict.place for conflict in conflicts})


def spread(conflicts: Sequence[Conflict], most: int) -> list[Anchor]:
    """Conflicts as safety samples, each prompt once, at most so many, spread over the data."""
    distinct = list({conflict.prompt_ids: conflict for conflict in conflicts}.values())
    step = max(1.0, len(distinct) / max(1, most))
    return [distinct[int(i * step)].anchor() for i in range(min(most, len(distinct)))]


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
