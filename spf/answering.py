"""Models whose answers can be held: those that write them, token after token."""

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from spf.errors import UnsupportedModelError


def refuse_unanswering(model: nn.Module) -> None:
    """
    Raises:
        UnsupportedModelError: prompt tuning, an encoder-decoder, or no output layer over the vocabulary.
    """
    for config in model.peft_config.values() if isinstance(model, PeftModel) else ():
        if config.is_prompt_learning:
            kind = str(config.peft_type).rpartition(".")[2].lower()
            raise UnsupportedModelError(
                f"{kind} learns an input that every prompt is given, so no answer can be held; use LoRA"
            )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        return
    name = type(base).__name__
    if base.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder, which reads a prompt in one half and writes in the other; spf holds the "
            "answers of decoder-only models, so use one, or train this one without SafetyCallback"
        )
    if base.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{name} has no output layer over the vocabulary (a reward model or a classifier), so it has no refusals "
            "to keep; train it without SafetyCallback"
        )
