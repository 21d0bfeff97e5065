"""Tests of the summary task."""

import re
from collections import Counter
from typing import Literal

import pytest

from spf.lab.demo import summary
from spf.lab.demo.summary import SummaryExample, make_summary_examples

KINDS = {"Delivery", "Appointment", "Match", "Weather", "Lost item", "Table", "Repair", "Shift"}
DAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"


@pytest.fixture(scope="module")
def train() -> list[SummaryExample]:
    return make_summary_examples(400, 0, "train")


@pytest.fixture(scope="module")
def evaluation() -> list[SummaryExample]:
    return make_summary_examples(200, 0, "eval")


def facts(summary: str) -> list[str]:
    """Names, numbers, times and days of a summary, in order."""
    return re.findall(rf"{DAY}|\d+[:-]\d+|\d+|[A-Z][a-z]+", summary.partition(": ")[2])


def test_summaries_follow_the_house_style(train: list[SummaryExample], evaluation: list[SummaryExample]) -> None:
    for example in train + evaluation:
        label, colon, sentence = example.summary.partition(": ")
        assert label in KINDS
        assert colon
        assert re.fullmatch(rf"[A-Z][^.!?\n]* on {DAY} [^.!?\n]*[a-zA-Z0-9]\.", sentence)
        assert len(re.findall(DAY, sentence)) == 1
        assert not re.search(r"[{}]|  ", example.prompt + example.summary)


def test_every_fact_of_a_summary_is_in_its_note(train: list[SummaryExample]) -> None:
    for example in train:
        for fact in facts(example.summary):
            assert re.search(rf"\b{fact}\b", example.prompt), (fact, example)


def test_summaries_leave_out_what_does_not_count(train: list[SummaryExample]) -> None:
    changed = [e for e in train if len(set(re.findall(DAY, e.prompt))) > 1]
    assert len(changed) > 40
    for example in train:
        assert not re.search(r"\b555\b|\b[A-H]\d{3}\b", example.summary)
    assert any(re.search(r"\b555 \d{4}\b", e.prompt) for e in train)


def test_a_corrected_plan_differs_from_the_first() -> None:
    examples = make_summary_examples(1000, 3, "train")
    corrected = [re.search(r"on (\w+), no, (\w+)\.", e.prompt) for e in examples]
    corrected += [re.search(r"At ([\d:]+)\?\nDesk: No, at ([\d:]+),", e.prompt) for e in examples]
    pairs = [found.groups() for found in corrected if found]
    assert len(pairs) > 40
    assert all(first != second for first, second in pairs)


def test_prompts_are_short_and_state_the_task(train: list[SummaryExample]) -> None:
    for example in train:
        note, _, task = example.prompt.rpartition("\n")
        assert task == "Summarise this in one sentence."
        assert 12 <= len(note.split()) <= 50
        assert len(example.summary.split()) <= 18


def test_variety(train: list[SummaryExample]) -> None:
    counts = Counter(example.summary.partition(":")[0] for example in train)
    assert set(counts) == KINDS
    assert min(counts.values()) > 25
    threads = sum(bool(re.match(r"[A-Z][a-z]+: ", example.prompt)) for example in train)
    assert 0.4 < threads / len(train) < 0.6


def test_splits_are_disjoint_across_seeds(train: list[SummaryExample], evaluation: list[SummaryExample]) -> None:
    more_train = [e for seed in range(1, 6) for e in make_summary_examples(1000, seed, "train")]
    more_eval = [e for seed in range(1, 6) for e in make_summary_examples(1000, seed, "eval")]
    seen = {e.summary for e in train + more_train}
    assert not seen & {e.summary for e in evaluation + more_eval}
    assert not {e.prompt for e in train + more_train} & {e.prompt for e in evaluation + more_eval}
    assert len({e.summary for e in train}) == len(train)
    assert len({e.prompt for e in train}) == len(train)


def test_every_set_of_facts_comes_once_then_the_space_is_exhausted(monkeypatch: pytest.MonkeyPatch) -> None:
    who = {"who": (("Name",), tuple(sorted(summary._FIRST)))}
    kind = summary._Kind("Greeting", who, "{who} says hello.", ("{who}: Hello.",), ("Note",))
    monkeypatch.setattr(summary, "_KINDS", (kind,))
    everything = [f"Greeting: {name} says hello." for name in who["who"][1]]
    splits: tuple[Literal["train", "eval"], ...] = ("train", "eval")
    for split in splits:
        own = [text for text in everything if summary._is_eval(text) == (split == "eval")]
        assert own
        assert sorted(e.summary for e in make_summary_examples(len(own), 0, split)) == own
        with pytest.raises(ValueError, match="no new summary"):
            make_summary_examples(len(own) + 1, 0, split)


def test_deterministic() -> None:
    assert make_summary_examples(60, 5, "train") == make_summary_examples(60, 5, "train")
    assert make_summary_examples(60, 5, "train") != make_summary_examples(60, 6, "train")
    assert make_summary_examples(0, 5, "train") == []


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="negative"):
        make_summary_examples(-1, 0, "train")
    with pytest.raises(ValueError, match="split"):
        make_summary_examples(1, 0, "test")  # type: ignore[arg-type]
