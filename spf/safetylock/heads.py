"""Where attention heads are read and moved: the input of each layer's o_proj, seen as (heads, head_dim)."""

import re
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from spf.config import Count, Settings
from spf.errors import UnsupportedModelError
from spf.models import evaluating, is_linear

Model = PreTrainedModel | PeftModel

_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.o_proj$")


@dataclass(frozen=True)
class AttentionOutput:
    """One layer's output projection.

    `module` is what the model calls (the adapter's wrapper where there is one), `base` the linear layer
    that holds weight and bias; both are the same without an adapter.
    """

    layer: int
    module: nn.Module
    base: nn.Linear


@dataclass(frozen=True)
class Geometry(Settings):
    """Layers, query heads a layer, numbers a head, and the width of the residual stream."""

    layers: Count
    heads: Count
    head_dim: Count
    hidden_size: Count

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.heads} heads of {self.head_dim}, hidden size {self.hidden_size}"


def attention_outputs(model: Model) -> tuple[list[AttentionOutput], Geometry]:
    """The output projection of every layer, in order, and the model's geometry.

    head_dim is the input width of o_proj over the number of query heads: it need not be hidden_size over heads.

    Raises:
        UnsupportedModelError: no `layers.N.self_attn.o_proj`, layers of different shape, or a projection that is
            no linear layer.
    """
    outputs = []
    for name, module in model.named_modules():
        found = _NAME.search(name)
        if not found:
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not is_linear(base):
            raise UnsupportedModelError(f"{name}: a {type(base).__name__}, not a linear layer")
        outputs.append(AttentionOutput(int(found.group(1)), module, base))
    outputs.sort(key=lambda output: output.layer)
    if not outputs or [output.layer for output in outputs] != list(range(len(outputs))):
        raise UnsupportedModelError(
            f"{type(model).__name__}: SafetyLock needs one `layers.N.self_attn.o_proj` in every layer "
            "(Llama, Mistral, Qwen, Gemma and their like)"
        )
    shapes = {(output.base.in_features, output.base.out_features) for output in outputs}
    heads = model.config.get_text_config().num_attention_heads
    width, hidden = shapes.pop()
    if shapes or width % heads:
        raise UnsupportedModelError(f"{type(model).__name__}: layers whose o_proj differ in shape are not supported")
    return outputs, Geometry(len(outputs), heads, width // heads, hidden)


@torch.no_grad()
def response(output: AttentionOutput, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """W x without the bias, (N, hidden_size) float32, for inputs (N, heads * head_dim).

    Asked of the module itself, so that adapters and packed weights count as they do in the model.
    `dtype` is the model's; it matters only where the weights are packed.
    """
    weight = output.base.weight
    inputs = torch.cat([inputs, torch.zeros_like(inputs[:1])])
    with evaluating(output.module):
        moved = output.module(inputs.to(weight.device, weight.dtype if weight.is_floating_point() else dtype)).float()
    return moved[:-1] - moved[-1]
