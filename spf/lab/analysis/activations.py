"""What happens inside a causal model: MLP activations, and how steep its answer is in its input."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spf.lab.analysis.inputs import Prompts, position_ids
from spf.models import evaluating

# names of the matrices that read the residual stream, and of the one that writes to it
_KINDS = ((("up_proj", "gate_proj"), "down_proj"), (("gate_up_proj",), "down_proj"), (("c_fc",), "c_proj"))


@dataclass(frozen=True)
class MLP:
    """One layer's MLP: the modules that read the residual stream (its first layer), and the one that writes to it.

    The input of `second` is the activation of the first layer, after the nonlinearity (and the gate, if any).
    """

    name: str
    first: dict[str, nn.Module]
    second: tuple[str, nn.Module]

    def weight_names(self) -> list[str]:
        """The parameters' names, the first layer's matrices before the second's."""
        return [f"{self.name}.{child}.weight" for child in (*self.first, self.second[0])]


def find_mlps(model: PreTrainedModel) -> list[MLP]:
    """The MLP of every decoder layer, in order: Llama, Qwen, Mistral, Gemma, Phi-3 and GPT-2 classes.

    Raises:
        ValueError: not one MLP a layer is found (experts, an unknown architecture, an adapter that is not merged).
    """
    found = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for first, second in _KINDS:
            if second in children and all(child in children for child in first):
                found.append(MLP(name, {child: children[child] for child in first}, (second, children[second])))
    layers = model.config.num_hidden_layers
    if len(found) != layers:
        raise ValueError(
            f"{type(model).__name__}: {len(found)} MLPs of a known kind in {layers} layers; the measurements know "
            "up_proj/gate_proj/down_proj, gate_up_proj/down_proj and c_fc/c_proj, one MLP a layer, adapters merged"
        )
    return found


@dataclass(frozen=True)
class Activations:
    """Of N prompts, one tensor a layer, float32 on the CPU.

    hidden: (N, d_ff), the first MLP layer's activations, mean over the positions that were asked for.
    inputs: (N, d), what the first MLP layer reads at the last prompt token.
    """

    hidden: list[Tensor]
    inputs: list[Tensor]


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    prompts: Prompts | Tensor,
    *,
    positions: int,
    generated: int = 0,
    batch_size: int = 32,
) -> Activations:
    """First-layer MLP activations, mean over the last `positions` tokens, of which `generated` are the model's own.

    prompts: tokens, or embeddings (N, L, d) without pads (soft tokens). The model continues each prompt greedily by
    `generated` tokens; what ends an answer is a token like any other. With generated = 0 the last prompt tokens
    count, with generated = positions - 1 the last prompt token and the answer.

    Raises:
        ValueError: no prompt token would be left in the mean, or a prompt is shorter than the mean needs.
    """
    from_prompt = positions - generated
    if generated < 0 or from_prompt < 1:
        raise ValueError(f"capture: {positions} positions with {generated} generated ones; at least one prompt token")
    shortest = prompts.shape[1] if isinstance(prompts, Tensor) else int(prompts.attention_mask.sum(1).min())
    if shortest < from_prompt:
        raise ValueError(f"capture: the mean takes {from_prompt} prompt tokens, and a prompt has only {shortest}")
    mlps = find_mlps(model)
    sums: list[Tensor] = []
    reads: list[Tensor] = []
    hidden: list[list[Tensor]] = [[] for _ in mlps]
    inputs: list[list[Tensor]] = [[] for _ in mlps]

    def take_hidden(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums.append(args[0][:, -from_prompt:].float().sum(1))

    def take_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        reads.append(args[0][:, -1].float())

    handles = [mlp.second[1].register_forward_pre_hook(take_hidden) for mlp in mlps]
    handles += [next(iter(mlp.first.values())).register_forward_pre_hook(take_input) for mlp in mlps]
    try:
        with evaluating(model):
            for embeds, mask in _batches(model, prompts, batch_size):
                sums.clear()
                reads.clear()
                output = model(
                    inputs_embeds=embeds,
                    attention_mask=mask,
                    position_ids=position_ids(mask),
                    use_cache=generated > 0,
                    logits_to_keep=1,
                )
                totals = list(sums)
                for i, x in enumerate(reads):
                    inputs[i].append(x.cpu())
                for _ in range(generated):
                    sums.clear()
                    tokens = output.logits[:, -1:].argmax(-1)
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                    output = model(
                        input_ids=tokens,
                        attention_mask=mask,
                        position_ids=position_ids(mask)[:, -1:],
                        past_key_values=output.past_key_values,
                        use_cache=True,
                    )
                    totals = [total + x for total, x in zip(totals, sums, strict=True)]
                for i, total in enumerate(totals):
                    hidden[i].append((total / positions).cpu())
    finally:
        for handle in handles:
            handle.remove()
    return Activations([torch.cat(h) for h in hidden], [torch.cat(x) for x in inputs])


def local_lipschitz(model: PreTrainedModel, prompts: Prompts | Tensor, *, batch_size: int = 16) -> Tensor:
    """||d max_j logit_j(x) at the last prompt token / d embeddings of the tokens before it||_F of each prompt, (N,).

    The paper's local Lipschitzness (arXiv 2407.10264). float32 on the CPU; pads do not count.

    Raises:
        ValueError: a prompt has one token only.
    """
    shortest = prompts.shape[1] if isinstance(prompts, Tensor) else int(prompts.attention_mask.sum(1).min())
    if shortest < 2:
        raise ValueError("local_lipschitz: a prompt has one token, so there is nothing before its last one")
    norms = []
    with evaluating(model), torch.enable_grad():
        for embeds, mask in _batches(model, prompts, batch_size):
            embeds.requires_grad_(True)
            output = model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=position_ids(mask),
                use_cache=False,
                logits_to_keep=1,
            )
            # the sum over the batch: prompts do not see each other, so its gradient is each prompt's own
            (gradient,) = torch.autograd.grad(output.logits[:, -1].float().amax(-1).sum(), embeds)
            used = mask[:, :-1, None].bool()
            norms.append(gradient[:, :-1].float().where(used, 0.0).flatten(1).norm(dim=1).cpu())
    return torch.cat(norms)


def _batches(model: PreTrainedModel, prompts: Prompts | Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Embeddings (B, L, d) and mask (B, L) of the prompts, in order, on the model's device."""
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        if isinstance(part, Tensor):
            embeds = part.to(model.device, model.dtype).clone()
            yield embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=model.device)
        else:
            yield part.embed(model), part.attention_mask.to(model.device)
