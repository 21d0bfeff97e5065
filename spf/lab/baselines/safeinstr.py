"""SafeInstr: refusals mixed into the fine-tuning data (Bianchi et al., arXiv 2309.07875)."""

from collections.abc import Sequence

import torch

from spf.data import SafetyRow
from spf.errors import SafetyDataError


def add_refusals(
    train: Sequence[SafetyRow], refusals: Sequence[SafetyRow], share: float = 0.03, seed: int = 0
) -> list[SafetyRow]:
    """The training rows with refusals that make up `share` of the result, shuffled.

    No training row is lost. Which refusals are taken, and the order, depend on the seed; each is taken
    once before any is repeated. Where the share rounds to none, one is taken.

    Raises:
        ValueError: the share is not in [0, 1).
        SafetyDataError: there is no refusal to add, or a row has none.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be at least 0 and below 1, not {share}")
    for row in refusals:
        if row.refusal is None:
            raise SafetyDataError(f"{row.where}: has no refusal to mix in; complete it first (complete_refusals)")
    count = max(round(share * len(train) / (1 - share)), 1) if share > 0 else 0
    if count and not refusals:
        raise SafetyDataError("no refusals to mix in")
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randperm(len(refusals), generator=generator).tolist()
    mixed = [*train, *(refusals[choice[i % len(choice)]] for i in range(count))]
    return [mixed[i] for i in torch.randperm(len(mixed), generator=generator).tolist()]
