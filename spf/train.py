"""`spf train`: TRL's trainers (`trainer` says which) with SafetyCallback, from a YAML file or flags."""

import hashlib
import importlib.util
import os
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
from annotated_types import Ge, Lt
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from spf.arguments import TRAIN_NAMES, SafetyArguments, TrainerArguments
from spf.callback import SafetyCallback
from spf.checkpoint import TRAINER_FILE
from spf.config import Count, NotNegative, Positive, Seed, Share, Whole, check, read_yaml
from spf.data import load_safety_rows
from spf.data.columns import refuse_unreadable
from spf.data.training import load_training_data
from spf.errors import RunFailedError, keeping, working
from spf.files import directory_lock
from spf.loaded import whole_model_of
from spf.models import ADAPTER_CONFIG, above, load_model, refuse_beside, refuse_missing, save_whole
from spf.named import make_callback
from spf.next_token import fingerprint
from spf.sharding import is_first
from spf.trainers import whole_model
from spf.words import expanded, spelled

Beta = Annotated[float, Ge(0), Lt(1)]

CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig, "kto": KTOConfig, "grpo": GRPOConfig}
"""TRL's arguments for each value of `trainer`."""


@dataclass
class _Limits:
    """Ranges of TRL's and transformers' arguments that they test late, after the model is loaded, or not at all."""

    learning_rate: NotNegative
    num_train_epochs: Positive
    max_steps: Annotated[int, Ge(-1)]
    per_device_train_batch_size: Count
    per_device_eval_batch_size: Count
    gradient_accumulation_steps: Count
    warmup_steps: NotNegative
    weight_decay: NotNegative
    adam_beta1: Beta
    adam_beta2: Beta
    adam_epsilon: NotNegative
    max_grad_norm: NotNegative
    logging_steps: NotNegative
    save_steps: NotNegative
    eval_steps: NotNegative
    save_total_limit: Count
    seed: Seed
    data_seed: Seed
    dataloader_num_workers: Whole
    dataset_num_proc: Count
    max_length: Count
    lora_r: Count
    lora_alpha: Count
    lora_dropout: Share


class Parser(TrlParser):
    """TRL's, with the safety flags first, the paths and names of spf's other commands, and values of the right types.

    TRL's own takes from a YAML file whatever type a value has.
    """

    def __init__(self, trainer: str = "sft") -> None:
        kinds: Any = (SafetyArguments, TrainerArguments, ScriptArguments, CONFIGS[trainer], ModelConfig)
        super().__init__(kinds, prog="spf train", usage="spf train [CONFIG.yaml] [--option value ...]")
        self._untouched = {action.dest: action.default for action in self._actions}
        sharded = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
        if not torch.accelerator.is_available() and not sharded:
            self.set_defaults(use_cpu=True)  # TRL's default is bfloat16, which transformers refuses without this

    def error(self, message: str) -> NoReturn:
        raise ValueError(" ".join(message.split()))

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        found, rest = super().parse_known_args(*args, **kwargs)
        lists = {action.dest for action in self._actions if action.nargs == "+"}
        # one name stands for a list of one
        given = {
            name: [value] if name in lists and isinstance(value, str) else value for name, value in vars(found).items()
        }
        for kind in self.dataclass_types:
            names = [f.name for f in fields(kind) if f.name in given]
            check(kind, {name: given[name] for name in names if given[name] is not self._untouched[name]})
        limited = {f.name: given[f.name] for f in fields(_Limits) if f.name in given}  # no trainer has all
        check(_Limits, {name: value for name, value in limited.items() if value is not None})
        return found, rest

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        given = {TRAIN_NAMES.get(name, name): expanded(value) for name, value in config.items()}
        for name in given.keys() & {"resume_from_checkpoint"}:  # true, too, which is no text
            given[name] = None if given[name] is None else str(given[name])
        return super().set_defaults_with_config(**given)


