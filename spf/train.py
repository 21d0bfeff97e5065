"""`spf train`: TRL's SFT arguments, a YAML file or flags, with SafetyCallback added."""

from contextlib import nullcontext
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from spf.callback import SafetyCallback
from spf.config import CallbackSettings, Count, Settings
from spf.data import load_safety_rows
from spf.evaluation.run import parse_options
from spf.files import directory_lock
from spf.rules import RULES, Rule


@dataclass
class _Safety(Settings):
    """What is given beside the callback's settings."""

    safety_data: str | None = field(
        default=None, metadata={"help": "JSONL or CSV file or hub id; the packaged prompts if left out"}
    )
    safety_rule: str = field(default="null-space", metadata={"help": "step rule", "choices": ["none", *RULES]})
    safety_rank: Count | None = field(default=None, metadata={"help": "rank of the rule; its default if left out"})

    def callback(self) -> SafetyCallback | None:
        """The callback these arguments describe; None for the rule `none`.

        Raises:
            ValueError: an unknown rule, or a rank that it cannot have.
        """
        if self.safety_rule == "none":
            return None
        # argparse holds flags to the choices, but not what comes from a YAML file
        if self.safety_rule not in RULES:
            raise ValueError(f"safety_rule: no rule {self.safety_rule}; there are none, {', '.join(RULES)}")
        kind: Any = RULES[self.safety_rule]
        rule: Rule
        if self.safety_rank is None:
            rule = kind()
        elif "rank" in {setting.name for setting in fields(kind)}:
            rule = kind(rank=self.safety_rank)
        else:
            raise ValueError(f"safety_rank: the rule {self.safety_rule} has no rank; null-space and spf have one")
        settings = {setting.name: vars(self)[f"safety_{setting.name}"] for setting in fields(CallbackSettings)}
        options = settings["chat_template_kwargs"]
        if isinstance(options, str):
            settings["chat_template_kwargs"] = parse_options(options)
        return SafetyCallback(self.safety_data, rule, **settings)


_TYPES = get_type_hints(CallbackSettings, include_extras=True) | {"chat_template_kwargs": dict | str | None}

SafetyArguments: Any = make_dataclass(
    "SafetyArguments",
    [
        (f"safety_{setting.name}", _TYPES[setting.name], field(default=setting.default, metadata=setting.metadata))
        for setting in fields(CallbackSettings)
    ],
    bases=(_Safety,),
    namespace={"__doc__": "What SafetyCallback is given: its settings with safety_ before their names."},
)


def main(arguments: list[str]) -> None:
    """Run supervised fine-tuning; `arguments` are flags, or a YAML file first.

    The data set is a local JSON, JSONL or CSV file or a hub id, in any format SFTTrainer takes.
    """
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    kinds: Any = (ScriptArguments, SFTConfig, ModelConfig, SafetyArguments)
    parser = TrlParser(kinds, prog="spf train")
    script, training, model_config, safety = parser.parse_args_and_config(args=arguments)
    callback = safety.callback()
    if model_config.model_name_or_path is None:
        raise ValueError("spf train needs model_name_or_path: a directory or hub id")
    if callback is not None:
        load_safety_rows(callback.safety_data)  # a mistake in them shows before the model is loaded
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
    first = training.process_index == 0
    with directory_lock(Path(str(training.output_dir))) if first else nullcontext():
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if trainer.is_fsdp_enabled:
        # checkpoints may be sharded, what is handed over is a whole model
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(training.output_dir)
    if trainer.accelerator.is_main_process:
        print(f"The fine-tuned model was saved in {training.output_dir}. Measure it: spf eval {training.output_dir}")


def _load(script: ScriptArguments) -> DatasetDict:
    if script.dataset_name is None:
        raise ValueError("spf train needs dataset_name: a JSON, JSONL or CSV file, a directory of them, or a hub id")
    if script.dataset_streaming:
        raise ValueError("dataset_streaming is not supported by spf train: it loads the whole data set")
    path = Path(script.dataset_name)
    if path.is_file():
        return load_dataset("csv" if path.suffix == ".csv" else "json", data_files=script.dataset_name)
    if path.suffix in (".json", ".jsonl", ".csv"):
        raise FileNotFoundError(f"{script.dataset_name}: no such training data file")
    return load_dataset(script.dataset_name, name=script.dataset_config)


def _split(data: DatasetDict, script: ScriptArguments, argument: str) -> Dataset:
    name = vars(script)[argument]
    if name not in data:
        raise ValueError(f"{argument}: {script.dataset_name} has no split {name!r}; it has {', '.join(data)}")
    return data[name]
