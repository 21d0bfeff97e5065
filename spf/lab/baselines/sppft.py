"""SPPFT: freeze the safety layers (Li et al., "Safety Layers in Aligned Large Language Models", arXiv 2408.17003)."""

from collections.abc import Sequence
from itertools import combinations, product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.data import SafetyRow, render

ROUNDING = 0.1
"""Degrees; the angle of two equal hidden states can come out as a few hundredths."""


def angle_gap(benign: Tensor, harmful: Tensor) -> Tensor:
    """How much farther harmful prompts are from benign ones than these from one another, degrees (L,).

    Per layer: the mean angle over all benign-harmful pairs less the mean angle over all benign-benign pairs.

    Args:
        benign, harmful: (N, L, d) and (M, L, d), hidden states of the last prompt token after L layers.

    Raises:
        ValueError: fewer than two benign prompts, or no harmful one.
    """
    if len(benign) < 2 or len(harmful) < 1:
        raise ValueError(f"two benign prompts and a harmful one are needed, not {len(benign)} and {len(harmful)}")

    def angles(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        left, right = (torch.stack(side).double() for side in zip(*pairs, strict=True))
        cosines = nn.functional.cosine_similarity(left, right, dim=-1)
        return torch.rad2deg(torch.arccos(cosines.clamp(-1, 1))).mean(0)

    return angles(list(product(benign, harmful))) - angles(list(combinations(benign, 2)))


def rising_layers(gap: Tensor, share: float = 0.25) -> tuple[int, int]:
    """First and last decoder layer of the gap's steepest rise, from the gap (L + 1,) before and after L layers.

    Around the layer where the gap grows most: all neighbours in which it grows by `share` of that or more.

    Raises:
        ValueError: the gap grows nowhere by more than rounding, or is not positive after that rise.
    """
    growth = gap.diff()
    peak = int(growth.argmax())
    if not growth[peak] > ROUNDING:
        raise ValueError("harmful and benign prompts draw apart in no layer; is the model aligned?")
    rises = (growth >= share * growth[peak]).tolist()
    first = last = peak
    while first > 0 and rises[first - 1]:
        first -= 1
    while last < len(rises) - 1 and rises[last + 1]:
        last += 1
    if not gap[last + 1] > 0:
        raise ValueError(
            f"after layer {last}, where the gap grows most, harmful prompts are no farther from benign ones than these "
            f"from one another ({float(gap[last + 1]):.1f} degrees); give ordinary prompts as benign, not look-alikes"
        )
    return first, last


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers: the outermost `ModuleList` of as many modules as the configuration has layers.

    Raises:
        ValueError: there is none.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers")


@torch.no_grad()
def find_safety_layers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, harmful: Sequence[str], benign: Sequence[str]
) -> tuple[int, int]:
    """The layers, first and last from 0, in which the aligned model tells harmful prompts from benign ones.

    The paper's first localisation: from where the gap between benign-harmful and benign-benign angles of
    last-token hidden states appears to where it first levels off, here by `rising_layers`. The paper then
    moves both ends by hand to where scaling the layers changes over-refusal most; that search is left out.
    The last layer is left out: it turns states into next words, which sets any two prompts apart.

    Args:
        harmful, benign: user messages. The benign ones should be ordinary and varied: the gap of look-alikes
            of harmful prompts need not be positive.

    Raises:
        ValueError: too few prompts, or the gap grows nowhere, or to nothing (`rising_layers`).
        SafetyDataError: the tokenizer cannot render the prompts.
    """
    layers = decoder_layers(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    passed: list[Tensor] = []

    def take(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        if layer is layers[0]:
            passed.append(inputs[0][0, -1].float())
        # GPT-2-like layers return a tuple
        passed.append((output if isinstance(output, Tensor) else output[0])[0, -1].float())

    def hidden_states(prompts: Sequence[str], kind: str) -> Tensor:
        states = []
        for number, prompt in enumerate(prompts, 1):
            row = SafetyRow([{"role": "user", "content": prompt}], None, f"{kind} prompt {number}")
            ids = tokenizer(render(row, tokenizer), add_special_tokens=False)["input_ids"]
            passed.clear()
            model(input_ids=torch.tensor([ids], device=next(model.parameters()).device), use_cache=False)
            states.append(torch.stack(passed))
        return torch.stack(states) if states else torch.empty(0)

    handles = [layer.register_forward_hook(take) for layer in layers]
    try:
        gap = angle_gap(hidden_states(benign, "benign"), hidden_states(harmful, "harmful"))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return rising_layers(gap[:-1])


def freeze_layers(model: PreTrainedModel, first: int, last: int) -> int:
    """Freeze the trainable parameters (adapters too) of decoder layers `first` to `last`, both included, from 0.

    Returns how many parameter tensors it froze. To be called before the optimizer is made.

    Raises:
        ValueError: no such layers, nothing to freeze in them, or nothing left to train. Nothing is frozen then.
    """
    layers = decoder_layers(model)
    if not 0 <= first <= last < len(layers):
        raise ValueError(f"layers {first} to {last} are not among the model's {len(layers)} (counted from 0)")
    frozen = {p for layer in layers[first : last + 1] for p in layer.parameters() if p.requires_grad}
    if not frozen:
        raise ValueError(f"layers {first} to {last} have no trainable parameter, so freezing them does nothing")
    if not any(p.requires_grad and p not in frozen for p in model.parameters()):
        raise ValueError(f"freezing layers {first} to {last} leaves nothing to train")
    for parameter in frozen:
        parameter.requires_grad_(False)
    return len(frozen)
