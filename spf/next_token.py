"""What a model says next: many prompts asked for one token, shared by processes, kept on disk."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from spf.files import write_json
from spf.models import evaluating
from spf.progress import progress as bar_of
from spf.sharding import gather_objects, is_first, rank_and_ranks, sees_all, shares_parameters
from spf.shared_prefix import NextToken

T = TypeVar("T")

Answered = dict[tuple[int, ...], tuple[float, int]]
"""By prompt the probability that one of its tokens comes next, and the likeliest next token."""

_ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)

TOGETHER, TOKENS = 64, 2048
"""So many prompts are asked together at most, and so many tokens with their padding, or one prompt. Many short ones
keep a GPU busy; few long ones fit where training does."""

CONFIRM = 0.2
"""A prompt is refused if the likeliest first token begins a refusal, and it goes on as one with this probability. A
token such as "I" begins other answers, too."""

SAVE_SECONDS = 20.0
"""How often what was asked is written, so that an interrupted audit goes on."""


def begins_of(refusals: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """By the first token of these refusals (token ids), the most common first, which tokens follow it."""
    counts = Counter(refusal[0] for refusal in refusals if refusal)
    return {
        first: {refusal[1] for refusal in refusals if len(refusal) > 1 and refusal[0] == first}
        for first, _ in counts.most_common()
    }


def begins_refusal(begins: Mapping[int, Collection[int]], token: int, behind: int | None, share: Tensor) -> bool:
    """Whether an answer with this likeliest first token is a refusal by how it begins.

    begins: as of `begins_of`. share (V,): the probabilities of the token after `behind`. An answer that begins with
    that one has to go on as a refusal (`CONFIRM`); how another goes on was not asked.
    """
    seconds = list(begins.get(token, ()))
    return token in begins and (token != behind or not seconds or float(share[seconds].sum()) >= CONFIRM)


class Known:
    """What was asked before, by a hash of the prompt: of the same model and the same question only.

    path: JSON file that keeps it; none where a process sees a part of the weights only, which have no fingerprint.
    about: what else the answers depend on.
    """

    def __init__(self, model: nn.Module, path: Path | None = None, about: str = ""):
        self.path = path if path is not None and sees_all(model) else None
        self.answers: dict[str, list[float]] = {}
        self.saved = time.monotonic()
        if self.path is None:
            return
        self.key = hashlib.sha256(f"{fingerprint(model)}\n{about}".encode()).hexdigest()
        if self.path.is_file():
            try:
                kept = json.loads(self.path.read_text("utf-8"))
                self.answers = dict(kept["answers"]) if kept["key"] == self.key else {}
            except (ValueError, KeyError, TypeError):
                self.answers = {}  # damaged, or of another version: asked again

    @staticmethod
    def name(prompt: Sequence[int]) -> str:
        return hashlib.sha256(repr(tuple(prompt)).encode()).hexdigest()[:32]

    def put(self, found: Answered) -> None:
        self.answers |= {self.name(prompt): list(answer) for prompt, answer in found.items()}

    def add(self, found: Iterable[Answered]) -> None:
        for one in found:
            self.put(one)
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        if self.path is not None and self.answers and is_first():
            write_json(self.path, {"key": self.key, "answers": self.answers})
            self.saved = time.monotonic()


def fingerprint(model: nn.Module) -> str:
    """A hash of the weights and of the scales of LoRA adapters; an adapter that changes nothing yet does not count, nor
    one that is not active, nor do trained rows of tokens."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    adapters = adapters_of(model)
    counted = {
        name: weight
        for name, weight in weights.items()
        if (name not in adapters or adapters[name].active) and _counts(name, weight, weights)
    }
    return hash_of(counted, adapters)


@dataclass(frozen=True)
class Adapter:
    """What a parameter is a part of. scale: what LoRA multiplies the product with; others have none here."""

    name: str
    active: bool
    scale: float | None


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """By parameter the adapter that it is a part of."""
    found = {}
    layers: Iterable[tuple[str, Any]] = ((n, one) for n, one in model.named_modules() if isinstance(one, _ADAPTED))
    for place, layer in layers:
        for name, _ in layer.named_parameters(remove_duplicate=False):
            kind, _, rest = name.partition(".")
            adapter = rest.partition(".")[0]
            if isinstance(layer.get_submodule(kind) if rest else None, nn.ModuleDict | nn.ParameterDict):
                active = not layer.disable_adapters and adapter in layer.active_adapters
                scale = layer.scaling[adapter] if isinstance(layer, LoraLayer) else None
                found[f"{place}.{name}"] = Adapter(adapter, active, scale)
    return found


