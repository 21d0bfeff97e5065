"""Training in the controlled world: pre-training with instruction tuning, then three safety protocols.

Every batch is drawn from its own seed (run, stage, step), so a run that was interrupted continues with the same bytes.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from annotated_types import MaxLen, MinLen
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from spf.config import Count, File, NotNegative, parse_json, read_json
from spf.files import atomic_path, read_tensors, write_json
from spf.lab.study.data import SEGMENT_1, SEGMENT_2, TEXT, Sampler, Samples, WorldSettings
from spf.progress import progress

Protocol = Literal["instruct", "ssft", "dpo", "unlearning"]
PROTOCOLS: tuple[Protocol, ...] = ("ssft", "dpo", "unlearning")

STAGE_NUMBER = {"pretraining": 0, "instruct": 1, "ssft": 2, "dpo": 2, "unlearning": 2, "test": 3, "bridge": 4}
"""Second part of a batch's seed. The safety protocols see the same prompts."""


AGAIN = "remove it, and the stage is done again"


@dataclass(frozen=True)
class Schedule:
    """An AdamW run. Linear warm-up, then a cosine from rate to floor; gradients are clipped after backward."""

    steps: int
    batch: int
    rate: float
    warmup: int = 0
    floor: float = 1e-7
    weight_decay: float = 1e-4
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (self.rate - self.floor) * (1 + cos(pi * progress)) / 2


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood of each label given the tokens before it, (N, L - 1), 0 where the label is -100."""
    logits = logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")


def sequence_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log likelihood of each sequence's labels, (N,), in nats a token, whatever the number of labels.

    Raises:
        ValueError: a sequence has no label, so that a term of a loss would silently be empty.
    """
    counts = (labels[:, 1:] != -100).sum(1)
    if bool((counts == 0).any()):
        raise ValueError("sequence_nll: a sequence has no labels")
    return token_nll(logits, labels).sum(1) / counts


def unlearning_loss(preferred: Tensor, dispreferred: Tensor, gamma: float) -> Tensor:
    """l(y_p) - gamma l(y_l), averaged; (N,) mean nats a token (Jain et al., section 3; gamma .1 or .01)."""
    return (preferred - gamma * dispreferred).mean()


def dpo_loss(
    preferred: Tensor, dispreferred: Tensor, ref_preferred: Tensor, ref_dispreferred: Tensor, beta: float, gamma: float
) -> Tensor:
    """-log sigmoid(beta [l_ref(y_p) - l(y_p)] - gamma [l_ref(y_l) - l(y_l)]), averaged; (N,) mean nats a token.

    The study's form. TRL's DPOTrainer has one beta for both terms, so it computes this loss for gamma = beta only
    (and with sums instead of means); the study's gamma is a tenth of its beta or less, hence this function.
    """
    margin = beta * (ref_preferred - preferred) - gamma * (ref_dispreferred - dispreferred)
    return -F.logsigmoid(margin).mean()


Modes = tuple[tuple[float, float, float, float], tuple[float, float, float, float]]

STUDY_MODES: Modes = ((0.5, 0.1, 0.2, 0.2), (0.1, 0.2, 0.3, 0.4))
"""Probabilities of the loss modes text, text and segments, first segment, last segment; first and last step."""


def mode_probabilities(step: int, schedule: Schedule, modes: Modes = STUDY_MODES) -> np.ndarray:
    """Of the four loss modes at a step: constant for half of the warm-up, then linear in steps.

    With one segment the last two modes are the same.
    """
    begin, end = np.array(modes[0]), np.array(modes[1])
    hold = schedule.warmup / 2
    share = min(1.0, max(0.0, (step - hold) / max(1.0, schedule.steps - hold)))
    return begin + share * (end - begin)


