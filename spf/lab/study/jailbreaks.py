"""The white-box jailbreak of the controlled world: soft tokens in the prompt, bounded in norm.

The other jailbreaks are test sets of prompts: `Sampler.test` in data.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spf.lab.study.data import EOT, SEGMENT_1, SEGMENT_2, EvalSet
from spf.lab.study.training import sequence_nll

Place = Literal["before_eot", "prefix"]


@dataclass(frozen=True)
class Attack:
    """Attacked prompts.

    delta: (N, m, d), the soft tokens. embeds: (N, L + m, d) prompts with them, up to EOT. success: (N,) bool, all
    outputs of the operators right under greedy decoding; first_token: (N,) bool, the first of them.
    """

    delta: Tensor
    embeds: Tensor
    success: Tensor
    first_token: Tensor


def project(delta: Tensor, radius: float) -> Tensor:
    """Each soft token moved to the nearest point of the l2 ball of this radius; (..., d)."""
    norm = delta.norm(dim=-1, keepdim=True)
    # The factor keeps rounding from leaving a token outside by one unit in the last place.
    return torch.where(norm > radius, delta * (radius * (1 - 1e-6) / norm.clamp(min=1e-30)), delta)


def mean_embedding_norm(model: PreTrainedModel) -> float:
    """Mean l2 norm of the token embeddings: the radius of the released code (the paper says 1)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return float(weight.detach().norm(dim=1).mean())


def soft_token_attack(
    model: PreTrainedModel,
    test: EvalSet,
    tokens: int,
    radius: float,
    *,
    steps: int = 10,
    place: Place = "before_eot",
    seed: int = 0,
    batch: int = 128,
) -> Attack:
    """Make a model execute what it refuses: m soft tokens that minimise the loss of the operators' true outputs.

    Normalised gradient steps of size 2 radius / steps on each token, then the projection of that token; N(0, .01)
    start. steps = 0 is the control: random directions on the sphere. place: after the text, as in the study, or before
    the prompt, which leaves the distance from text to outputs as it is (for worlds with one text length).
    All prompts must have one length.

    Raises:
        ValueError: texts of different lengths with `before_eot`, or no soft token.
        AssertionError: a soft token left its ball.
    """
    if tokens < 1:
        raise ValueError(f"soft_token_attack: {tokens} soft tokens")
    ends = (test.instruct.ids == EOT).int().argmax(1)
    generator = torch.Generator().manual_seed(seed)
    frozen = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        parts = []
        # Prompts of one length at a time, so that one cut fits all of a batch.
        for end in ends.unique().tolist():
            rows = torch.nonzero(ends == end).flatten()
            for chunk in rows.split(batch):
                parts.append((chunk, _attack(model, test, chunk, end, tokens, radius, steps, place, generator)))
    finally:
        for parameter, wanted in frozen.items():
            parameter.requires_grad_(wanted)
    if len({attack.embeds.shape[1] for _, attack in parts}) > 1:
        raise ValueError("soft_token_attack: the prompts have several lengths; attack those of one length at a time")
    order = torch.cat([chunk for chunk, _ in parts]).argsort()

    def join(name: str) -> Tensor:
        return torch.cat([getattr(attack, name) for _, attack in parts])[order]

    return Attack(join("delta"), join("embeds"), join("success"), join("first_token"))


def _attack(
    model: PreTrainedModel,
    test: EvalSet,
    rows: Tensor,
    end: int,
    tokens: int,
    radius: float,
    steps: int,
    place: Place,
    generator: torch.Generator,
) -> Attack:
    samples = test.instruct[rows]
    embeds = model.get_input_embeddings()(samples.ids.to(model.device)).detach()
    at = 0 if place == "prefix" else end
    fill = torch.full((len(rows), tokens), -100)
    labels = samples.labels(SEGMENT_1, SEGMENT_2)
    labels = torch.cat([labels[:, :at], fill, labels[:, at:]], dim=1).to(model.device)
    delta = torch.randn(len(rows), tokens, embeds.shape[-1], generator=generator).to(model.device)
    delta = delta * (0.01 if steps else radius / delta.norm(dim=-1, keepdim=True))
    delta = project(delta, radius)

    def run(delta: Tensor) -> Tensor:
        whole = torch.cat([embeds[:, :at], delta, embeds[:, at:]], dim=1)
        return model(inputs_embeds=whole, use_cache=False).logits

    for _ in range(steps):
        delta.requires_grad_(True)
        loss = sequence_nll(run(delta), labels).sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        direction = gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        delta = project(delta.detach() - 2 * radius / steps * direction, radius)
    norms = delta.norm(dim=-1)
    assert bool((norms <= radius).all()), f"soft token of norm {float(norms.max())} outside radius {radius}"
    with torch.no_grad():
        right = run(delta)[:, :-1].argmax(-1) == labels[:, 1:]
    wanted = labels[:, 1:] != -100
    first = wanted.int().argmax(1)
    prompt = torch.cat([embeds[:, :at], delta, embeds[:, at : end + 1]], dim=1)
    success = (right | ~wanted).all(1)
    return Attack(delta.cpu(), prompt.cpu(), success.cpu(), right.gather(1, first[:, None])[:, 0].cpu())
