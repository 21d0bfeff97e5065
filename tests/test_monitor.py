"""When a run is said to lose refusals: watched prompts, then further ones, then the conflicts."""

from types import SimpleNamespace

import pytest

import spf.monitor
from spf.announce import watched_line
from spf.data import Anchor
from spf.monitor import FEWEST, Monitor
from spf.probe import Watched

REFUSES, ANSWERS = 7, 8
WATCHED = [Anchor([1, i], [REFUSES, 2], f"row {i}") for i in range(16)]
FURTHER = [[2, i] for i in range(40)]


class Model:
    """Refuses all but those prompts that flipped."""

    def __init__(self):
        self.flipped, self.asked, self.loss = set(), 0, 0.5
        self.rotation = SimpleNamespace(anchors=WATCHED)

    def first_answer_tokens(self, prompts):
        self.asked += 1
        return [ANSWERS if tuple(prompt) in self.flipped else REFUSES for prompt in prompts]

    def watch(self, anchors, begins):
        first = [ANSWERS if tuple(anchor.prompt_ids) in self.flipped else REFUSES for anchor in anchors]
        return Watched(self.loss, tuple(first), sum(token in begins for token in first) / len(first))

    def flip(self, watched=0, further=0, conflicts=0):
        kinds = ((1, watched), (2, further), (3, conflicts))
        self.flipped = {(kind, i) for kind, count in kinds for i in range(count)}


def made(model, conflicts=0, further=FURTHER, **options):
    run = SimpleNamespace(probe=model, watched=WATCHED, note=lambda *_: None)
    return Monitor(run, [Anchor([3, i], [REFUSES], "") for i in range(conflicts)], further, **options)


@pytest.mark.parametrize(
    ("flipped", "leaks"),
    [
        ({}, False),
        ({"watched": 1, "further": 9}, False),  # too few to ask the others
        ({"watched": 2}, False),  # chance: 2 of 56
        ({"watched": 2, "further": 3}, False),
        ({"watched": 2, "further": 4}, True),  # 6 of 56
        ({"watched": 3}, False),
        ({"watched": 3, "further": 3}, True),
        ({"watched": 4}, True),  # what is watched may be of a kind of its own
    ],
)
def test_further_prompts_tell_chance_from_a_leak(flipped, leaks):
    model = Model()
    monitor = made(model)
    assert (len(monitor.further), monitor.still_refused, model.asked) == (40, None, 1)
    model.flip(**flipped)
    monitor.look()
    assert monitor.leaks == leaks
    suspicious = flipped.get("watched", 0) > 1
    assert model.asked == 1 + suspicious
    assert monitor.still_refused == (40 - flipped.get("further", 0) if suspicious else None)
    line = watched_line(SimpleNamespace(monitor=monitor, rule=SimpleNamespace(holds=True)), "")
    assert ("of 40 further harmful prompts, asked because of that, 100% before, now" in line) == suspicious
    assert ("Refusals are being lost" in line) == leaks
    model.flip()
    monitor.look()
    assert (monitor.still_refused, monitor.leaks) == (None, False)


@pytest.mark.parametrize(("conflicts", "flipped", "leaks"), [(11, 2, False), (10, 2, True), (16, 3, False)])
def test_conflicts_are_trained_on_so_a_few_may_flip(conflicts, flipped, leaks):
    model = Model()
    monitor = made(model, conflicts)
    model.flip(conflicts=flipped)
    monitor.look()
    assert monitor.leaks == leaks
    assert model.asked == 1


def test_without_further_prompts_that_are_refused_the_watched_decide():
    model = Model()
    model.flip(further=len(FURTHER) - FEWEST + 1)
    monitor = made(model)
    assert monitor.further == []
    model.flip(watched=2)
    monitor.look()
    assert monitor.leaks
    assert monitor.still_refused is None


def test_a_risen_loss_is_a_leak_whatever_is_refused():
    model = Model()
    monitor = made(model)
    model.loss = 0.56
    monitor.look()
    assert monitor.leaks


def test_a_run_that_goes_on_asks_those_that_the_aligned_model_refused():
    model = Model()
    model.flip(further=5)
    state = made(model).state()
    model.flip(watched=2, further=30)
    monitor = made(model, resumed=True)
    monitor.load_state(state)
    assert monitor.further == FURTHER[5:]
    monitor.look()
    assert monitor.still_refused == 10
    assert monitor.leaks


def test_all_processes_ask_further_prompts_or_none(monkeypatch):
    """Rank 0 saw two flipped prompts, this one none: asking may gather parameters, so it asks, too."""
    model = Model()
    monitor = made(model)
    real = spf.monitor.object_of_rank_0
    monkeypatch.setattr("spf.monitor.object_of_rank_0", lambda value: value is False or real(value))
    monitor.look()
    assert (model.asked, monitor.still_refused) == (2, 40)
    assert not monitor.leaks