def main(arguments: list[str]) -> None:
    """Fine-tune; `arguments` are flags, or a YAML file first.

    The data set is a local JSON, JSONL or CSV file or a hub id, in any format the trainer takes.

    Raises:
        RunFailedError: the input was good, and training broke off.
    """
    if "--help_all" in arguments:
        Parser(_trainer(arguments, {})).print_help()
        return
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    config: dict[str, Any] = {}
    if "--config" in arguments:
        named = arguments[arguments.index("--config") + 1 :]
        if not named:
            raise ValueError("--config: name a YAML file")
        config = read_yaml(Path(named[0]))  # a mistake in its form is named
    arguments = spelled(arguments, TRAIN_NAMES)
    parser = Parser(_trainer(arguments, config))
    safety, kind, script, training, model_config = parser.parse_args_and_config(args=arguments)
    callback = make_callback(safety)
    if model_config.model_name_or_path is None:
        raise ValueError("spf train needs model_name_or_path: a directory or hub id")
    refuse_missing(model_config.model_name_or_path)
    if str(training.resume_from_checkpoint).lower() in ("true", "false"):  # a flag is text, and true no directory
        training.resume_from_checkpoint = str(training.resume_from_checkpoint).lower() == "true"
    output = Path(str(training.output_dir))
    first = is_first()
    refuse_beside(output, ["default"] if model_config.use_peft else [])
    with directory_lock(output) if first else nullcontext():
        checkpoints = f"checkpoint-*/{TRAINER_FILE}"
        files, before = _times(output, "[!.]*"), _times(output, checkpoints)
        saving: list[str] = []

        def kept() -> str:
            if saving:
                return f"the model in {output} may not be whole"
            if new := dict(_times(output, checkpoints).items() - before.items()):
                place = max(new, key=lambda path: new[path]).parent
                return f"--resume_from_checkpoint {place} goes on from the last whole checkpoint"
            # what an adapter was merged into, the audit, a checkpoint in part
            written = sorted(str(path) for path, _ in _times(output, "[!.]*").items() - files.items())
            said = f"no whole checkpoint was written, only {', '.join(written)}" if written else "nothing was written"
            return said + (f"; {output} holds checkpoints of an earlier run" if before else "")

        with keeping(kept) if first else nullcontext():
            _train(callback, kind, script, training, model_config, saving)
    if callback is not None and callback.stopped:
        raise RunFailedError(
            f"refusals were being lost, which ends a run with on_leak='stop'; the model was saved in {output} all the "
            f"same: spf eval {output}"
        )
    if first:
        print(f"The fine-tuned model was saved in {output}. Measure it: spf eval {output}")


def _trainer(arguments: list[str], config: dict[str, Any]) -> str:
    """Which trainer is asked for, before its arguments can be read."""
    name = config.get("trainer", "sft")
    for i, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if option == "--trainer":
            name = value if equals else " ".join(arguments[i + 1 : i + 2])
    if name not in CONFIGS:
        raise ValueError(f"trainer: must be one of {', '.join(CONFIGS)}, not {name!r}")
    return str(name)


def _train(
    callback: SafetyCallback | None,
    kind: TrainerArguments,
    script: ScriptArguments,
    training: Any,
    model_config: Any,
    saving: list[str],
) -> None:
    for source in (callback.samples.data, callback.keep.source) if callback is not None else ():
        if source is not None:
            load_safety_rows(source)  # what is on the hub, too, before the model is loaded
    data = _load(script)
    train = _split(data, script, "dataset_train_split")
    evaluated = None if training.eval_strategy == "no" else _split(data, script, "dataset_test_split")
    rewards = [_reward(name) for name in kind.reward_funcs or ()]
    if bool(rewards) != (kind.trainer == "grpo"):
        raise ValueError("reward_funcs: FILE.py:FUNCTION, with the trainer grpo, which needs one, and with no other")
    refuse_unreadable(train, kind.trainer, str(vars(training).get("dataset_text_field")))
    kinds: Any = {"sft": SFTTrainer, "dpo": DPOTrainer, "kto": KTOTrainer, "grpo": GRPOTrainer}
    model, tokenizer = _load_model(training, model_config)
    if model_config.use_peft and _is_adapter(model_config.model_name_or_path):
        save_base(model, tokenizer, Path(model_config.model_name_or_path), Path(training.output_dir))
    trainer = kinds[kind.trainer](
        model,
        **({"reward_funcs": rewards} if rewards else {}),
        args=training,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[callback] if callback else None,
    )
    with ExitStack() as stack:
        trainer.add_callback(_Began(stack))
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        saving.append("begun")
        with whole_model(trainer):
            trainer.save_model(training.output_dir)


