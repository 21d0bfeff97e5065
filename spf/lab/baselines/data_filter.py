"""The data filter alone: training rows that answer what the aligned model refuses are left out, then plain training."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.audit import audit_data
from spf.data import SafetyRow
from spf.leaving_out import rows_in
from spf.text.generation import context_length


def without_conflicts(
    train: Sequence[SafetyRow],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    refusals: Sequence[SafetyRow],
) -> list[SafetyRow]:
    """The training rows without those that the audit finds; `refusals` tell how the model refuses."""
    data = [{"prompt": row.messages, "completion": row.refusal} for row in train]
    limit = context_length(model, tokenizer)
    left_out = set(rows_in(audit_data(data, model, tokenizer, refusals, max_length=limit).pressing))
    return [row for i, row in enumerate(train) if i not in left_out]
