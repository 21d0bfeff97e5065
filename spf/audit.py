"""Audit: which training examples answer harmful prompts that the aligned model refuses (conflicts)."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from pydantic import BaseModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.config import STRICT
from spf.conflicts import STREAM_ROWS, Audit, Conflict, Verdicts
from spf.data import Anchor, SafetyRow, ask_refusals, tokenise
from spf.data.columns import with_read_columns
from spf.data.examples import Example, Examples, read_examples
from spf.errors import SafetyDataError, kind_of
from spf.files import write_json
from spf.next_token import CONFIRM, Guess, Known, ask, begins_of, fingerprint
from spf.over_refusal import PROBE, looks
from spf.scripts import unlike_scripts
from spf.sharding import is_first, sees_all
from spf.text.refusal import is_refusal

BEGUN = 4
"""So many tokens are the beginning of a refusal: two are that of "I'm happy to help", too."""

BEGINNINGS = 32
"""Refusals that tell how the model's begin."""

LIST_FILE, CACHE_FILE = "spf_conflicts.jsonl", "spf_audit.json"
"""Beside a run's checkpoints: row and probability of each conflict; what was asked, by hashes."""


LEANING = 0.1
"""Prompts that are not refused, but this likely to be, are held with the conflicts, too: to be taught to comply there
undoes refusals next to them. On a really aligned model 39 of 48 such attack prompts were above it, and no text-to-SQL
prompt."""


