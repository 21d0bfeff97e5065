"""The controlled world's model: a Llama-class transformer of the study's size."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spf.lab.study.data import BOS, EOS, PAD, VOCABULARY


@dataclass(frozen=True)
class ModelSize:
    """Layers, attention heads, residual width and MLP width."""

    layers: int
    heads: int
    width: int
    mlp: int


SIZES = {"tiny": ModelSize(3, 4, 64, 128), "mini": ModelSize(6, 6, 192, 768)}
"""`mini` has the study's layers, heads and widths; its MLP is gated, with RMSNorm and rotary positions."""


def build_model(size: ModelSize, length: int, seed: int) -> LlamaForCausalLM:
    """A randomly initialised model (float32), N(0, 0.02) as in the study. length: longest sequence."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)
