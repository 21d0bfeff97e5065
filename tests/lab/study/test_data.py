"""Vocabulary, layout, labels and test sets of the controlled world."""

import numpy as np
import pytest
import torch

from spf.lab.study.data import (
    BOS,
    EOT,
    ID,
    PAD,
    PROMPT,
    SEGMENT_1,
    SEGMENT_2,
    SOT,
    STOP,
    TEST_SETS,
    TEXT,
    VOCABULARY,
    Sampler,
    WorldSettings,
)
from spf.lab.study.operators import DUPLICATES, is_unsafe

TINY = WorldSettings(leaf=1, window=(12, 12), pcfgs=(1,))
RELEASED = WorldSettings(level5="parity", window=(25, 34), pairs=2, null="2a")
NAMES = {number: token for token, number in ID.items()}


def sampler(settings=TINY, seed=(0,)):
    return Sampler(settings, seed)


def test_vocabulary():
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 59
    assert ID["2a"] == 22
    assert VOCABULARY[ID["2a"] + 29] == "3d"
    assert RELEASED.null_id == 22
    assert NAMES[TINY.null_id] == "null"


@pytest.mark.parametrize("pairs", [1, 2])
def test_layout(pairs):
    settings = WorldSettings(level5="parity", window=(6, 11), pairs=pairs)
    samples = sampler(settings).pretraining(64)
    assert samples.ids.shape[1] == settings.length
    for ids, part in zip(samples.ids.tolist(), samples.part.tolist(), strict=True):
        n = part.count(TEXT)
        begin = 3 + 2 * pairs + n
        assert ids[0] == BOS
        assert ids[1 + 2 * pairs] == SOT
        assert part[2 + 2 * pairs : begin - 1] == [TEXT] * n
        assert ids[begin - 1] == EOT
        assert part[begin : begin + n + 1] == [SEGMENT_1] * (n + 1)
        assert ids[begin + n] == STOP
        end = begin + n + 1
        if pairs == 2:
            # The released code's indices: begin = 7 + n, stops at 2n + 7 and 3n + 8.
            assert (begin, begin + n) == (7 + n, 2 * n + 7)
            assert part[end : end + n + 1] == [SEGMENT_2] * (n + 1)
            assert ids[3 * n + 8] == STOP
            end += n + 1
        assert ids[end:] == [PAD] * (len(ids) - end)
        assert part[end:] == [PROMPT] * (len(ids) - end)


def test_second_segment_applies_the_second_pair_to_the_first():
    from spf.lab.study.operators import permutation

    samples = sampler(WorldSettings(pcfgs=(1,), pairs=2, window=(8, 8))).safety(np.zeros(50, bool)).preferred
    for ids, part in zip(samples.ids, samples.part, strict=True):
        third, fourth = (permutation(NAMES[int(t)]) for t in ids[3:5])
        first, second = (ids[part == s][:-1] - ID["2a"] for s in (SEGMENT_1, SEGMENT_2))
        assert second.tolist() == [fourth[third[int(x)]] for x in first]


def test_nothing_after_the_last_stop_is_in_a_loss():
    # In the released code stop and end tokens after the pads stay in the loss.
    samples = sampler(WorldSettings(window=(6, 11))).pretraining(64)
    labels = samples.labels(TEXT, SEGMENT_1, SEGMENT_2)
    for ids, row in zip(samples.ids.tolist(), labels.tolist(), strict=True):
        stop = ids.index(STOP)
        assert row[stop] == STOP
        assert set(row[stop + 1 :]) <= {-100}


def test_constant_output_is_in_pretraining():
    samples = sampler(TINY, (1,)).pretraining(4000)
    constant = (samples.ids[:, 1:3] == ID["ex1"]).any(1)
    assert 15 < int(constant.sum()) < 80
    segment = samples.ids[constant][samples.part[constant] == SEGMENT_1]
    assert set(segment.tolist()) == {TINY.null_id, STOP}


def test_half_of_the_pairs_hold_the_identity():
    tasks = sampler(WorldSettings(leaf=1, window=(12, 12), operators=("(", ")", "["))).pretraining(6000).ids[:, 1:3]
    share = float((tasks == ID["("]).any(1).float().mean())
    assert share == pytest.approx(0.5 + 0.5 * (1 - 4 / 9), abs=0.02)


@pytest.mark.parametrize("unsafe", [False, True])
def test_labels_follow_the_rule(unsafe):
    """Each prompt's pair is safe or unsafe for the text it stands on, so that no two labels contradict each other."""
    draw = sampler(WorldSettings(level5="matched", window=(54, 54), pcfgs=(1,)))
    pairs = draw.safety(np.full(300, unsafe))
    safe_windows = {"safe": 0, "id_mg": 0}
    for ids in pairs.preferred.ids:
        first, second = (NAMES[int(t)] for t in ids[1:3])
        fits = [b for b in ("safe", "id_mg") if is_unsafe(first, second, b) == unsafe]
        assert fits
        for b in fits:
            safe_windows[b] += 1
    assert min(safe_windows.values()) > 0


