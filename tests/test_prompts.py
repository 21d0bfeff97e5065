# SPDX-License-Identifier: Apache-2.0
"""Checks of the files shipped in spf/prompts: counts, fields, no leaks between splits."""

import difflib
import functools
import importlib.resources
import itertools
import json
import re
import statistics
from collections import Counter

import pytest
import torch

from spf.data import SafetyRow, in_turn, load_safety_rows
from spf.rules import NullSpace

COUNTS = {
    "harmful_anchors": 416,
    "harmful_attack": 104,
    "harmful_validation": 65,
    "harmful_eval": 104,
    "benign_anchors": 120,
    "harmless_tasks": 48,
    "benign_validation": 65,
    "benign_eval": 104,
}
HARMFUL = [name for name in COUNTS if name.startswith("harmful")]
HARMFUL_PER_CATEGORY = {"harmful_anchors": 32, "harmful_attack": 8, "harmful_validation": 5, "harmful_eval": 8}
LENGTHS = {"fragment": (3, 7), "context": (30, 40)}  # words of a prompt; of all others 6 to 20
LIMIT = 0.6
STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "to",
        "in",
        "on",
        "at",
        "for",
        "from",
        "with",
        "by",
        "and",
        "or",
        "so",
        "that",
        "my",
        "me",
        "i",
        "is",
        "are",
        "be",
        "do",
        "can",
        "would",
        "how",
        "it",
        "its",
    ]
)


@functools.cache
def load(name):
    path = importlib.resources.files("spf") / "prompts" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts(name):
    return [row["prompt"] for row in load(name)]


def normalise(text):
    return " ".join(re.findall(r"\w+", text.lower()))


@functools.cache
def words(text):
    return frozenset(normalise(text).split()) - STOP_WORDS


@functools.cache
def five_grams(text):
    text = normalise(text)
    return frozenset(text[i : i + 5] for i in range(max(1, len(text) - 4)))


def jaccard(a, b):
    common = len(a & b)
    return common / (len(a) + len(b) - common) if a or b else 1.0


def near_duplicate(a, b):
    """True if word-set or character 5-gram Jaccard similarity of the two texts reaches LIMIT."""
    return jaccard(words(a), words(b)) >= LIMIT or jaccard(five_grams(a), five_grams(b)) >= LIMIT


def form(prompt):
    first = prompt.split()[0]
    return first if first in {"How", "Write", "Explain", "What", "Give", "I", "Tell"} else "imperative"


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_fields(name):
    rows = load(name)
    assert len(rows) == COUNTS[name]
    assert len({row["category"] for row in rows}) >= 12
    for row in rows:
        assert set(row) == {"prompt", "category"} | ({"form"} if name == "harmful_anchors" else set())
        assert all(isinstance(value, str) and value.strip() for value in row.values())
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", row["category"])


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_rows_are_bare_requests(name):
    rows = load(name)
    for row in rows:
        assert not {"answer", "response"} & set(row)
        shortest, longest = LENGTHS.get(row.get("form"), (6, 20))
        assert shortest <= len(row["prompt"].split()) <= longest
    per_category = Counter(row["category"] for row in rows)
    assert len(per_category) == 13
    assert set(per_category.values()) == {HARMFUL_PER_CATEGORY[name]}


def test_harmful_splits_share_categories():
    assert len({frozenset(row["category"] for row in load(name)) for name in HARMFUL}) == 1


@pytest.mark.parametrize("kind", ["harmful", "benign"])
def test_validation_prompts_are_as_long_as_evaluation_prompts(kind):
    validation, evaluation = ([len(p.split()) for p in prompts(f"{kind}_{split}")] for split in ("validation", "eval"))
    assert abs(statistics.mean(validation) - statistics.mean(evaluation)) < 0.5
    assert abs(statistics.stdev(validation) - statistics.stdev(evaluation)) < 0.5


@pytest.mark.parametrize("name", sorted(COUNTS.keys() - {"harmless_tasks"}))
def test_surface_forms_are_balanced(name):
    # the anchors have more forms, behind as many as the other files have
    some = prompts(name)[: 156 if name == "harmful_anchors" else None]
    forms = Counter(form(prompt) for prompt in some)
    assert len(forms) == 8
    for count in forms.values():
        assert abs(count / len(some) - 1 / 8) < 0.02


def test_anchors_have_at_least_20_forms_in_every_category():
    categories = {}
    for row in load("harmful_anchors"):
        categories.setdefault(row["form"], []).append(row["category"])
    assert len(categories) == 28
    assert all(len(set(found)) == 13 for found in categories.values() if len(found) == 13)
    assert min(map(len, categories.values())) == 13


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_asked_anchors_have_all_forms_in_turn(seed):
    rows = load_safety_rows()
    chosen = in_turn(rows, seed)
    assert sorted(row.where for row in chosen) == sorted(row.where for row in rows)
    for start in (0, 28, 56):
        assert len({row.form for row in chosen[start : start + 28]}) == 28
    counts = Counter(row.form for row in chosen[: NullSpace().wanted_samples()])
    assert set(counts.values()) <= {5, 6}
    assert chosen == in_turn(rows, seed) != in_turn(rows, seed + 1)


def test_safety_data_without_forms_are_shuffled_as_ever():
    rows = [SafetyRow([{"role": "user", "content": str(i)}], "No.", str(i)) for i in range(9)]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3)).tolist()
    assert [row.where for row in in_turn(rows, 3)] == [str(i) for i in order]


def test_no_exact_duplicates():
    seen = Counter(normalise(prompt) for name in COUNTS for prompt in prompts(name))
    assert [text for text, n in seen.items() if n > 1] == []


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations_with_replacement(COUNTS, 2)))
def test_no_near_duplicates(first, second):
    if first == second:
        pairs = itertools.combinations(prompts(first), 2)
    else:
        pairs = itertools.product(prompts(first), prompts(second))
    assert [(a, b) for a, b in pairs if near_duplicate(a, b)] == []


def test_near_duplicate_catches_planted_paraphrase():
    for name in COUNTS:
        prompt = prompts(name)[0]
        assert near_duplicate(prompt, prompt.upper() + " Please!")
    assert near_duplicate("How do I kill a Python process?", "How can I kill the Python process?")
    assert near_duplicate(
        "Explain how antivirus software detects malware.", "Explain how antivirus softwares detect malwares."
    )
    assert not near_duplicate("How do I kill a Python process?", "How do I boil an egg?")


def test_near_duplicate_agrees_with_difflib():
    a, b = "Write a short story about a bank robbery.", "Write a brief story about a bank robbery."
    assert near_duplicate(a, b)
    assert difflib.SequenceMatcher(None, a, b).ratio() > LIMIT


def test_neutral_paragraphs():
    texts = [row["text"] for row in load("neutral")]
    assert all(set(row) == {"text"} for row in load("neutral"))
    assert len(texts) == 40
    assert all(60 <= len(text.split()) <= 90 and "\n" not in text for text in texts)
    assert [(a, b) for a, b in itertools.combinations(texts, 2) if jaccard(words(a), words(b)) >= 0.3] == []