def pretraining_labels(samples: Samples, modes: np.ndarray, pairs: int) -> Tensor:
    """Labels (N, L) of samples by loss mode (N,) 0 ... 3."""
    last = SEGMENT_2 if pairs == 2 else SEGMENT_1
    by_mode = [
        samples.labels(TEXT),
        samples.labels(TEXT, SEGMENT_1, SEGMENT_2),
        samples.labels(SEGMENT_1),
        samples.labels(last),
    ]
    rows = torch.arange(len(modes))
    return torch.stack(by_mode)[torch.from_numpy(modes), rows]


@dataclass(frozen=True)
class Task:
    """What a safety protocol is told: beta and gamma of DPO, gamma of unlearning, share of unsafe prompts."""

    unsafe_share: float
    beta: float = 0.0
    gamma: float = 0.0


TASKS_BY_RATE: dict[str, dict[Protocol, Task]] = {
    "medium": {
        "instruct": Task(0.0),
        "ssft": Task(0.2),
        "unlearning": Task(0.5, gamma=0.1),
        "dpo": Task(0.5, beta=0.1, gamma=0.01),
    },
    "small": {
        "instruct": Task(0.0),
        "ssft": Task(0.2),
        "unlearning": Task(0.5, gamma=0.01),
        "dpo": Task(0.5, beta=0.1, gamma=0.002),
    },
}
"""Sections 3 and C of the paper: coefficients at the medium and the small learning rate."""


def copied(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model of its own with the same weights."""
    twin = LlamaForCausalLM(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.to(model.device)  # type: ignore[arg-type]


def forward(model: PreTrainedModel, samples: Samples) -> Tensor:
    """Logits (N, L, vocabulary). Pads stay visible, as in the study: they follow all that is in a loss."""
    return model(input_ids=samples.ids.to(model.device), use_cache=False).logits


def pretraining_step(
    settings: WorldSettings, schedule: Schedule, modes: Modes, seed: int
) -> Callable[[PreTrainedModel, int], Tensor]:
    """The loss of a step of pre-training with instruction tuning."""

    def loss(model: PreTrainedModel, step: int) -> Tensor:
        sampler = Sampler(settings, (seed, STAGE_NUMBER["pretraining"], step))
        samples = sampler.pretraining(schedule.batch)
        drawn = sampler.rng.choice(4, schedule.batch, p=mode_probabilities(step, schedule, modes))
        labels = pretraining_labels(samples, drawn, settings.pairs).to(model.device)
        nll = token_nll(forward(model, samples), labels)
        return nll.sum() / (labels[:, 1:] != -100).sum()

    return loss


def protocol_step(
    protocol: Protocol,
    task: Task,
    reference: PreTrainedModel | None,
    settings: WorldSettings,
    schedule: Schedule,
    seed: int,
) -> Callable[[PreTrainedModel, int], Tensor]:
    """The loss of a step of a safety protocol (or of `instruct`, on safe prompts alone: the baseline).

    reference: the frozen instruction-tuned model, for DPO.
    """

    def loss(model: PreTrainedModel, step: int) -> Tensor:
        sampler = Sampler(settings, (seed, STAGE_NUMBER[protocol], step))
        unsafe = np.arange(schedule.batch) < round(task.unsafe_share * schedule.batch)
        pairs = sampler.safety(unsafe)
        wanted = pairs.preferred.labels(SEGMENT_1, SEGMENT_2).to(model.device)
        if protocol in ("instruct", "ssft"):
            return sequence_nll(forward(model, pairs.preferred), wanted).mean()
        unwanted = pairs.dispreferred.labels(SEGMENT_1, SEGMENT_2).to(model.device)
        both = Samples(
            torch.cat([pairs.preferred.ids, pairs.dispreferred.ids]),
            torch.cat([pairs.preferred.part, pairs.dispreferred.part]),
        )
        labels = torch.cat([wanted, unwanted])
        preferred, dispreferred = sequence_nll(forward(model, both), labels).chunk(2)
        if protocol == "unlearning":
            return unlearning_loss(preferred, dispreferred, task.gamma)
        assert reference is not None
        with torch.no_grad():
            ref_preferred, ref_dispreferred = sequence_nll(forward(reference, both), labels).chunk(2)
        return dpo_loss(preferred, dispreferred, ref_preferred, ref_dispreferred, task.beta, task.gamma)

    return loss


def run_stage(
    model: LlamaForCausalLM,
    schedule: Schedule,
    step_loss: Callable[[PreTrainedModel, int], Tensor],
    directory: Path,
    name: str,
    *,
    save_every: int = 0,
    keep: Sequence[int] = (),
    prepare: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train a model, or load it from `directory` where the stage was finished; returns it with its history.

    save_every: steps between states an interrupted stage continues from (0: none). keep: steps after which the model
    is also kept, in `directory/step-N`. prepare: called with the optimizer before the first step (to attach a rule).
    history: {"steps", "seconds", "loss": [[step, loss], ...]}, one entry per 25 steps, each the mean since the last.

    Raises:
        ValueError: the loss is not finite, or `directory` holds a stage with another schedule.
    """
    done = directory / "history.json"
    if done.exists():
        kept = read_json(_History, done, f"damaged; {AGAIN}")
        _same_schedule(kept.schedule, schedule, done)
        history = kept.model_dump()
        stored = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return stored.to(model.device), history  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=schedule.rate,
        betas=(0.9, 0.95),
        weight_decay=schedule.weight_decay,
        fused=True,
    )
    state = directory / "state.safetensors"
    curve: list[list[float]] = []
    first, seconds = 0, 0.0
    if save_every and state.is_file():
        first, seconds, curve = _load_state(state, model, optimizer, schedule)
    if prepare is not None:
        prepare(optimizer)
    start = time.perf_counter() - seconds
    window: list[float] = []
    model.train()
    with progress(schedule.steps, name, initial=first, unit="step", mininterval=1, leave=True) as bar:
        for step in range(first, schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step)
            loss = step_loss(model, step)
            value = loss.item()
            if not np.isfinite(value):
                raise ValueError(f"{name}: the loss is {value} at step {step}")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            optimizer.step()
            window.append(value)
            if (step + 1) % 25 == 0 or step + 1 == schedule.steps:
                curve.append([step + 1, float(np.mean(window))])
                bar.set_postfix(loss=f"{curve[-1][1]:.3f}")
                window = []
            bar.update()
            if step + 1 in keep:
                model.save_pretrained(directory / f"step-{step + 1}")
            if save_every and (step + 1) % save_every == 0 and step + 1 < schedule.steps:
                _save_state(state, model, optimizer, schedule, step + 1, time.perf_counter() - start, curve)
    model.eval()
    history = {
        "schedule": vars(schedule),
        "steps": schedule.steps,
        "seconds": round(time.perf_counter() - start, 1),
        "loss": curve,
    }
    model.save_pretrained(directory)
    write_json(done, history)
    state.unlink(missing_ok=True)
    return model, history


