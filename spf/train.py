"""`spf train`: TRL's SFT arguments, a YAML file or flags, with SafetyCallback added."""

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

from annotated_types import Ge, Lt
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from spf.arguments import TRAIN_NAMES, SafetyArguments
from spf.callback import SafetyCallback
from spf.checkpoint import STATE_FILE
from spf.config import CallbackSettings, Count, NotNegative, Positive, Seed, Share, Whole, check, read_yaml
from spf.data import load_safety_rows
from spf.data.training import load_training_data
from spf.errors import keeping, working
from spf.evaluation.run import parse_options
from spf.files import directory_lock
from spf.rules import RULES, Rule
from spf.words import expanded, spelled

Beta = Annotated[float, Ge(0), Lt(1)]


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

    def __init__(self) -> None:
        kinds: Any = (SafetyArguments, ScriptArguments, SFTConfig, ModelConfig)
        super().__init__(kinds, prog="spf train", usage="spf train [CONFIG.yaml] [--option value ...]")
        self._untouched = {action.dest: action.default for action in self._actions}

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
        limited = {f.name: given[f.name] for f in fields(_Limits)}
        check(_Limits, {name: value for name, value in limited.items() if value is not None})
        return found, rest

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        return super().set_defaults_with_config(
            **{TRAIN_NAMES.get(name, name): expanded(value) for name, value in config.items()}
        )


def main(arguments: list[str]) -> None:
    """Run supervised fine-tuning; `arguments` are flags, or a YAML file first.

    The data set is a local JSON, JSONL or CSV file or a hub id, in any format SFTTrainer takes.

    Raises:
        RunFailedError: the input was good, and training broke off.
    """
    parser = Parser()
    if "--help_all" in arguments:
        parser.print_help()
        return
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    if "--config" in arguments:
        named = arguments[arguments.index("--config") + 1 :]
        if not named:
            raise ValueError("--config: name a YAML file")
        read_yaml(Path(named[0]))  # a mistake in its form is named
    safety, script, training, model_config = parser.parse_args_and_config(args=spelled(arguments, TRAIN_NAMES))
    callback = make_callback(safety)
    if model_config.model_name_or_path is None:
        raise ValueError("spf train needs model_name_or_path: a directory or hub id")
    if str(training.resume_from_checkpoint).lower() in ("true", "false"):  # a flag is text, and true no directory
        training.resume_from_checkpoint = str(training.resume_from_checkpoint).lower() == "true"
    output = Path(str(training.output_dir))
    first = training.process_index == 0
    with directory_lock(output) if first else nullcontext():
        last = "trainer_state.json" if callback is None else STATE_FILE
        before = _checkpoints(output, last)
        saving: list[str] = []

        def kept() -> str:
            if saving:
                return f"the model in {output} may not be whole"
            if new := dict(_checkpoints(output, last).items() - before.items()):
                place = max(new, key=lambda place: new[place])
                return f"--resume_from_checkpoint {place} goes on from the last whole checkpoint"
            return "nothing was written" + (f"; {output} holds checkpoints of an earlier run" if before else "")

        with keeping(kept) if first else nullcontext():
            _train(callback, script, training, model_config, saving)
    if first:
        print(f"The fine-tuned model was saved in {output}. Measure it: spf eval {output}")


def make_callback(safety: SafetyArguments) -> SafetyCallback | None:
    """The callback these arguments describe; None for the rule `none`.

    Raises:
        ValueError: an unknown rule, or a rank that it cannot have.
    """
    if safety.safety_rule == "none":
        return None
    if safety.safety_rule not in RULES:
        raise ValueError(f"safety_rule: no rule {safety.safety_rule}; there are none, {', '.join(RULES)}")
    kind: Any = RULES[safety.safety_rule]
    rule: Rule
    if safety.safety_rank is None:
        rule = kind()
    elif "rank" in {setting.name for setting in fields(kind)}:
        rule = kind(rank=safety.safety_rank)
    else:
        raise ValueError(f"safety_rank: the rule {safety.safety_rule} has no rank; null-space and spf have one")
    settings = {setting.name: vars(safety)[f"safety_{setting.name}"] for setting in fields(CallbackSettings)}
    options = settings["chat_template_kwargs"]
    if isinstance(options, str):
        settings["chat_template_kwargs"] = parse_options(options)
    return SafetyCallback(safety.safety_data, rule, keep=safety.safety_keep, **settings)


def _train(
    callback: SafetyCallback | None, script: ScriptArguments, training: SFTConfig, model_config: Any, saving: list[str]
) -> None:
    for source in (callback.safety_data, callback.keep.source) if callback is not None else ():
        if source is not None:
            load_safety_rows(source)  # what is on the hub, too, before the model is loaded
    data = _load(script)
    train = _split(data, script, "dataset_train_split")
    evaluated = None if training.eval_strategy == "no" else _split(data, script, "dataset_test_split")
    source = {
        "pretrained_model_name_or_path": model_config.model_name_or_path,
        "revision": model_config.model_revision,
        # TRL's switch, off unless the user says so
        "trust_remote_code": training.trust_remote_code,
    }
    model = AutoModelForCausalLM.from_pretrained(
        **source,
        dtype=model_config.dtype,
        attn_implementation=model_config.attn_implementation,
        # packed weights go to this process's own device by themselves, so no device map is needed
        quantization_config=get_quantization_config(model_config),
    )
    trainer = SFTTrainer(
        model,
        training,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=AutoTokenizer.from_pretrained(**source),
        peft_config=get_peft_config(model_config),
        callbacks=[callback] if callback else None,
    )
    with ExitStack() as stack:
        trainer.add_callback(_Began(stack))
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        if trainer.is_fsdp_enabled:
            # checkpoints may be sharded, what is handed over is a whole model
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        saving.append("begun")
        trainer.save_model(training.output_dir)


class _Began(TrainerCallback):
    """Stands behind SafetyCallback: when its set-up is done, the input was good."""

    def __init__(self, stack: ExitStack):
        self.stack = stack

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stack.enter_context(working())


def _checkpoints(output: Path, last: str) -> dict[Path, int]:
    """The whole checkpoints there are and when they were finished. last: the file of one that is written last."""
    return {path.parent: path.stat().st_mtime_ns for path in output.glob(f"checkpoint-*/{last}")}


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
