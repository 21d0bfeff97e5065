"""The checkpoints that docs/study.md measures: LoRA adapters of the demo model, trained as benchmark cells are.

Adapters are kept unmerged, so that an update is measured without the rounding of merged weights.

OMP_NUM_THREADS=1 python benchmarks/study_checkpoints.py --output study-checkpoints
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments, set_seed

from spf.data import tokenise
from spf.lab.bench.cell import load_tokenizer, prepare
from spf.lab.bench.methods import make_method
from spf.lab.bench.scenarios import SCENARIOS, training_rows
from spf.lab.trainer import AnswerTrainer, collate_answers
from spf.models import cpu_dtype
from spf.text.generation import context_length, pad_id

CHECKPOINTS = {
    "plain-harmful-50": ("aligned", "harmful-50", "plain"),
    "null-space-harmful-50": ("aligned", "harmful-50", "null-space"),
    "plain-benign": ("aligned", "benign", "plain"),
    "unaligned-benign": ("unaligned", "benign", "plain"),
}
"""Directory: the model it starts from, the scenario, the method."""


def train(start: Path, scenario_name: str, method_name: str, seed: int, workspace: Any, output: Path) -> None:
    """Fine-tune by LoRA as `spf bench` does (rank 8, AdamW at 1e-3, batches of 8) and save the adapter."""
    set_seed(seed)
    scenario = SCENARIOS[scenario_name]
    tokenizer = load_tokenizer(workspace.aligned)
    base = AutoModelForCausalLM.from_pretrained(start, dtype=cpu_dtype())
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0))
    method = make_method(method_name, {}, seed, workspace, model, tokenizer)
    anchors = tokenise(training_rows(scenario, seed), tokenizer, context_length(model, tokenizer))
    trainer = AnswerTrainer(
        model,
        TrainingArguments(
            output_dir=str(output / "trainer"),
            max_steps=round(len(anchors) * scenario.epochs / 8),
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            bf16=cpu_dtype().itemsize == 2,
            use_cpu=True,
            seed=seed,
            data_seed=seed,
        ),
        train_dataset=Dataset.from_list([{"prompt_ids": a.prompt_ids, "answer_ids": a.refusal_ids} for a in anchors]),
        data_collator=lambda batch: collate_answers(batch, pad_id(tokenizer)),
        processing_class=tokenizer,
        callbacks=method.callbacks,
    )
    trainer.answer_loss = method.answer_loss
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("study-checkpoints"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    workspace = prepare("demo", args.output.resolve())
    assert workspace.unaligned is not None
    load_tokenizer(workspace.aligned).save_pretrained(workspace.unaligned)  # spf study measure reads it from there
    starts = {"aligned": workspace.aligned, "unaligned": workspace.unaligned}
    for name, (start, scenario, method) in CHECKPOINTS.items():
        directory = args.output.resolve() / f"{name}-seed-{args.seed}"
        if (directory / "adapter_model.safetensors").is_file():
            print(f"{directory}: done before, kept")
            continue
        train(starts[start], scenario, method, args.seed, workspace, directory)
        print(f"{directory}: saved")


if __name__ == "__main__":
    main()
