"""SafetyProbe: one small forward/backward pass -> safety loss and factored safety gradients."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spf.bases import InputSketch, Tokens
from spf.config import Count, Seed, Weight, Whole, check
from spf.data import Anchor, AnchorBatch, AnchorRotation, collate
from spf.errors import UnsupportedModelError
from spf.linalg import project_out_right
from spf.matrices import find_matrices, used_tokens
from spf.models import evaluating
from spf.progress import progress, tracked
from spf.sharding import reshard, spread_over_ranks
from spf.subspace import Factors

DECISION_TOKENS = (5, 2)
"""Tokens before and after the beginning of the answer that count as deciding on it: the end of the chat template's
prompt ("<|im_end|>", newline, "<|im_start|>", "assistant", newline) and the first two of the refusal."""


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


@dataclass(frozen=True)
class Watched:
    """What was seen of watched prompts.

    loss: mean NLL of the refusal tokens, nats. first: the likeliest first token of each answer. refused: the share of
    these that begins a refusal.
    """

    loss: float
    first: tuple[int, ...]
    refused: float


class SafetyProbe:
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
        self.model = model
        reshard(model)
        self.matrices, self.others = find_matrices(model)
        self.rotation = AnchorRotation(anchors, min(anchors_per_step, len(anchors)), seed)
        self.pad_token_id = pad_token_id
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
                batch = self._batch([anchor])
                nll, used_weights, logits = self._token_nll(batch)
                self.reference_nll[anchor.where] = (float((nll * used_weights).sum()), float(used_weights.sum()))
                if logprobs:
                    self._reference_logprobs[anchor.where] = logits.log_softmax(-1).to(torch.bfloat16).cpu()

    def __call__(self) -> ProbeResult:
        """Probe the next anchors in turn."""
        return self.measure(next(self.rotation))

    def measure(self, anchors: Sequence[Anchor]) -> ProbeResult:
        """Probe these anchors."""
        batch = self._batch(anchors)
        mask = batch.attention_mask.bool()
        taps: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.matrices}

        def tap(name: str) -> Callable:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                if not output.requires_grad:
                    # Nothing below it is trainable, so it is a leaf; the graph begins here.
                    output.requires_grad_(True)
                taps[name].append((inputs[0].detach(), output))

            return hook

        with torch.enable_grad(), self._quiet(), self._hooked(tap, self.matrices):
            nll, weights, logits = self._token_nll(batch)
            loss = (nll * weights).sum() / weights.sum()
            objective = loss
            if self._reference_logprobs:
                reference = torch.cat([self._reference_logprobs[a.where] for a in anchors]).to(logits.device).float()
                kl = (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)
                objective = (kl * weights).sum() / weights.sum()
            # Records made later would be a checkpointed recomputation's.
            records = {name: list(pairs) for name, pairs in taps.items()}
            flat = [output for pairs in records.values() for _, output in pairs]
            gradients = iter(torch.autograd.grad(objective, flat, allow_unused=True))
        factors: dict[str, Factors] = {}
        shared: dict[tuple, Tensor] = {}
        for name, pairs in records.items():
            X, D = [], []
            for x, _ in pairs:
                d = next(gradients)
                if d is not None:
                    # q, k and v read one tensor; so they share what is kept of it
                    place = (x.data_ptr(), x.shape, x.stride(), x.dtype)
                    if place not in shared:
                        shared[place] = used_tokens(name, x, mask).float()
                    X.append(shared[place])
                    D.append(used_tokens(name, d, mask).float())
            if not X:
                raise UnsupportedModelError(f"{name}: the safety loss does not pass through this matrix")
            factors[name] = Factors(X[0], D[0]) if len(X) == 1 else Factors(torch.cat(X), torch.cat(D))
        excess = 0.0
        if self.reference_nll:
            known = [self.reference_nll[a.where] for a in anchors]
            excess = float(loss.detach()) - sum(nll for nll, _ in known) / sum(weight for _, weight in known)
        return ProbeResult(float(loss.detach()), factors, excess)

    def loss(self, anchors: Sequence[Anchor]) -> float:
        """The safety loss on these anchors: mean NLL of the refusal tokens, nats. A forward pass for every eight."""
        return self.watch(anchors).loss

    @torch.no_grad()
    def watch(self, anchors: Sequence[Anchor], begins: Collection[int] = ()) -> "Watched":
        """Ask these prompts for their answer's first token, and measure the safety loss: one forward pass for both.

        begins: token ids that begin a refusal; a prompt whose likeliest first token is one of them counts as refused.
        """
        total = weight = 0.0
        first: list[int] = []
        with self._quiet():
            for start in tracked(range(0, len(anchors), 8), "watched prompts"):
                chunk = anchors[start : start + 8]
                nll, weights, logits = self._token_nll(self._batch(chunk))
                total, weight = total + float((nll * weights).sum()), weight + float(weights.sum())
                begin = torch.tensor([0, *(len(a.refusal_ids) for a in chunk[:-1])]).cumsum(0)
                first += logits[begin.to(logits.device)].argmax(-1).tolist()
        return Watched(total / weight, tuple(first), sum(token in begins for token in first) / len(first))

    @torch.no_grad()
    def input_bases(
        self,
        anchors: Sequence[Anchor],
        names: Sequence[str],
        *,
        rank: int,
        energy: float = 1.0,
        tokens: Tokens = "all",
        decision_weight: float = 1.0,
        batch_size: int = 8,
    ) -> dict[str, Tensor]:
        """V (n, k), float32, per named matrix: the leading directions of its inputs over the anchors' tokens.

        The tokens around the beginning of the answer, where a refusal is decided (`DECISION_TOKENS`), weigh
        `decision_weight`, all others 1.

        Raises:
            UnsupportedModelError: an anchor sends NaN or inf through a matrix, or none passes through it.
        """
        shared = self._shared_inputs(anchors[:1], names)
        # Twice the rank and 16 more keep the sketched directions accurate (Halko et al., section 4.2).
        sketches = {name: InputSketch(2 * rank + 16) for name in dict.fromkeys(shared.values())}

        def take(name: str, x: Tensor, y: Tensor, deciding: Tensor) -> None:
            try:
                sketches[name].add(x, 1 + (decision_weight - 1) * deciding)
            except ValueError as error:
                raise UnsupportedModelError(f"{name}: {error}") from error

        self._stream(anchors, list(sketches), take, batch_size, tokens)
        for name, sketch in sketches.items():
            if sketch.count == 0:
                raise UnsupportedModelError(f"{name}: no safety sample passes through this matrix")
        # a sketch leaves when its basis is made, so that they are never all there at once
        with progress(len(sketches), "held directions") as bar:

            def basis(name: str) -> Tensor:
                bar.update()
                return sketches.pop(name).basis(rank, energy)

            bases = spread_over_ranks(list(sketches), basis)
        return {name: bases[shared[name]] for name in names}

    def _shared_inputs(self, anchors: Sequence[Anchor], names: Sequence[str]) -> dict[str, str]:
        """For every name the first one that reads the same tensors in all its calls, as q, k and v projections do."""
        inputs: dict[str, list[Tensor]] = {}

        def take(name: str, x: Tensor, y: Tensor, deciding: Tensor) -> None:
            inputs.setdefault(name, []).append(x)

        def same(one: list[Tensor], other: list[Tensor]) -> bool:
            return len(one) == len(other) and all(
                a.shape == b.shape and a.device == b.device and torch.equal(a, b)
                for a, b in zip(one, other, strict=True)
            )

        self._stream(anchors, names, take, len(anchors))
        called = list(inputs)
        shared = {name: name for name in names}
        for i, name in enumerate(called):
            # those that share an input are called one after the other
            before = [other for other in called[max(0, i - 3) : i] if same(inputs[name], inputs[other])]
            if before:
                shared[name] = shared[before[0]]
        return shared

    def response_norms(self, anchors: Sequence[Anchor], names: Sequence[str]) -> dict[str, float]:
        """Root mean square of each named matrix's outputs over all tokens of the anchors."""
        return self._norms(anchors, names, lambda name, x, y: y.float())

    def free_shares(self, anchors: Sequence[Anchor], bases: Mapping[str, Tensor]) -> dict[str, float]:
        """Root mean square over the anchors' tokens of |x - V V^T x| / |x|, x a matrix's inputs, V (n, k) its basis."""

        def free(name: str, x: Tensor, y: Tensor) -> Tensor:
            # with DeepSpeed's offload the bases are where the optimizer is
            return project_out_right(nn.functional.normalize(x.float(), dim=-1), bases[name].to(x.device))

        return self._norms(anchors, list(bases), free)

    @torch.no_grad()
    def _norms(
        self, anchors: Sequence[Anchor], names: Sequence[str], of: Callable[[str, Tensor, Tensor], Tensor]
    ) -> dict[str, float]:
        """Root mean square over the anchors' tokens of what `of` makes of a named matrix's inputs and outputs."""
        squares, tokens = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)

        def take(name: str, x: Tensor, y: Tensor, deciding: Tensor) -> None:
            squares[name] += float(of(name, x, y).square().sum())
            tokens[name] += len(x)

        self._stream(anchors, names, take, batch_size=16)
        return {name: (total / max(tokens[name], 1)) ** 0.5 for name, total in squares.items()}

    def _stream(
        self,
        anchors: Sequence[Anchor],
        names: Sequence[str],
        take: Callable[[str, Tensor, Tensor, Tensor], None],
        batch_size: int,
        kind: Tokens = "all",
    ) -> None:
        """Hand inputs (T, n) and outputs (T, m) of the named matrices to `take`, call by call.

        Its last argument (T,), bool, says which tokens are around the beginning of the answer.
        """
        mask = deciding = torch.empty(0)

        def tap(name: str) -> Callable:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                x = inputs[0]
                take(name, used_tokens(name, x, mask), used_tokens(name, output, mask), deciding[mask].to(x.device))

            return hook

        with self._quiet(), self._hooked(tap, names):
            for start in tracked(range(0, len(anchors), batch_size), "safety samples"):
                batch = self._batch(anchors[start : start + batch_size])
                mask = batch.attention_mask.bool()
                # the last prompt token predicts the first refusal token, so it counts with the refusal
                predicts = torch.cat([batch.weights[:, 1:], torch.zeros_like(batch.weights[:, :1])], 1) > 0
                before, after = DECISION_TOKENS
                begin = predicts.int().argmax(1)[:, None] + 1
                place = torch.arange(mask.shape[1], device=mask.device)
                deciding = (place >= begin - before) & (place < begin + after) & predicts.any(1, keepdim=True)
                if kind != "all":
                    mask &= predicts == (kind == "refusal")
                self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def _batch(self, anchors: Sequence[Anchor]) -> AnchorBatch:
        device = next(self.model.parameters()).device
        batch = collate(anchors, self.pad_token_id, self.first_tokens, self.first_weight)
        return AnchorBatch(batch.input_ids.to(device), batch.attention_mask.to(device), batch.weights.to(device))

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

    @contextmanager
    def _hooked(self, tap: Callable[[str], Callable], names: Iterable[str]) -> Iterator[None]:
        handles = [module.register_forward_hook(tap(name)) for name in names for module in self.matrices[name].modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Evaluation mode (no dropout, no checkpointing) and the random state put back afterwards."""
        device = next(self.model.parameters()).device
        # torch.compile would skip hooks that are registered after compilation
        with (
            evaluating(self.model),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
