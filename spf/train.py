"""`spf train`: TRL's SFT arguments, a YAML file or flags, with SafetyCallback added."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from spf.callback import SafetyCallback
from spf.rules import RULES, SPF, NullSpace


@dataclass
class SafetyArguments:
    """What SafetyCallback is given."""

    safety_data: str | None = field(
        default=None, metadata={"help": "JSONL or CSV file or hub id; the packaged prompts if left out"}
    )
    safety_rule: str = field(default="null-space", metadata={"help": "step rule", "choices": ["none", *RULES]})
    safety_rank: int | None = field(default=None, metadata={"help": "rank of the rule; its default if left out"})
    safety_anchors: int | None = field(default=None, metadata={"help": "use only so many safety samples"})
    safety_monitor_steps: int = field(default=10, metadata={"help": "measure the safety loss every so many steps"})

    def callback(self) -> SafetyCallback | None:
        """The callback these arguments describe; None for the rule `none`."""
        if self.safety_rule == "none":
            return None
        kind = RULES[self.safety_rule]
        rule = kind(rank=self.safety_rank) if self.safety_rank and kind in (NullSpace, SPF) else kind()
        return SafetyCallback(
            self.safety_data, rule, anchors=self.safety_anchors, monitor_steps=self.safety_monitor_steps
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
    name = str(script.dataset_name)
    path = Path(name)
    if path.is_file():
        data = load_dataset("csv" if path.suffix == ".csv" else "json", data_files=name)
    elif path.suffix in (".json", ".jsonl", ".csv"):
        raise FileNotFoundError(f"{name}: no such training data file")
    else:
        data = load_dataset(name, name=script.dataset_config)
    source = {
        "pretrained_model_name_or_path": model_config.model_name_or_path,
        "revision": model_config.model_revision,
        # TRL's switch, off unless the user says so
        "trust_remote_code": training.trust_remote_code,
    }
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=model_config.dtype, attn_implementation=model_config.attn_implementation
    )
    trainer = SFTTrainer(
        model,
        training,
        train_dataset=data[script.dataset_train_split],
        processing_class=AutoTokenizer.from_pretrained(**source),
        peft_config=get_peft_config(model_config),
        callbacks=[callback] if callback else None,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if trainer.is_fsdp_enabled:
        # checkpoints may be sharded, what is handed over is a whole model
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(training.output_dir)
    if trainer.accelerator.is_main_process:
        print(f"The fine-tuned model was saved in {training.output_dir}. Measure it: spf eval {training.output_dir}")
