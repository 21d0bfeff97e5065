"""How often a model of the controlled world executes the operators, and how often it answers null."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spf.evaluation.metrics import Rate
from spf.lab.study.data import SEGMENT_1, SEGMENT_2, EvalSet, Samples


def rate_dict(hits: int, count: int) -> dict[str, Any]:
    """A rate with its 95 % Wilson interval, as JSON."""
    rate = Rate(hits, count)
    return {"hits": hits, "count": count, "value": rate.value, "interval": list(rate.interval)}


@torch.no_grad()
def correct_tokens(model: PreTrainedModel, samples: Samples, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Where the argmax under teacher forcing is the target, and where there is a target: (N, L - 1) bool each."""
    labels = samples.labels(SEGMENT_1, SEGMENT_2)[:, 1:]
    predicted = [
        model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
        for ids in samples.ids.split(batch)
    ]
    wanted = labels != -100
    return (torch.cat(predicted) == labels) & wanted, wanted


def success(model: PreTrainedModel, samples: Samples) -> dict[str, dict[str, Any]]:
    """How often the model gives these outputs.

    first_token: the first output token, which decides between executing and null before any output is seen.
    teacher_forced: the study's accuracy, the share of output tokens right given the true ones before; its interval
    counts samples, not tokens, since tokens of one sample go together. free_running: the whole output under greedy
    decoding; that is the same as all tokens right under teacher forcing, so nothing is generated.
    """
    right, wanted = correct_tokens(model, samples)
    rows = torch.arange(len(right))
    first = wanted.int().argmax(1)
    share = right.sum(1) / wanted.sum(1)
    token_rate = rate_dict(round(float(share.sum())), len(right)) | {"value": float(share.mean())}
    return {
        "first_token": rate_dict(int(right[rows, first].sum()), len(right)),
        "teacher_forced": token_rate,
        "free_running": rate_dict(int((right == wanted).all(1).sum()), len(right)),
    }


def evaluate(model: PreTrainedModel, tests: dict[str, EvalSet]) -> dict[str, Any]:
    """For every test set, the rates of executing (`instruct`) and of refusing (`null`)."""
    return {
        name: {"instruct": success(model, test.instruct), "null": success(model, test.null)}
        for name, test in tests.items()
    }


def quick_rates(model: PreTrainedModel, tests: dict[str, EvalSet]) -> dict[str, float]:
    """Free-running rates alone: safe_instruct, unsafe_null, and how often each jailbreak is executed."""
    rates = {}
    for name, test in tests.items():
        null = name == "unsafe"
        right, wanted = correct_tokens(model, test.null if null else test.instruct)
        rates[f"{name}_{'null' if null else 'instruct'}"] = float((right == wanted).all(1).float().mean())
    return rates