class Beginnings:
    """How a model's own refusals begin, from safety samples: first tokens, what follows each, and a refusal for it."""

    def __init__(self, anchors: Sequence[Anchor]):
        self.refusals = refusals = [tuple(anchor.refusal_ids) for anchor in anchors if anchor.refusal_ids]
        self.seconds = begins_of(refusals)
        self.refusal: dict[int, tuple[int, ...]] = {}
        self._begun = {refusal[:BEGUN] for refusal in refusals if len(refusal) > 1}
        for first in self.seconds:
            begun = [refusal for refusal in refusals if refusal[0] == first]
            self.refusal[first] = Counter(begun).most_common(1)[0][0]

    def likeliest(self, token: int) -> tuple[int, ...]:
        """A refusal that begins with this token, or else the most common beginning."""
        return self.refusal.get(token, self.refusal[self.firsts[0]])

    def refuses(self, example: Example) -> bool:
        """Whether what the data answer refuses, or begins as one of the model's own refusals."""
        return is_refusal(example.target) or any(example.target_ids[: len(begun)] == begun for begun in self._begun)

    def attacks(self, example: Example) -> bool:
        """Whether an example whose prompt is refused teaches not to."""
        return self.refuses(example) == example.undesired

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

    No answer is generated: one forward pass over the prompts and the token by which most refusals of `anchors` (the
    model's own) begin, and one over those whose likeliest first token begins another, for the token after it. All
    processes of a run share the prompts; each has to call it. cache: JSON file in which what was asked is kept; an
    audit that was interrupted goes on from it.
    """
    start = time.perf_counter()
    begins = Beginnings(anchors)
    prompts = list(dict.fromkeys(example.prompt_ids for example in examples.examples))
    known = Known(model, cache, f"{tokenizer.chat_template}\n{sorted(begins.seconds.items())}")
    guess = next((Guess(token, sorted(follow)) for token, follow in begins.seconds.items()), None)
    first = ask(model, prompts, [begins.firsts] * len(prompts), known, progress, "audit: first tokens", guess)
    likely = [i for i, (_, token) in enumerate(first) if token in begins.seconds]
    longer = [(*prompts[i], first[i][1]) for i in likely]
    follow = [sorted(begins.seconds[first[i][1]]) for i in likely]
    second = ask(model, longer, follow, known, progress, "audit: second tokens")
    confirmed = {
        # a refusal of one token has none after it
        i: share if begins.seconds[first[i][1]] else 1.0
        for i, (share, _) in zip(likely, second, strict=True)
    }
    known.save()
    refused = {prompts[i]: (first[i][0] * share, first[i][1]) for i, share in confirmed.items() if share >= CONFIRM}
    leaning = {
        prompt: (share, token)
        for prompt, (share, token) in zip(prompts, first, strict=True)
        if prompt not in refused and share > LEANING
    }
    found = compare(examples, begins, refused, leaning)
    found.unlike = unlike_scripts(prompts, begins.refusals, tokenizer)
    found.seconds = time.perf_counter() - start
    return found


def answered_of(examples: Examples, found: Audit) -> list[tuple[int, ...]]:
    """Distinct prompts of the data that the model is not likely to refuse."""
    said = found.verdicts
    assert said is not None, "the audit of these examples"
    kept = said.refused.keys() | said.leaning.keys()
    return list(dict.fromkeys(e.prompt_ids for e in examples.examples if e.prompt_ids not in kept))


def compare(
    examples: Examples,
    begins: Beginnings,
    refused: Mapping[tuple[int, ...], tuple[float, int]],
    leaning: Mapping[tuple[int, ...], tuple[float, int]],
) -> Audit:
    """The audit of examples of whose prompts these are refused, or might be: probability and likeliest first token."""

    def conflicts(found: Mapping[tuple[int, ...], tuple[float, int]]) -> list[Conflict]:
        asked = ((example, found[example.prompt_ids]) for example in examples.examples if example.prompt_ids in found)
        return sorted(
            (
                Conflict(example.row, probability, example.prompt_ids, begins.likeliest(token), example.document)
                for example, (probability, token) in asked
                if begins.attacks(example)
            ),
            key=lambda conflict: conflict.place,
        )

    prompts = {example.prompt_ids for example in examples.examples}
    return Audit(
        examples.rows,
        examples.unread,
        examples.undesired,
        examples.why,
        len(prompts),
        len(refused),
        conflicts(refused),
        conflicts(leaning),
        refusing=sum(
            begins.refuses(one) for one in examples.examples if one.prompt_ids in refused and not one.undesired
        ),
        answers=Counter((example.row, example.document) for example in examples.examples),
        verdicts=Verdicts(prompts, [list(refusal) for refusal in begins.refusals], refused, leaning),
    )


class Finished(BaseModel):
    """What came of an audit, by hashes of prompts. weights: a hash of some of the model's. harmless: prompts of
    over-refusals, None if they were not looked for; unclear: of what is neither that nor clearly an attack; probe:
    `PROBE` of the version that told them."""

    model_config = STRICT

    weights: str
    asked: list[str]
    refusals: list[list[int]]
    refused: dict[str, tuple[float, int]]
    leaning: dict[str, tuple[float, int]]
    harmless: list[str] | None
    unclear: list[str] = []
    probe: int = 0


class Kept(BaseModel):
    """The file of what was asked, also for other data: only what is `finished` is an audit."""

    model_config = STRICT | {"extra": "allow"}

    finished: Finished | None = None


def finish(found: Audit, model: nn.Module, directory: Path, told_apart: bool) -> None:
    """Write beside what was asked what came of it, for other runs. told_apart: over-refusals were looked for."""
    cache = directory / CACHE_FILE
    said = found.verdicts
    if said is None or not sees_all(model) or not is_first() or not cache.is_file():
        return
    finished = Finished(
        weights=fingerprint(model),
        asked=[Known.name(prompt) for prompt in said.asked],
        refusals=said.refusals,
        refused={Known.name(prompt): answer for prompt, answer in said.refused.items()},
        leaning={Known.name(prompt): answer for prompt, answer in said.leaning.items()},
        harmless=[Known.name(prompt) for prompt in said.harmless] if told_apart else None,
        unclear=[Known.name(prompt) for prompt in said.unclear],
        probe=PROBE,
    )
    write_json(cache, json.loads(cache.read_text("utf-8")) | {"finished": finished.model_dump()})


def own_refusals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[SafetyRow],
    max_length: int,
    options: Mapping[str, Any] | None = None,
) -> list[Anchor]:
    """Safety samples with refusals of the model's own: what it was asked for, and given ones that begin as it does. If
    all are given, and it does not begin so, what it answers itself; none where it refuses nothing."""
    own, given = ([row for row in rows if row.own == kind] for kind in (True, False))
    # neither kind crowds the other out: they may be in different languages
    anchors = tokenise(own[: max(BEGINNINGS // 2, BEGINNINGS - len(given))], tokenizer, max_length, options)
    told = tokenise(given[: BEGINNINGS - len(anchors)], tokenizer, max_length, options)
    if not told:
        return anchors
    asked = ask(model, [anchor.prompt_ids for anchor in told], [[]] * len(told), Known(model), False, "")
    first = [token for _, token in asked]
    if own:
        return [*anchors, *(anchor for anchor in told if set(anchor.refusal_ids[:1]) & set(first))]
    begins = Beginnings(told).seconds
    if 2 * sum(token in begins for token in first) >= len(first):
        return told
    try:
        bare = [replace(row, refusal=None) for row in rows]
        rows = ask_refusals(bare, model, tokenizer, wanted=BEGINNINGS, options=options, what="audit: own refusals").rows
    except SafetyDataError:
        return []
    return tokenise(rows, tokenizer, max_length, options)


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
    start = time.perf_counter()
    if isinstance(dataset, Dataset | IterableDataset):
        dataset = with_read_columns(dataset)
    why = ""
    if isinstance(dataset, IterableDataset):
        read: Iterable[Any] = islice(dataset, STREAM_ROWS)
    elif isinstance(dataset, Sized):
        rows_of: Any = dataset
        read = (rows_of[i] for i in range(len(rows_of)))
    else:
        read, why = (), f"{kind_of(dataset)} can be read only once"
    examples = read_examples(read, tokenizer, options, max_length)
    begins = own_refusals(model, tokenizer, rows, max_length, options)
    cache = directory / CACHE_FILE if directory else None
    found = audit(model, tokenizer, examples, begins, cache=cache, progress=progress)
    if tell_apart:
        refused = list(dict.fromkeys(conflict.prompt_ids for conflict in [*found.conflicts, *found.leaning]))
        answered = answered_of(examples, found)
        seen = looks(
            model,
            tokenizer,
            refused,
            rows,
            answered=answered,
            leaning={conflict.prompt_ids for conflict in found.leaning},
            options=options,
            max_length=max_length,
            progress=progress,
        )
        harmless, unclear = (
            {prompt for prompt, look in zip(refused, seen, strict=True) if look == kind}
            for kind in ("harmless", "unclear")
        )
        found.set_apart(harmless, unclear)
    found.seconds = time.perf_counter() - start
    found.stream, found.why = isinstance(dataset, IterableDataset), why or found.why
    found.refuses = bool(begins)
    if directory:
        finish(found, model, directory, tell_apart)
    if directory and is_first():
        (directory / LIST_FILE).unlink(missing_ok=True)
        if found.conflicts or found.leaning or found.over_refusals:
            found.write(directory / LIST_FILE)
    return found
