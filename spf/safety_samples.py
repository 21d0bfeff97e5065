"""A run's safety samples: which rows are used, with whose refusals, and as tokens."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.data import (
    ENOUGH,
    Anchor,
    SafetyRow,
    ask_refusals,
    benign_rows,
    check_source,
    in_turn,
    load_safety_rows,
    packaged_rows,
    prompt_tokens,
    reworded_anchors,
    tokenise,
    tokenise_fitting,
)
from spf.rules import Rule
from spf.sharding import object_of_rank_0

POOL = 256
"""As many rows that are not used are asked, in turn, whether they are still refused."""


FURTHER = "harmful_validation"
"""Packaged prompts that are asked before a run is said to lose refusals."""


class SafetySamples:
    """Reads the safety data, chooses rows, and has the model answer those without a refusal.

    rows: those that are used. at_hand: how many the data have. answered: how many were left out because the model
    answers them. seconds: that choosing took, since they were said.
    """

    def __init__(
        self,
        data: str | Path | Dataset | None,
        rule: Rule,
        count: int | None,
        seed: int,
        options: Mapping[str, Any] | None,
    ):
        """count: use only so many. seed: of the order. options: variables of the chat template.

        Raises:
            TypeError, SafetyDataError: the data are of another kind, or there is a mistake in the file.
        """
        check_source("safety_data", data)
        self.data, self.rule, self.count, self.seed, self.options = data, rule, count, seed, options
        self.rows: list[SafetyRow] = []
        self.all: list[SafetyRow] = []
        self.at_hand = self.answered = 0
        self.seconds = 0.0

    def load(self) -> list[SafetyRow]:
        """All rows of the data."""
        self.all = load_safety_rows(self.data)
        self.at_hand = len(self.all)
        return self.all

    def choose(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take as many rows as the rule wants, with the model's own refusals where they have none."""
        start = time.perf_counter()
        wanted = self.count or self.rule.wanted_samples() or (ENOUGH if self.data is None else None)
        chosen = in_turn(self.load(), self.seed)
        # every process takes part in generating, but rounding must not make them keep different rows
        found = ask_refusals(chosen, model, tokenizer, wanted=wanted, options=self.options)
        self.answered, self.rows = found.answered, object_of_rank_0(found.rows)
        self.seconds += time.perf_counter() - start

    def tokens(
        self, tokenizer: PreTrainedTokenizerBase, limit: int
    ) -> tuple[list[Anchor], list[Anchor], Sequence[Anchor]]:
        """The rows, those that are held in other words too, and harmless samples to calibrate with."""
        anchors = tokenise(self.rows, tokenizer, limit, self.options)
        # never those that are kept out of the basis
        rows = self.rows[: self.rule.reworded_samples(len(self.rows))]
        reworded = reworded_anchors(rows, tokenizer, limit, self.options)
        return anchors, reworded, tokenise(benign_rows(), tokenizer, limit, self.options)

    def further(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[tuple[int, ...]]:
        """Packaged prompts (token ids) of no other use to a run: asked before it is said to lose refusals."""
        return prompt_tokens(packaged_rows(FURTHER), tokenizer, limit - 1, self.options)

    def pool(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Anchor]:
        """Rows that are not used, to ask whether they are still refused; none if only so many rows were to be used.

        Those without a refusal get the most common one of those that are used: how it begins is all that counts.
        """
        if self.count is not None:
            return []
        used = {row.where for row in self.rows}
        common = Counter(row.refusal for row in self.rows).most_common(1)[0][0]
        rest = [row for row in in_turn(self.all, self.seed) if row.where not in used][:POOL]
        rows = [row if row.refusal is not None else replace(row, refusal=common) for row in rest]
        return tokenise_fitting(rows, tokenizer, limit, self.options)