def hash_of(weights: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> str:
    """A hash of some numbers of each, in bfloat16, and of the scales of their adapters."""
    digest = hashlib.sha256()
    for weight in weights.values():
        numbers = weight.detach().flatten()
        some = numbers[:: max(1, numbers.numel() // 8)].to(torch.bfloat16)
        digest.update(repr(some.float().cpu().tolist()).encode())
    for name in weights:
        if name in adapters and adapters[name].scale is not None:
            digest.update(repr(adapters[name].scale).encode())
    return digest.hexdigest()


def _counts(name: str, parameter: Tensor, weights: Mapping[str, Tensor]) -> bool:
    """Whether a weight is a part of what the model says: of adapters that learned something only."""
    if any(part in name for part in ("lora_", "trainable_tokens")):
        # what is added is a product with B, or with the other embedding: of zeros in a fresh adapter
        return any(part in name for part in ("lora_B", "lora_embedding_A")) and bool(parameter.detach().any())
    if "modules_to_save" in name:
        head, _, rest = name.partition("modules_to_save.")
        original = weights.get(f"{head}original_module.{rest.partition('.')[2]}")
        return original is None or not torch.equal(original.detach(), parameter.detach())
    return True


@dataclass(frozen=True)
class Guess:
    """A token that is expected to come next, and those of which one may `follow` it."""

    token: int
    follow: Sequence[int]


def ask(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    known: Known,
    progress: bool,
    what: str,
    guess: Guess | None = None,
) -> list[tuple[float, int]]:
    """For each prompt the probability that one of its tokens comes next, and the likeliest next token. what: the bar's
    name.

    guess: where it is right, how likely one of what follows is after it is known from then on, from the same pass.
    """
    answers: list[tuple[float, int] | None] = [None] * len(prompts)
    for i, prompt in enumerate(prompts):
        if (kept := known.answers.get(known.name(prompt))) is not None:
            answers[i] = (float(kept[0]), int(kept[1]))
    # what rank 0 knows, all know: they have to make the same number of passes
    answers = gather_objects(answers)[0]
    left = [i for i, answer in enumerate(answers) if answer is None]
    own = [tuple(prompts[i]) for i in left]
    with evaluating(model):
        asker = NextToken(model, [(*prompt, guess.token) for prompt in own], own=2) if guess else NextToken(model, own)

        def read(batch: Sequence[int]) -> list[Answered]:
            found = _answered(asker, [tuple(prompts[i]) for i in batch], [tokens[i] for i in batch], guess)
            known.add(found)
            return found

        for i, answered in shared_out(model, prompts, left, read, progress, what).items():
            answers[i] = answered[tuple(prompts[i])]
            known.put(answered)
    return [answer for answer in answers if answer is not None]


def _answered(
    asker: NextToken, prompts: Sequence[tuple[int, ...]], tokens: Sequence[Sequence[int]], guess: Guess | None
) -> list[Answered]:
    """What was answered to each prompt, and where a guess is right to the prompt with it, too."""
    if guess is None:
        return [{prompt: answer} for prompt, answer in zip(prompts, asker.ask(prompts, tokens), strict=True)]
    begun = [(*prompt, guess.token) for prompt in prompts]
    kinds = asker.ask_twice(begun, tokens, guess.follow)
    return [
        {prompt: first, longer: second} if first[1] == guess.token else {prompt: first}
        for prompt, longer, first, second in zip(prompts, begun, *kinds, strict=True)
    ]


def in_batches(lengths: Mapping[int, int], ranks: int = 1) -> list[list[int]]:
    """Prompts of these lengths in batches of similar ones, so that little is padding; one a rank if possible."""
    most = min(TOGETHER, -(-len(lengths) // ranks))
    batches: list[list[int]] = []
    for i in sorted(lengths, key=lengths.__getitem__):
        # the longest comes last
        if batches and len(batches[-1]) < most and (len(batches[-1]) + 1) * lengths[i] <= TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def shared_out(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    which: Iterable[int],
    read: Callable[[Sequence[int]], Iterable[T]],
    progress: bool,
    what: str,
) -> dict[int, T]:
    """What `read` makes of `which` prompts, in batches of similar length that all processes of a run share. what: the
    bar's name."""
    rank, ranks = rank_and_ranks()
    batches = in_batches({i: len(prompts[i]) for i in which}, ranks)
    rounds = -(-len(batches) // ranks)
    own: dict[int, T] = {}
    in_step = shares_parameters(model)
    with bar_of(rounds, what, shown=progress) as bar:
        for turn in range(rounds):
            number = turn * ranks + rank
            if number < len(batches) or in_step:
                # those that gather each other's parameters make the same number of passes
                batch = batches[min(number, len(batches) - 1)]
                own |= zip(batch, read(batch), strict=True)
            bar.update()
    return {i: found for part in gather_objects(own) for i, found in part.items()}
