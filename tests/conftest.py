"""Tiny random models, a tokenizer made here, and safety data: nothing is downloaded.

torch is imported where it is used: the process that only hands out tests to others need not wait for it.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from spf.data import SafetyRow

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} </s>{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
PLAIN_TEMPLATE = TEMPLATE[TEMPLATE.index("<{{") :]
REFUSAL = "I'm sorry, but I can't help with that request."


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers, files that have tests marked slow or distributed first: else one waits for the other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        heavy = {item.path for item in items if {"slow", "distributed"} & {mark.name for mark in item.iter_markers()}}
        items.sort(key=lambda item: item.path not in heavy)


@pytest.fixture(autouse=True, scope="session")
def no_matrix_tiles() -> "Iterator[Callable[[], bool]]":
    """Tests compute in float32 on every machine (`cpu_dtype`), so that what they expect does not depend on it; what
    tells the machine's."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        of_the_machine = torch.cpu._is_amx_tile_supported
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        yield of_the_machine


def pytest_collection_finish() -> None:
    """What is imported by now stays: the search for garbage at the start of every training leaves it out."""
    gc.collect()
    gc.freeze()


def make_tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from spf.data import ENOUGH, packaged_prompts

    words: dict[str, int] = {"<unk>": 0, "<pad>": 1, "</s>": 2, "<user>": 3, "<assistant>": 4}
    splitter = pre_tokenizers.Whitespace()
    # the last for the demo's tasks, so that something is left of their answers, too
    task = "SELECT name FROM table WHERE AND COUNT ( * ) = Sure , here is how to do that . The a of and in Sorry"
    texts = [REFUSAL, *packaged_prompts("harmful_anchors")[:ENOUGH], *packaged_prompts("benign_anchors"), task]
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(text):
            words.setdefault(word, len(words))
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=256
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(
    kind: str = "llama", seed: int = 0, dtype: "torch.dtype | None" = None, width: int = 32
) -> "PreTrainedModel":
    """In float32 unless told otherwise."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

    common = {
        "vocab_size": 2048,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    configs = {
        "llama": lambda: LlamaConfig(**common, tie_word_embeddings=False),
        "qwen": lambda: Qwen2Config(**common, tie_word_embeddings=True),
        "gemma": lambda: Gemma2Config(**common, head_dim=8, sliding_window=64),
        # its first feed-forward layer is given all tokens in a row
        "opt": lambda: OPTConfig(
            vocab_size=2048,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            word_embed_proj_dim=32,
            bos_token_id=2,
            eos_token_id=2,
            dropout=0.0,
        ),
        "gpt2": lambda: GPT2Config(
            vocab_size=2048, n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=2, eos_token_id=2
        ),
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(configs[kind](), attn_implementation="eager").to(dtype or torch.float32)


def run_module(*arguments: str, timeout: float = 500) -> str:
    """What `python -m ...` prints, with one thread in a process of its own; fails with its last words if it does."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    return printed


def assert_apart(boxes, figure):
    """Boxes of texts lie within the figure, and no two overlap."""
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    return make_tokenizer()


@pytest.fixture(scope="session")
def rows() -> "list[SafetyRow]":
    from spf.data import SafetyRow, packaged_prompts

    prompts = packaged_prompts("harmful_anchors")[:12]
    return [SafetyRow([{"role": "user", "content": p}], REFUSAL, f"row {i}") for i, p in enumerate(prompts, 1)]


@pytest.fixture(scope="session")
def anchors(rows, tokenizer):
    from spf.data import tokenise

    return tokenise(rows, tokenizer, 256)
