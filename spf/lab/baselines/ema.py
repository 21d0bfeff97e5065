"""Plain fine-tuning whose result is a running mean of its weights.

Kim et al., "Rethinking Safety in LLM Fine-tuning: An Optimization Perspective" (arXiv 2508.12531), propose an
exponential moving average in parameter space. Here training goes on from the weights of the last step, and the mean,
which begins at the aligned model, takes their place when it ends: after steps w_1 ... w_T it is
decay^T w_0 + (1 - decay) sum_t decay^(T - t) w_t.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EMACallback(TrainerCallback):
    """Puts the moving average of the trainable parameters into the model at the end. One process only."""

    def __init__(self, decay: float = 0.95):
        """Raises ValueError where the decay is not in [0, 1)."""
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the weights' mean must be at least 0 and below 1, not {decay}")
        self.decay = decay
        self._means: dict[nn.Parameter, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainable = (parameter for parameter in kwargs["model"].parameters() if parameter.requires_grad)
        self._means = {parameter: parameter.detach().float().clone() for parameter in trainable}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for parameter, mean in self._means.items():
            mean.lerp_(parameter.detach().float(), 1 - self.decay)

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for parameter, mean in self._means.items():
            parameter.copy_(mean)
        self._means = {}
