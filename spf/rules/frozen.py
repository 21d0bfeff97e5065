"""Weights that are not trained: what a layer answers rests on them, too."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from spf.next_token import adapters_of, hash_of
from spf.run import Run
from spf.sharding import at_rest, reshard

STEERS = ".lora_velora_embed"
"""VeLoRA writes anew at every step what its backward pass goes by; what a layer answers does not rest on it."""


class Frozen:
    """The weights and buffers that a run does not train, as they are when it begins; what others write there is said at
    its end."""

    def __init__(self, run: Run):
        self.run = run
        self._start = self._sums()

    def told(self) -> str:
        """Which are not what they were, in words; nothing if all are. All processes call it where they hold parts."""
        changed = differing(self.run, self._start, self._sums())
        if not changed:
            return ""
        return (
            f"; but {len(changed)} weights that are not trained have been changed by others than the optimizer, among "
            f"them {changed[0]} (an adapter merged and unmerged, say), and with them what the layers answer"
        )

    def _sums(self) -> dict[str, Tensor]:
        """Of what this process holds between two passes."""
        model = self.run.probe.model
        reshard(model)
        return {
            f"{name}{what}": bit_sum(own)
            for name, tensor in (*model.named_parameters(), *_saved_buffers(model))
            if not (tensor.requires_grad or tensor.is_meta)
            for what, own in at_rest(tensor).items()
        }


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Numbers that go into checkpoints beside the parameters, as those that balance a router's experts."""
    for place, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False) if not place.endswith(STEERS) else ():
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                yield f"{place}.{name}", buffer


def bit_sum(values: Tensor) -> Tensor:
    """The sum of a tensor's bits as whole numbers: any one that changes shows."""
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[values.element_size()]
    return values.contiguous().view(whole).sum(dtype=torch.int64)


def differing(run: Run, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """Names whose sums are not what they were, in any process."""
    names = [name for name in before if name in now]
    differ = [(now[name] != before[name]).float().reshape(()) for name in names]
    return [name for name, count in zip(names, run.total(differ), strict=True) if count > 0]


def frozen_fingerprint(model: nn.Module) -> str:
    """A hash of some numbers of every weight that is not trained, in bfloat16, and of the scales of LoRA adapters.

    Of adapters those count that are active, since TRL copies one for its reference model, and no part of which is
    trained.
    """
    adapters, weights = adapters_of(model), dict(model.named_parameters())
    own = {adapters[name].name for name, weight in weights.items() if weight.requires_grad and name in adapters}
    frozen = {
        name: weight
        for name, weight in weights.items()
        if not (weight.requires_grad or weight.is_meta)
        and (name not in adapters or (adapters[name].active and adapters[name].name not in own))
    }
    return hash_of(frozen, adapters)
