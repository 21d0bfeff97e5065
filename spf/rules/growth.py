"""Constraint generation: where prompts flip all the same, the null space holds more directions."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from spf.data import Anchor
from spf.next_token import Known, begins_of
from spf.probe import refused
from spf.rules.constraint import Constraint
from spf.run import Run
from spf.sharding import same_on_all_ranks

EVERY = 5
"""Steps from one look at the pool to the next; under pressure every step."""

AT_ONCE = 32
"""Prompts of the pool that are asked in one look, in turn: one or two per cent of five steps of 8 x 512 tokens."""

PER_ROUND = 16
"""Directions that a round adds to every matrix."""


class Growth:
    """Asks the pool, some of it at a time, and holds more of what flipped.

    The pool are prompts that the aligned model refuses: such as are held, and further ones. V has fewer directions than
    their inputs, so under pressure some flip. The subspace has a reserve of further directions, with what the aligned
    weights make of them; those that the flipped prompts use most become part of V, and the next step's correction
    brings the weights there, too, to what they were. (Constraint generation: Dantzig, Fulkerson and Johnson 1954.)
    """

    def __init__(self, run: Run, constraint: Constraint, pool: Sequence[Anchor], decision_weight: float, resumed: bool):
        """decision_weight: of the tokens around the beginning of an answer, as in the choice of V.

        resumed: which of the pool the aligned model refuses is in a checkpoint, `load_state`.
        """
        self.run, self.constraint, self.decision_weight = run, constraint, decision_weight
        anchors = list({tuple(anchor.prompt_ids): anchor for anchor in pool if anchor.refusal_ids}.values())
        self._known = {Known.name(anchor.prompt_ids): anchor for anchor in anchors}
        self._begins = begins_of([anchor.refusal_ids for anchor in anchors])
        flipped = [True] * len(anchors) if resumed else self._flipped(anchors)
        self.pool = [anchor for anchor, lost in zip(anchors, flipped, strict=True) if not lost]
        self.rounds = self.place = self.flips = 0
        self.pressed = False

    def look(self) -> bool:
        """Between two steps: ask the next prompts, if it is time, and grow for those that flipped. Whether it was."""
        if not self.pool or not self.run.steps or not (self.pressed or self.run.steps % EVERY == 0):
            return False
        asked = [self.pool[(self.place + i) % len(self.pool)] for i in range(min(AT_ONCE, len(self.pool)))]
        lost = [anchor for anchor, flipped in zip(asked, self._flipped(asked), strict=True) if flipped]
        self.run.note("flipped_rate", len(lost) / len(asked))
        self.flips += len(lost)
        self.pressed = bool(lost) and self.constraint.room > 0
        if self.pressed:
            self._grow(lost)
        # those that flipped are asked again at once, with others
        self.place += len(asked) - len(lost) if self.pressed else len(asked)
        return True

    def _flipped(self, anchors: Sequence[Anchor]) -> list[bool]:
        """Which prompts' answers do not begin as a refusal."""
        prompts = [anchor.prompt_ids for anchor in anchors]
        return [not kept for kept in refused(self.run.probe, prompts, self._begins)]

    def _grow(self, lost: Sequence[Anchor]) -> None:
        moments = self.run.probe.input_moments(lost, self.constraint.reserves(), self.decision_weight)
        turns = {name: torch.linalg.eigh(moment.double())[1].flip(1).float() for name, moment in moments.items()}
        same_on_all_ranks(turns)
        self.constraint.grow(turns, PER_ROUND)
        self.rounds += 1

    def told(self) -> str:
        """What happened, in words."""
        if not self.pool:
            return "; none of the prompts asked were refused before training, so none were asked whether they flip"
        if not self.place and not self.rounds:
            return ""
        if not self.flips:
            return f"; none of {min(self.place, len(self.pool))} prompts that were asked had flipped"
        if not self.rounds:
            return f"; prompts were seen to have flipped {self.flips} times, and no more directions were at hand"
        widest = max(V.shape[1] for V in self.constraint.subspace.right.values())
        end = "" if self.constraint.room else ", all there were at hand"
        return f"; prompts flipped in {self.rounds} rounds, so up to {widest} directions are held by now{end}"

    def state(self) -> dict[str, Any]:
        """As JSON: the pool by hashes of its prompts, and where it is."""
        pool = [Known.name(anchor.prompt_ids) for anchor in self.pool]
        return {
            "pool": pool,
            "rounds": self.rounds,
            "place": self.place,
            "flips": self.flips,
            "pressed": self.pressed,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.pool = [self._known[name] for name in state["pool"] if name in self._known]
        self.rounds, self.place = state["rounds"], state["place"]
        self.flips, self.pressed = state["flips"], state["pressed"]


def in_turns(*pools: Sequence[Anchor]) -> list[Anchor]:
    """One of each, in turn, until all are there."""
    return [anchor for turn in zip_longest(*pools) for anchor in turn if anchor is not None]