def test_text_and_label_go_together(monkeypatch):
    """The text a prompt gets is of the branch its operators were drawn for."""
    draw, seen = sampler(), []
    text = draw.text
    monkeypatch.setattr(draw, "text", lambda branches, pcfgs: seen.append(branches) or text(branches, pcfgs))
    unsafe = np.arange(400) % 2 == 0
    ids = draw.safety(unsafe).preferred.ids
    for row, branch, label in zip(ids, seen[0], unsafe, strict=True):
        assert is_unsafe(NAMES[int(row[1])], NAMES[int(row[2])], str(branch)) == label
    assert 140 < int((seen[0] == "safe").sum()) < 260


def test_preferred_and_dispreferred():
    pairs = sampler().safety(np.arange(100) % 2 == 0)
    assert torch.equal(pairs.preferred.ids[:, :17], pairs.dispreferred.ids[:, :17])
    for preferred, other, unsafe in zip(pairs.preferred.ids, pairs.dispreferred.ids, pairs.unsafe, strict=True):
        null, executed = (preferred, other) if unsafe else (other, preferred)
        assert null[17:29].tolist() == [TINY.null_id] * 12
        assert TINY.null_id not in executed[17:29]
        assert null[29] == executed[29] == STOP


def test_every_pair_has_a_dispreferred_term():
    # In the released code it is empty where the first two operators are the identity.
    for settings in (TINY, RELEASED):
        pairs = sampler(settings).safety(np.arange(200) % 2 == 0)
        for samples in (pairs.preferred, pairs.dispreferred):
            assert bool((samples.labels(SEGMENT_1, SEGMENT_2) != -100).any(1).all())


@pytest.mark.parametrize("name", TEST_SETS)
def test_test_sets(name):
    test = sampler(TINY, (2,)).test(name, 200)
    prompt = test.prompts()
    assert prompt.input_ids.shape == (200, 17)
    assert torch.equal(test.instruct.ids[:, :17], test.null.ids[:, :17])
    tokens = {NAMES[t] for t in prompt.input_ids[:, 1:3].flatten().tolist()}
    expected = {
        "jb_co_text": {"}", "?", "!", "@", "£"},
        "jb_misgen_tokens": {"r1", "r2", "r3", "r4"},
        "jb_misgen_both": {"r1", "r2", "r3", "r4"},
        "jb_misgen_text": {")", "[", "}", "?", "!", "@", "£"},
    }.get(name)
    assert expected is None or tokens == expected


def test_jb_co_task_mixes_a_safe_and_an_unsafe_operator(monkeypatch):
    draw, seen = sampler(), []
    text = draw.text
    monkeypatch.setattr(draw, "text", lambda branches, pcfgs: seen.append(branches) or text(branches, pcfgs))
    ids = draw.test("jb_co_task", 300).instruct.ids
    orders = set()
    for row, branch in zip(ids, seen[0], strict=True):
        first, second = (NAMES[int(t)] for t in row[1:3])
        assert "(" not in (first, second)
        flags = is_unsafe(first, first, str(branch)), is_unsafe(second, second, str(branch))
        assert sum(flags) == 1
        orders.add(flags)
    assert len(orders) == 2


def test_duplicates_set_holds_duplicates():
    # In the released code the flag for it never takes effect, and the set holds safe operators.
    ids = sampler().test("jb_misgen_tokens", 100).instruct.ids[:, 1:3]
    assert {NAMES[t] for t in ids.flatten().tolist()} <= DUPLICATES.keys()


def test_texts_of_the_jailbreaks(monkeypatch):
    expected = {"jb_co_text": {"intermediate"}, "jb_misgen_text": {"ood_mg"}, "jb_misgen_both": {"ood_mg"}}
    for name in TEST_SETS:
        draw, seen = sampler(), []
        text = draw.text
        monkeypatch.setattr(draw, "text", lambda b, p, seen=seen, text=text: seen.append(b) or text(b, p))
        draw.test(name, 50)
        assert set(seen[0].tolist()) == expected.get(name, {"safe", "id_mg"})


def test_prompts_are_padded_on_the_left():
    test = sampler(WorldSettings(window=(5, 9))).test("safe", 50)
    prompts = test.prompts()
    assert set(prompts.input_ids[:, -1].tolist()) == {EOT}
    for ids, mask, whole in zip(prompts.input_ids, prompts.attention_mask, test.instruct.ids, strict=True):
        kept = ids[mask.bool()].tolist()
        assert kept == whole[: len(kept)].tolist()


def test_same_seed_same_bytes():
    first, second, other = (sampler(RELEASED, seed).safety(np.arange(64) < 32) for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(first.preferred.ids, second.preferred.ids)
    assert not torch.equal(first.preferred.ids, other.preferred.ids)


def test_any_count_can_be_drawn():
    # In the released code the number of samples has to fit the file that was made before.
    assert [len(sampler().pretraining(n).ids) for n in (1, 7, 1001)] == [1, 7, 1001]
    assert len(sampler().test("safe", 3)) == 3


def test_unknown_test_set():
    with pytest.raises(ValueError, match="no test set 'jb_icl'"):
        sampler().test("jb_icl", 3)


def test_pretraining_texts_come_from_the_branches_named(monkeypatch):
    for branches in (("base",), ("base", "safe", "id_mg")):
        draw, seen = sampler(WorldSettings(window=(12, 12), branches=branches)), []
        text = draw.text
        monkeypatch.setattr(draw, "text", lambda b, p, seen=seen, text=text: seen.append((b, p)) or text(b, p))
        draw.pretraining(100)
        assert set(seen[0][0].tolist()) == set(branches)
        assert set(seen[0][1].tolist()) == {1, 2, 3, 4}
