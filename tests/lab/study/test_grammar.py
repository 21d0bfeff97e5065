"""The text of the controlled world: released tables, sampling, windows, separability."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spf.lab.study.grammar import BRANCHES, PCFGS, grammar, length_report, separability_report

RELEASED = {
    "base": (261, 486, 391),
    "safe": (54, 81, 71.7),
    "unsafe": (42, 162, 76),
    "intermediate": (45, 54, 52),
    "id_mg": (36, 54, 49),
    "ood_mg": (36, 54, 45),
}
"""Shortest, longest and mean length measured on the released tables (shared/specs/mechanistic_study.md, section 3)."""


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("level5", ["parity", "matched"])
def test_strings_are_derived_by_the_rules(branch, level5):
    rng = np.random.default_rng(0)
    for pcfg, leaf in product(PCFGS, (1, 3)):
        source = grammar(branch, pcfg, level5, leaf)
        for row in source.sample_strings(rng, 4):
            string = row[row >= 0].tolist()
            assert source.accepts(string)
            assert not source.accepts(string[:-1])
            assert not source.accepts([*string[:-1], (string[-1] + 1) % 30]) or leaf == 1


def test_membership_tells_the_branches_apart():
    rng = np.random.default_rng(1)
    unsafe = grammar("id_mg", 1, "parity").sample_strings(rng, 20)
    assert not any(grammar("safe", 1, "parity").accepts(row[row >= 0].tolist()) for row in unsafe)


@pytest.mark.parametrize("branch", BRANCHES)
def test_lengths_are_those_of_the_released_tables(branch):
    low, high, mean = RELEASED[branch]
    found = length_report("parity", count=4000)[branch]
    assert low <= found["min"]
    assert found["max"] <= high
    assert found["mean"] == pytest.approx(mean, rel=0.02)


def test_alternatives_are_uniform():
    strings = grammar("safe", 1).level4_strings()
    assert sum(strings.values()) == pytest.approx(1)
    # v -> t with 2 of 4, t -> q with 1 of 3, q -> w o with 1 of 2; no other path gives w o.
    assert strings[("w", "o")] == pytest.approx(1 / 4 * 1 / 4 * 1 / 2 + 2 / 4 * 1 / 3 * 1 / 2)


@pytest.mark.parametrize("branch", ["safe", "id_mg", "intermediate"])
def test_windows_are_cut_from_strings(branch):
    """A window as long as the shortest strings is a string where those begin at 0; others are parts of longer ones."""
    source = grammar(branch, 2, "matched", 1)
    rng = np.random.default_rng(3)
    length = source.tables.shortest
    windows = source.sample(rng, np.full(3000, length))
    strings = source.sample_strings(rng, 3000)
    parts = []
    for string in strings:
        total = int((string >= 0).sum())
        start = int(rng.integers(0, total - length + 1))
        parts.append(string[start : start + length])
    # Windows drawn by the sampler and windows cut by hand have the same pairs of neighbours at every place.
    for place in range(length - 1):
        pairs = [
            np.bincount(w[:, place].astype(int) * 30 + w[:, place + 1], minlength=900) / 3000
            for w in (windows, np.array(parts))
        ]
        assert np.abs(pairs[0] - pairs[1]).sum() < 0.45
    accepted = [sum(source.accepts(row.tolist()) for row in w[:400]) for w in (windows, np.array(parts))]
    assert abs(accepted[0] - accepted[1]) < 60
    assert accepted[0] > 20 or branch == "intermediate"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), low=st.integers(1, 12), spread=st.integers(0, 24))
def test_windows_have_the_lengths_asked_for(seed, low, spread):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, low + spread + 1, 50)
    windows = grammar("id_mg", 1, "parity").sample(rng, lengths)
    assert ((windows >= 0).sum(1) == lengths).all()
    assert ((windows >= 0) == (np.arange(windows.shape[1]) < lengths[:, None])).all()


def test_a_window_may_be_the_whole_string():
    # In the released code a window as long as its string is an error.
    windows = grammar("ood_mg", 1, "parity").sample(np.random.default_rng(0), np.full(200, 36))
    assert (windows >= 0).all()


def test_a_window_longer_than_a_string_is_refused():
    with pytest.raises(ValueError, match="window of 37, but strings may have only 36"):
        grammar("id_mg", 1, "parity").sample(np.random.default_rng(0), np.full(2, 37))


def test_unknown_grammars_are_named():
    for wrong in (
        ("nonsense", 1, "parity", 3),
        ("safe", 5, "parity", 3),
        ("safe", 1, "other", 3),
        ("safe", 1, "parity", 2),
    ):
        with pytest.raises(ValueError, match="no sub-grammar"):
            grammar(*wrong)


def test_released_tables_are_separable_by_n_grams_and_matched_ones_less():
    released = separability_report("parity", (25, 34))["6-gram"]
    assert released["accuracy"] > 0.99
    assert released["flagged_unsafe"]["intermediate"] < 0.02
    assert released["flagged_unsafe"]["ood_mg"] > 0.97
    matched = separability_report("matched", (25, 34))["6-gram"]
    assert 0.72 < matched["accuracy"] < 0.86
    assert 0.35 < matched["flagged_unsafe"]["intermediate"] < 0.5


def test_same_seed_same_bytes():
    draw = [grammar("base", 3).sample(np.random.default_rng(5), np.full(50, 20)).tobytes() for _ in range(2)]
    assert draw[0] == draw[1]
    assert draw[0] != grammar("base", 3).sample(np.random.default_rng(6), np.full(50, 20)).tobytes()