def _same_schedule(stored: dict[str, Any], schedule: Schedule, where: Path) -> None:
    if stored != vars(schedule):
        raise ValueError(f"{where}: was made with {stored}, not {vars(schedule)}; name another directory")


class _Run(File):
    """What a stage did so far."""

    schedule: dict[str, int | float]
    seconds: NotNegative
    loss: list[Annotated[list[int | float], MinLen(2), MaxLen(2)]]


class _About(_Run):
    """In the header of its state."""

    step: Count


class _History(_Run):
    """When it is finished."""

    steps: Count


def _save_state(
    path: Path,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    step: int,
    seconds: float,
    curve: list[list[float]],
) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    about = {"schedule": vars(schedule), "step": step, "seconds": seconds, "loss": curve}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"about": json.dumps(about)})


def _load_state(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, schedule: Schedule
) -> tuple[int, float, list[list[float]]]:
    tensors, header = read_tensors(path, "the state of a stage", AGAIN)
    about = parse_json(_About, header.get("about", ""), path, f"damaged; {AGAIN}")
    _same_schedule(about.schedule, schedule, path)
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                optimizer.state[parameter] = {
                    key: tensors[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: not the state of this model ({' '.join(str(error).split())}); {AGAIN}") from error
    return about.step, about.seconds, about.loss
