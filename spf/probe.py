"""SafetyProbe: one small forward/backward pass -> safety loss and factored safety gradients."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spf.activations import gradients
from spf.config import Count, Seed, Weight, Whole, check
from spf.data import Anchor, AnchorBatch, AnchorRotation
from spf.errors import UnsupportedModelError
from spf.fused import FUSED
from spf.inputs import Inputs
from spf.matrices import used_tokens
from spf.next_token import begins_refusal
from spf.progress import tracked
from spf.sharding import Sharding, object_of_rank_0
from spf.shared_prefix import NextToken
from spf.subspace import Factors


@dataclass(frozen=True)
class ProbeResult:
    """loss: the safety loss, mean NLL of the refusal tokens (nats). factors: of the gradient of `objective`, by name.

    objective is the safety loss itself, or the KL that `SafetyProbe.distil` asked for. excess: the
    safety loss less the reference loss of the same anchors; 0 without one.
    """

    loss: float
    factors: dict[str, Factors]
    excess: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether the loss and every factor are free of NaN and inf."""
        return bool(torch.isfinite(torch.tensor(self.loss))) and all(
            bool(torch.isfinite(f.X).all() and torch.isfinite(f.D).all()) for f in self.factors.values()
        )

    def of_all(self, sharding: Sharding) -> "ProbeResult":
        """With the losses on which all processes agree, by which rules decide."""
        own = torch.tensor([self.loss, self.excess], dtype=torch.float64)
        loss, excess = sharding.joint(own[:0], own)[1].tolist()
        return replace(self, loss=loss, excess=excess)


@dataclass(frozen=True)
class Watched:
    """What was seen of watched prompts.

    loss: mean NLL of the refusal tokens, nats. kept: whether each answer begins as a refusal. refused: the share that
    does.
    """

    loss: float
    kept: tuple[bool, ...]
    refused: float


def refused(
    probe: "SafetyProbe", prompts: Sequence[Sequence[int]], begins: Mapping[int, Collection[int]]
) -> list[bool]:
    """Whether each prompt's answer begins as `watch` has it; rank 0's verdicts, as rounding differs."""
    return object_of_rank_0(probe.refused(prompts, begins) if prompts and begins else [False] * len(prompts))


