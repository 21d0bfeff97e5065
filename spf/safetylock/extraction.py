"""Extraction: activations at the end of safe and unsafe answers -> probes, head ranking, directions."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spf.config import Count, Seed, check
from spf.logistic import fit_logistic
from spf.models import evaluating
from spf.progress import tracked
from spf.safetylock.heads import AttentionOutput, Geometry, Model, attention_outputs
from spf.safetylock.lock import (
    LockInfo,
    SafetyLock,
    Score,
    ValFraction,
    locks_on,
    sketch,
    template_hash,
    tokenizer_hash,
    weights_hash,
)
from spf.safetylock.pairs import Pair, digest, distinct, encode, mean_words
from spf.safetylock.probes import judge_probes, mass_mean, rank_heads, validation_pairs


@dataclass(frozen=True)
class Recording:
    """Inputs of o_proj at the last positions of the answers, on disk, one file a layer.

    `safe` (S,) bool and `pair` (S,) int64 say of each sample which answer and which pair it belongs to.
    """

    files: list[Path]
    geometry: Geometry
    safe: Tensor
    pair: Tensor

    def layer(self, number: int) -> Tensor:
        """(heads, S, head_dim) float32."""
        shape = (len(self.safe), self.geometry.heads, self.geometry.head_dim)
        return torch.from_numpy(np.fromfile(self.files[number], np.float32).reshape(shape)).transpose(0, 1)


@contextmanager
def recorded(
    model: Model, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], window: int, batch_size: int
) -> Iterator[Recording]:
    """Run the answers of all pairs through the model once; the recording lasts as long as the context.

    Every one of the last `window` answer tokens is a sample (fewer where an answer is shorter). Memory holds one
    batch, and later one layer; the rest is in temporary files (4 bytes * samples * layers * heads * head_dim).
    """
    outputs, geometry = attention_outputs(model)
    chats = []
    for number, pair in enumerate(pairs):
        for safe, answer in ((True, pair.safe), (False, pair.unsafe)):
            ids, length = encode(pair.messages, answer, pair.where, tokenizer)
            chats.append((ids, min(window, length), safe, number))
    # Batches of like length pad little; the sort is stable, so only the pairs decide the order.
    chats.sort(key=lambda chat: len(chat[0]))
    with tempfile.TemporaryDirectory(prefix="spf-safetylock-") as directory:
        files = [Path(directory) / f"layer{output.layer}.f32" for output in outputs]
        with evaluating(model):
            for start in tracked(range(0, len(chats), batch_size), "answers of all pairs"):
                batch = chats[start : start + batch_size]
                _record(model, outputs, files, [(ids, kept) for ids, kept, _, _ in batch])
        yield Recording(
            files,
            geometry,
            torch.tensor([safe for _, kept, safe, _ in chats for _ in range(kept)]),
            torch.tensor([number for _, kept, _, number in chats for _ in range(kept)]),
        )


@torch.no_grad()
def _record(
    model: Model, outputs: Sequence[AttentionOutput], files: Sequence[Path], batch: Sequence[tuple[list[int], int]]
) -> None:
    width = max(len(ids) for ids, _ in batch)
    # Padding stands on the right, where a causal model cannot see it.
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch], device=model.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch], device=model.device)
    rows = torch.tensor([i for i, (_, kept) in enumerate(batch) for _ in range(kept)])
    tokens = torch.tensor([t for ids, kept in batch for t in range(len(ids) - kept, len(ids))])

    def tap(path: Path) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            with path.open("ab") as file:
                file.write(x[rows.to(x.device), tokens.to(x.device)].float().cpu().contiguous().numpy().tobytes())

        return hook

    handles = [output.module.register_forward_pre_hook(tap(path)) for output, path in zip(outputs, files, strict=True)]
    try:
        # The decoder alone: logits are not needed.
        model.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def extract(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    k: Count = 24,
    window: Count = 5,
    alpha: float = 6.0,
    val_fraction: ValFraction = 0.4,
    score: Score = "val",
    seed: Seed = 0,
    batch_size: Count = 16,
    base_model: str | None = None,
) -> SafetyLock:
    """Make a lock from the ORIGINAL aligned model: the k heads that best tell safe from unsafe answers.

    Samples are the inputs of o_proj at the last `window` tokens of each answer. Pairs, not tokens, are split
    for the probes; heads are ranked by validation accuracy (or, as in the released code, by its mean with the
    training accuracy), ties by validation loss. Directions and standard deviations use all samples. The result
    depends on the set of pairs and the seed, not on the pairs' order. `alpha` is stored as the lock's default
    strength. Zhu et al., arXiv 2410.10343.

    Raises:
        ValueError: k exceeds the heads there are, too few distinct questions, a locked model, a head without
            difference between the classes, or activations with NaN or inf.
        SafetyDataError: a pair that cannot be rendered.
    """
    given = {"k": k, "window": window, "alpha": alpha, "val_fraction": val_fraction, "score": score, "seed": seed}
    check(extract, given | {"batch_size": batch_size}, "extract: {}")
    _, geometry = attention_outputs(model)
    if k > geometry.layers * geometry.heads:
        raise ValueError(f"{k} heads asked for; the model has {geometry.layers * geometry.heads}")
    if locks_on(model):
        raise ValueError("the model is locked; extract from the original model")
    kept = distinct(pairs)
    validation = validation_pairs([pair.key for pair in kept], val_fraction, seed)
    train_accuracy = torch.zeros(geometry.layers, geometry.heads)
    val_accuracy = torch.zeros(geometry.layers, geometry.heads)
    val_loss = torch.zeros(geometry.layers, geometry.heads)
    directions = torch.zeros(geometry.layers, geometry.heads, geometry.head_dim)
    sigmas = torch.zeros(geometry.layers, geometry.heads)
    with recorded(model, tokenizer, kept, window, batch_size) as recording:
        held_out = validation[recording.pair]
        for layer in tracked(range(geometry.layers), "probes"):
            X = recording.layer(layer)
            if not torch.isfinite(X).all():
                raise ValueError(f"layer {layer}: the activations hold NaN or inf")
            train, y = X[:, ~held_out], recording.safe[~held_out]
            weights = fit_logistic(train, y)
            train_accuracy[layer] = judge_probes(train, y, weights)[0].float()
            accuracy, loss = judge_probes(X[:, held_out], recording.safe[held_out], weights)
            val_accuracy[layer], val_loss[layer] = accuracy.float(), loss.float()
            direction, sigma = mass_mean(X, recording.safe)
            directions[layer], sigmas[layer] = direction.float(), sigma.float()
    heads = rank_heads(val_accuracy if score == "val" else (val_accuracy + train_accuracy) / 2, val_loss)[:k]
    layers, numbers = heads[:, 0], heads[:, 1]
    chosen = directions[layers, numbers]
    if not chosen.any(1).all():
        dead = heads[~chosen.any(1)][0].tolist()
        raise ValueError(f"layer {dead[0]}, head {dead[1]}: safe and unsafe answers do not differ; use a smaller k")
    safe_words, unsafe_words = mean_words(kept)
    info = LockInfo(
        base_model=base_model or model.config.name_or_path or type(model).__name__,
        base_hash=weights_hash(model),
        model_type=model.config.model_type,
        geometry=geometry,
        tokenizer_hash=tokenizer_hash(tokenizer),
        template_hash=template_hash(tokenizer),
        dtype=str(model.dtype).removeprefix("torch."),
        window=window,
        pairs=len(kept),
        duplicates=len(pairs) - len(kept),
        words_safe=round(safe_words, 2),
        words_unsafe=round(unsafe_words, 2),
        data_hash=digest([pair.key for pair in kept]),
        seed=seed,
        val_fraction=val_fraction,
        score=score,
        alpha=alpha,
        spf_version=version("spf"),
    )
    return SafetyLock(
        heads, chosen, sigmas[layers, numbers], train_accuracy, val_accuracy, val_loss, sketch(model), info
    )


def transfer_cosines(
    lock: SafetyLock,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 16,
) -> Tensor:
    """(K,) float32: for each head of the lock, the cosine between its direction and the one `model` itself gives.

    With the pairs the lock was made from, this measures how well directions transfer to a descendant.
    """
    cosines = torch.zeros(len(lock.heads))
    with recorded(model, tokenizer, distinct(pairs), lock.info.window, batch_size) as recording:
        for layer in sorted(set(lock.heads[:, 0].tolist())):
            direction, _ = mass_mean(recording.layer(layer), recording.safe)
            for i in (lock.heads[:, 0] == layer).nonzero().flatten().tolist():
                cosines[i] = direction[lock.heads[i, 1]].float() @ lock.directions[i]
    return cosines
