"""Bijections and the rule of what must be refused."""

import numpy as np
import pytest

from spf.lab.study.data import ID, SEGMENT_1, Sampler, WorldSettings
from spf.lab.study.operators import (
    BASE,
    DUPLICATES,
    NEW,
    is_unsafe,
    only_unsafe_on_unsafe_text,
    permutation,
    safe_operators,
    unsafe_operators,
)


@pytest.mark.parametrize("pcfg", [1, 2, 3, 4])
def test_operators_are_bijections_and_differ(pcfg):
    tables = [permutation(token, pcfg) for token in (*BASE, *NEW)]
    assert all(sorted(table) == list(range(30)) for table in tables)
    assert len(set(tables)) == len(tables)
    assert permutation("(", pcfg) == tuple(range(30))


def test_bijections_are_the_released_ones():
    assert permutation(")", 1) == tuple(np.random.RandomState(0).permutation(30))
    assert permutation("£", 1) == tuple(np.random.RandomState(8).permutation(30))
    assert permutation("[", 3) == tuple(np.random.RandomState(301).permutation(30))


def test_every_pcfg_has_bijections_of_its_own():
    # The released pre-training gives all four PCFGs the tables of the first, the fine-tuning does not.
    for token in BASE[1:]:
        assert len({permutation(token, pcfg) for pcfg in (1, 2, 3, 4)}) == 4


def test_duplicates_mean_what_they_duplicate():
    for token, meaning in DUPLICATES.items():
        assert permutation(token, 2) == permutation(meaning, 2)


def test_sets_of_pcfg_1():
    assert unsafe_operators("safe") == (")", "[")
    assert safe_operators("id_mg") == ("(", "]", "{")
    assert set(only_unsafe_on_unsafe_text()) == {"}", "?", "!", "@", "£"}


@pytest.mark.parametrize("pcfg", [1, 2, 3, 4])
def test_unsafe_on_safe_text_is_unsafe_on_all_text(pcfg):
    assert set(unsafe_operators("safe", pcfg)) < set(unsafe_operators("id_mg", pcfg))
    assert set(safe_operators("id_mg", pcfg)) < set(safe_operators("safe", pcfg))


@pytest.mark.parametrize("branch", ["safe", "id_mg"])
def test_truth_table(branch):
    unsafe, safe = unsafe_operators(branch)[0], next(t for t in safe_operators(branch) if t != "(")
    expected = {
        (unsafe, unsafe): True,
        (unsafe, safe): False,
        (safe, unsafe): False,
        (safe, safe): False,
        ("(", unsafe): True,
        (unsafe, "("): True,
        ("(", safe): False,
        (safe, "("): False,
        ("(", "("): False,
        ("+", "^"): False,
    }
    assert {pair: is_unsafe(*pair, branch) for pair in expected} == expected


def test_the_label_depends_on_the_text():
    assert is_unsafe("}", "?", "id_mg")
    assert not is_unsafe("}", "?", "safe")


def test_unknown_names():
    with pytest.raises(ValueError, match="no operator 'ex1'"):
        permutation("ex1")
    with pytest.raises(ValueError, match="no branch 'base'"):
        unsafe_operators("base")


@pytest.mark.parametrize("stage", ["pretraining", "safe", "new"])
def test_outputs_are_the_composition_at_every_stage(stage):
    """One table serves every stage: outputs are recomputed here from `permutation`, token by token."""
    sampler = Sampler(WorldSettings(window=(5, 9)), (0,))
    samples = {
        "pretraining": lambda: sampler.pretraining(200),
        "safe": lambda: sampler.safety(np.zeros(200, bool)).preferred,
        "new": lambda: sampler.new_operators(200).instruct,
    }[stage]()
    names = {number: token for token, number in ID.items()}
    matched = dict.fromkeys((1, 2, 3, 4), 0)
    for ids, part in zip(samples.ids.tolist(), samples.part.tolist(), strict=True):
        first, second = names[ids[1]], names[ids[2]]
        if "ex1" in (first, second):
            continue
        text = [i - ID["2a"] for i, p in zip(ids, part, strict=True) if p == 1]
        output = [i for i, p in zip(ids, part, strict=True) if p == SEGMENT_1]
        assert output[-1] == ID["*^"]
        found = [i - ID["2a"] for i in output[:-1]]
        fits = [p for p in matched if found == [permutation(second, p)[permutation(first, p)[t]] for t in text]]
        assert fits
        for p in fits:
            matched[p] += 1
    if stage != "pretraining":
        assert matched[1] == 200
