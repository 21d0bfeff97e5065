"""Perplexity on plain text: drift of the language model itself."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from math import exp, sqrt

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.evaluation.metrics import Z95
from spf.models import evaluating
from spf.progress import tracked


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood of a predicted token, in nats, over all tokens of all texts.

    interval: its 95 % interval over texts (ratio estimator, delta method; a text is the sampled unit).
    """

    nats_per_token: float
    tokens: int
    interval: tuple[float, float]

    @property
    def value(self) -> float:
        return exp(self.nats_per_token)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: perplexity (exp of the nats), its 95 % interval, nats per token, tokens."""
        ci = [exp(bound) for bound in self.interval]
        return {"value": self.value, "ci": ci, "nats_per_token": self.nats_per_token, "tokens": self.tokens}


def neutral_texts() -> list[str]:
    """The packaged neutral paragraphs."""
    text = (files("spf") / "prompts" / "neutral.jsonl").read_text("utf-8")
    return [json.loads(line)["text"] for line in text.splitlines()]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 8
) -> Perplexity:
    """Perplexity of plain texts, each on its own, without chat template; a text's first token is not predicted.

    Special tokens are those the tokenizer itself adds. The model's training mode is restored afterwards. Figures of
    models with different tokenizers cannot be compared.

    Raises:
        ValueError: no text has two tokens.
    """
    encoded = sorted((ids for ids in tokenizer(list(texts))["input_ids"] if len(ids) > 1), key=len)
    if not encoded:
        raise ValueError(f"perplexity: none of the {len(texts)} texts has two tokens")
    nats: list[float] = []
    with evaluating(model):
        for start in tracked(range(0, len(encoded), batch_size), "perplexity"):
            rows = encoded[start : start + batch_size]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            nats += (losses * mask[:, 1:]).sum(1, dtype=torch.float64).tolist()
    counts = [len(ids) - 1 for ids in encoded]
    tokens = sum(counts)
    mean = sum(nats) / tokens
    residuals = sum((loss - mean * count) ** 2 for loss, count in zip(nats, counts, strict=True))
    texts_used = len(encoded)
    margin = Z95 * sqrt(residuals * texts_used / max(texts_used - 1, 1)) / tokens
    return Perplexity(mean, tokens, (mean - margin, mean + margin))
