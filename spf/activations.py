"""Samples through the model: what its layers read and answer, and the directions of that."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spf.bases import Tokens, log_odds, relative
from spf.data import Anchor, AnchorBatch, collate
from spf.matrices import find_matrices, lora_b_of, used_places, used_tokens
from spf.models import evaluating, logits_only
from spf.progress import tracked
from spf.sharding import reshard
from spf.taps import Seen, Taps

DECISION_TOKENS = (5, 2)
"""Tokens before and after the beginning of the answer that count as deciding on it: the end of the chat template's
prompt ("<|im_end|>", newline, "<|im_start|>", "assistant", newline) and the first two of the refusal."""


Call = tuple[Tensor, Tensor, Tensor | None]
"""What a matrix was given and answered in one call, and which token each row is, if that is known."""

Moved = tuple[Tensor, Tensor | None, Tensor | None]
"""The same with the gradient at the answer in its place; None where the objective does not depend on it."""


def gradients(objective: Tensor, records: Mapping[str, Sequence[Call]]) -> dict[str, list[Moved]]:
    """The gradients of an objective at all recorded answers, by name and call."""
    # records made later would be a checkpointed recomputation's
    calls = {name: list(made) for name, made in records.items()}
    answers = [y for made in calls.values() for _, y, _ in made]
    found = iter(torch.autograd.grad(objective, answers, allow_unused=True) if answers else ())
    return {name: [(x, next(found), tokens) for x, _, tokens in made] for name, made in calls.items()}


def _by_length(anchors: Sequence[Anchor], size: int) -> list[list[Anchor]]:
    """Batches of samples that are about as long, so that little is padding."""
    order = sorted(anchors, key=lambda anchor: len(anchor.prompt_ids) + len(anchor.refusal_ids))
    return [order[start : start + size] for start in range(0, len(order), size)]


class Activations:
    """Sends samples through a model and reads, by module hooks, what its trainable matrices are given and answer.

    It leaves no trace: the training mode of every module and the random state stay as they are.
    """

    def __init__(self, model: PreTrainedModel | nn.Module, pad_token_id: int = 0):
        """
        Raises:
            UnsupportedModelError: see `find_matrices`.
        """
        self.model = model
        reshard(model)
        self.matrices, self.others = find_matrices(model)
        self.taps = Taps(model, self.matrices)
        self.pad_token_id = pad_token_id

    def _decisions(
        self, anchors: Sequence[Anchor], groups: Mapping[str, Sequence[str]], batch_size: int, kind: Tokens
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Name, inputs (T, n), which tokens are around the beginning of the answer (T,), and how much the answers of
        its group to each token move the decision (T,), `relative`; call by call.

        groups: matrices that read the same inputs, by the name that stands for them.
        """
        # a fresh lora_B is zero, so lora_A's own outputs have no gradient
        members = [name for group in groups.values() for name in group]
        answers = {name: self.taps.answers_of(name, lora_b_of(name)) for name in members}
        tapped = [name for name in dict.fromkeys([*groups, *answers.values()]) if name in self.matrices]
        head = set(self.model.get_output_embeddings().modules())  # type: ignore[operator]
        ends = any(module in head for name in tapped for module in self.matrices[name].modules)

        for chunk in tracked(_by_length(anchors, batch_size), "safety samples"):
            batch = self._batch(chunk)
            mask, predicts, deciding = self._places(batch)
            rows, columns = (predicts & (predicts.cumsum(1) <= DECISION_TOKENS[1])).nonzero(as_tuple=True)
            # a matrix at the end is given all tokens; without one, logits of the deciding tokens are enough
            few = nullcontext() if ends else logits_only(self.model, rows, columns)
            with few, self._recording(tapped) as records:
                output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                logits = output.logits
                logits = logits[rows.to(logits.device), columns.to(logits.device)] if ends else logits
                targets = batch.input_ids[rows, columns + 1].to(logits.device)
                found = gradients(log_odds(logits.float(), targets).sum(), records)
            mask = mask & (predicts == (kind == "refusal")) if kind != "all" else mask
            for name, group in groups.items():
                for call, (x, _, known) in enumerate(found[name]):
                    tokens = used_places(name, x, mask, known)
                    read = used_tokens(name, x, mask, known)
                    total = torch.zeros(len(read), device=read.device)
                    for member in group:
                        calls = found.get(answers[member], [])
                        if call < len(calls) and (d := calls[call][1]) is not None:
                            used = used_tokens(member, d, mask, known)
                            total += used.float().square().sum(-1).to(total.device)
                    around = deciding.flatten()[tokens].to(read.device)
                    samples = (tokens // mask.shape[1]).to(read.device)
                    yield name, read, around, relative(total, samples)

    @contextmanager
    def _recording(self, names: Iterable[str]) -> Iterator[dict[str, list[Call]]]:
        """Keep every call of the named matrices, with gradients on, for `gradients`."""
        records: dict[str, list[Call]] = {name: [] for name in names}

        def tap(name: str) -> Seen:
            def see(x: Tensor, y: Tensor, tokens: Tensor | None) -> None:
                if not y.requires_grad:
                    y.requires_grad_(True)  # nothing below it is trainable, so it is a leaf; the graph begins here
                records[name].append((x.detach(), y, tokens))

            return see

        with torch.enable_grad(), self._quiet(), self.taps.open(tap, list(records)):
            yield records

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

        # what two experts read of one sample says nothing of the others
        plain = self.taps.plain(names)

        def called(names: Sequence[str]) -> set[str]:
            inputs.clear()
            self._stream(anchors, names, take, len(anchors))
            return set(inputs)

        if self.taps.find_bypassed(set(plain) - called(plain), called) or len(inputs) < len(plain):
            called(plain)
        order = list(inputs)
        shared = {name: name for name in names}
        for i, name in enumerate(order):
            # those that share an input are called one after the other
            before = [other for other in order[max(0, i - 3) : i] if same(inputs[name], inputs[other])]
            if before:
                shared[name] = shared[before[0]]
        return shared

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

        def tap(name: str) -> Seen:
            def see(x: Tensor, y: Tensor, tokens: Tensor | None) -> None:
                around = deciding.flatten()[used_places(name, x, mask, tokens)].to(x.device)
                take(name, used_tokens(name, x, mask, tokens), used_tokens(name, y, mask, tokens), around)

            return see

        with self._quiet(), self.taps.open(tap, names):
            for chunk in tracked(_by_length(anchors, batch_size), "safety samples"):
                batch = self._batch(chunk)
                mask, predicts, deciding = self._places(batch)
                if kind != "all":
                    mask &= predicts == (kind == "refusal")
                self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    @staticmethod
    def _places(batch: AnchorBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens (B, L) are no padding, which predict the refusal, and which are around its beginning."""
        mask = batch.attention_mask.bool()
        # the last prompt token predicts the first refusal token, so it counts with the refusal
        predicts = torch.cat([batch.weights[:, 1:], torch.zeros_like(batch.weights[:, :1])], 1) > 0
        before, after = DECISION_TOKENS
        begin = predicts.int().argmax(1)[:, None] + 1
        place = torch.arange(mask.shape[1], device=mask.device)
        deciding = (place >= begin - before) & (place < begin + after) & predicts.any(1, keepdim=True)
        return mask, predicts, deciding

    def _batch(self, anchors: Sequence[Anchor], first_tokens: int = 0, first_weight: float = 1.0) -> AnchorBatch:
        device = next(self.model.parameters()).device
        batch = collate(anchors, self.pad_token_id, first_tokens, first_weight)
        return AnchorBatch(batch.input_ids.to(device), batch.attention_mask.to(device), batch.weights.to(device))

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