class SafetyProbe(Inputs):
    """Measures safety loss and gradients of a model on its anchors, without a trace left in the model.

    The factors come from module hooks and one `torch.autograd.grad` with respect to layer outputs
    (D in G = D^T X), so no parameter gradient is formed: `.grad`, `requires_grad`, the training mode of
    every module and the random state stay as they are, and no gradient hook of a launcher fires.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        anchors: Sequence[Anchor],
        *,
        anchors_per_step: Count = 4,
        pad_token_id: Whole = 0,
        seed: Seed = 0,
        first_tokens: Whole = 0,
        first_weight: Weight = 1.0,
    ):
        """Anchors take turns, `anchors_per_step` a probe; one anchor in all is the paper's setting.

        The first `first_tokens` tokens of every refusal weigh `first_weight` in the loss, the others 1.

        Raises:
            ValueError: an argument of another type or out of its range.
        """
        given: dict[str, float] = {"anchors_per_step": anchors_per_step, "pad_token_id": pad_token_id, "seed": seed}
        given |= {"first_tokens": first_tokens, "first_weight": first_weight}
        check(SafetyProbe.__init__, given, "SafetyProbe: {}")
        super().__init__(model, pad_token_id)
        self.rotation = AnchorRotation(anchors, min(anchors_per_step, len(anchors)), seed)
        self.first_tokens = first_tokens
        self.first_weight = first_weight
        self.reference_nll: dict[str, tuple[float, float]] = {}
        self._reference_logprobs: dict[str, Tensor] = {}

    @torch.no_grad()
    def remember(self, anchors: Sequence[Anchor], logprobs: bool = False) -> None:
        """Take the model as it is now as the reference: its safety loss on each of these anchors.

        With `logprobs` also its log-probabilities at every refusal token (bfloat16, V numbers a token, in
        CPU memory): from then on the factors are of the KL from them, not of the safety loss.
        """
        self.reference_nll, self._reference_logprobs = {}, {}
        with self._quiet():
            for anchor in tracked(anchors, "reference"):
                nll, used_weights, logits = self._token_nll(self._weighted([anchor]))
                self.reference_nll[anchor.where] = (float((nll * used_weights).sum()), float(used_weights.sum()))
                if logprobs:
                    self._reference_logprobs[anchor.where] = logits.log_softmax(-1).to(torch.bfloat16).cpu()

    def __call__(self) -> ProbeResult:
        """Probe the next anchors in turn."""
        return self.measure(next(self.rotation))

    def measure(self, anchors: Sequence[Anchor]) -> ProbeResult:
        """Probe these anchors."""
        batch = self._weighted(anchors)
        mask = batch.attention_mask.bool()
        for name in self.taps.bypassed:
            raise UnsupportedModelError(
                f"{name}: its layer is computed by a fused kernel, so the safety gradient is not known; {FUSED}, or "
                "use null-space without feedback and cosines"
            )
        for name, matrix in self.matrices.items():
            if matrix.expert and matrix.is_lora_a:
                raise UnsupportedModelError(
                    f"{name}: the safety gradient of LoRA on packed experts is not known; leave the experts out of "
                    "target_parameters, or use null-space without feedback and cosines"
                )

        with self._recording(self.matrices) as records:
            nll, weights, logits = self._token_nll(batch)
            loss = (nll * weights).sum() / weights.sum()
            objective = loss
            if self._reference_logprobs:
                reference = torch.cat([self._reference_logprobs[a.where] for a in anchors]).to(logits.device).float()
                kl = (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)
                objective = (kl * weights).sum() / weights.sum()
            moved = gradients(objective, records)
        factors: dict[str, Factors] = {}
        shared: dict[tuple, Tensor] = {}
        for name, calls in moved.items():
            X, D = [], []
            for x, d, tokens in calls:
                if d is not None:
                    # q, k and v read one tensor; so they share what is kept of it
                    place = (x.data_ptr(), x.shape, x.stride(), x.dtype)
                    if place not in shared:
                        shared[place] = used_tokens(name, x, mask, tokens).float()
                    X.append(shared[place])
                    D.append(used_tokens(name, d, mask, tokens).float())
            if not X:
                if self.matrices[name].expert:  # no token of these samples was sent to it
                    factors[name] = self._no_gradient(name)
                    continue
                raise UnsupportedModelError(
                    f"{name}: the safety loss does not pass through this matrix; freeze it, or use null-space, which "
                    f"keeps it fixed; {FUSED}"
                )
            factors[name] = Factors(X[0], D[0]) if len(X) == 1 else Factors(torch.cat(X), torch.cat(D))
        excess = 0.0
        if self.reference_nll:
            known = [self.reference_nll[a.where] for a in anchors]
            excess = float(loss.detach()) - sum(nll for nll, _ in known) / sum(weight for _, weight in known)
        return ProbeResult(float(loss.detach()), factors, excess)

    def _no_gradient(self, name: str) -> Factors:
        matrix = self.matrices[name]
        W = matrix.view(matrix.weight)
        return Factors(W.new_zeros(1, W.shape[1], dtype=torch.float32), W.new_zeros(1, W.shape[0], dtype=torch.float32))

    def loss(self, anchors: Sequence[Anchor]) -> float:
        """The safety loss on these anchors: mean NLL of the refusal tokens, nats. A forward pass for every eight."""
        return self.watch(anchors, {}).loss

    @torch.no_grad()
    def watch(self, anchors: Sequence[Anchor], begins: Mapping[int, Collection[int]]) -> "Watched":
        """Ask these prompts for how their answer begins, and measure the safety loss: one forward pass for both.

        begins: token ids that begin a refusal, and which follow each (`begins_refusal`). What follows the first token
        of the sample's refusal is known.
        """
        total = weight = 0.0
        kept: list[bool] = []
        with self._quiet():
            for start in tracked(range(0, len(anchors), 8), "watched prompts"):
                chunk = anchors[start : start + 8]
                nll, weights, logits = self._token_nll(self._weighted(chunk))
                total, weight = total + float((nll * weights).sum()), weight + float(weights.sum())
                begin = torch.tensor([0, *(len(a.refusal_ids) for a in chunk[:-1])]).cumsum(0)
                first = logits[begin.to(logits.device)].argmax(-1).tolist()
                # of a refusal of one token this is another's, and is not looked at
                second = logits[(begin + 1).clamp(max=len(logits) - 1).to(logits.device)].softmax(-1).cpu()
                for anchor, token, share in zip(chunk, first, second, strict=True):
                    behind = anchor.refusal_ids[0] if len(anchor.refusal_ids) > 1 else None
                    kept.append(begins_refusal(begins, token, behind, share))
        return Watched(total / weight, tuple(kept), sum(kept) / len(kept))

    def refused(self, prompts: Sequence[Sequence[int]], begins: Mapping[int, Collection[int]]) -> list[bool]:
        """Whether the answer to each prompt begins as a refusal, in batches of eight; `begins` as for `watch`.

        In the same pass the first of `begins` stands behind each prompt, and is asked what follows.
        """
        guess = next(iter(begins))
        found: list[bool] = []
        with self._quiet():
            begun = [(*prompt, guess) for prompt in prompts]
            asker = NextToken(self.model, begun, own=2)
            for start in range(0, len(begun), 8):
                first, second = asker.shares_at(begun[start : start + 8], (1, 0))
                for token, share in zip(first.argmax(-1).tolist(), second, strict=True):
                    found.append(begins_refusal(begins, token, guess, share))
        return found

    def _weighted(self, anchors: Sequence[Anchor]) -> AnchorBatch:
        return self._batch(anchors, self.first_tokens, self.first_weight)

    def _token_nll(self, batch: AnchorBatch) -> tuple[Tensor, Tensor, Tensor]:
        """NLL (P,) and weight (P,) of the P refusal tokens of a batch, and the logits (P, V) before them."""
        output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        # the last layers may be on another device than the first
        weights = batch.weights[:, 1:].to(output.logits.device)
        used = weights > 0
        logits = output.logits[:, :-1][used].float()
        targets = batch.input_ids[:, 1:].to(logits.device)[used]
        nll = nn.functional.cross_entropy(logits, targets, reduction="none")
        return nll, weights[used], logits