def _load_model(training: Any, model_config: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in the type that is asked for; the directory of an adapter comes merged, as in the other commands."""
    name, packed = model_config.model_name_or_path, get_quantization_config(model_config)
    if _is_adapter(name):
        if packed is not None:
            raise ValueError(f"model_name_or_path: {name} is an adapter, which cannot be merged into packed weights")
        wanted = model_config.dtype or "auto"
        dtype: Any = wanted if wanted == "auto" else getattr(torch, wanted)
        return load_model(name, dtype)
    source = {
        "revision": model_config.model_revision,
        # TRL's switch, off unless the user says so
        "trust_remote_code": training.trust_remote_code,
    }
    model = whole_model_of(
        AutoModelForCausalLM,
        name,
        **source,
        dtype=model_config.dtype,
        attn_implementation=model_config.attn_implementation,
        # packed weights go to this process's own device by themselves, so no device map is needed
        quantization_config=packed,
    )
    return model, AutoTokenizer.from_pretrained(name, **source)


def _is_adapter(name: str) -> bool:
    return (Path(name) / ADAPTER_CONFIG).is_file()


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: Path, output: Path) -> None:
    """Write what an adapter was merged into, for the one that is trained above it: it is nowhere else as a whole.

    Its directory is named by a hash of the adapter's files and of what they were merged into: what stands there is
    never written over.
    """
    digest = hashlib.sha256(fingerprint(model).encode())
    for place in (adapter, *above(adapter)):
        for path in (place / ADAPTER_CONFIG, *sorted(place.glob("adapter_model.*"))):
            digest.update(path.read_bytes())
    directory = output / f"base-{digest.hexdigest()[:8]}"
    if is_first() and not directory.is_dir():
        output.mkdir(parents=True, exist_ok=True)
        save_whole(directory, model, tokenizer)
        size, adapter_at = sum(path.stat().st_size for path in directory.iterdir()) / 1e9, str(output)
        print(
            f"spf: {directory} is a whole model ({size:.2f} GB), which the new adapter stands on: keep it where it is. "
            "To ship one model, merge both in Python when training is done: from spf.models import load_model, "
            f"save_whole; save_whole({f'{adapter_at}-merged'!r}, *load_model({adapter_at!r}))"
        )
    model.name_or_path = model.config.name_or_path = str(directory.resolve())


def _reward(name: str) -> Any:
    """A reward function of TRL's kind from FILE.py:FUNCTION."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise FileNotFoundError(f"reward_funcs: {name!r}: no such Python file; write FILE.py:FUNCTION")
    found = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if function not in vars(module):
        raise ValueError(f"reward_funcs: {file} has no function {function!r}")
    return vars(module)[function]


class _Began(TrainerCallback):
    """Stands behind SafetyCallback: when its set-up is done, the input was good."""

    def __init__(self, stack: ExitStack):
        self.stack = stack

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stack.enter_context(working())


def _times(output: Path, pattern: str) -> dict[Path, int]:
    """What there is in a directory, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in output.glob(pattern)}


def _load(script: ScriptArguments) -> DatasetDict:
    if script.dataset_name is None:
        raise ValueError("spf train needs dataset_name: a JSON, JSONL or CSV file, a directory of them, or a hub id")
    if script.dataset_streaming:
        raise ValueError("dataset_streaming is not supported by spf train: it loads the whole data set")
    return load_training_data(script.dataset_name, script.dataset_config)


def _split(data: DatasetDict, script: ScriptArguments, argument: str) -> Dataset:
    name = vars(script)[argument]
    if name not in data:
        raise ValueError(f"{argument}: {script.dataset_name} has no split {name!r}; it has {', '.join(data)}")
    return data[name]
