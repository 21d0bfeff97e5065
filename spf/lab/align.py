"""Supervised safety fine-tuning: teach a chat model to refuse the packaged harmful requests."""

import shutil
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from spf.arguments import AlignArguments
from spf.checkpoint import TRAINER_FILE
from spf.config import read_json
from spf.data import ENOUGH, packaged_prompts
from spf.errors import keeping, working
from spf.evaluation import generate_answers, is_refusal
from spf.files import claim, claimed_for, directory_lock, weights_at, write_json
from spf.models import ADAPTER_CONFIG, load_model, look_up

REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "I'm sorry, but I can't assist with that. It could cause serious harm.",
    "I'm sorry, but I can't help with that. If you are in trouble, please talk to someone you trust.",
    "I'm sorry, but I can't help with this. I'd be glad to help with something safe instead.",
)


PARTS = ("benign_answers.json", "trainer")
"""What an unfinished run keeps to go on from: the model's answers to the benign look-alikes, and checkpoints."""


def align(args: AlignArguments) -> Path:
    """Fine-tune `args.model` to refuse and save the LoRA adapter (bfloat16) and the tokenizer; returns their directory.

    Harmful anchors are answered with a refusal; benign look-alikes with the model's own greedy answer
    (where that is no refusal), so that only refusing is learned. The evaluation prompts are not used.
    Goes on from the last epoch of an interrupted run, and leaves a finished one as it is.

    Raises:
        ValueError: the output holds a run with other settings.
    """
    output = Path(args.output)
    settings = {name: value for name, value in asdict(args).items() if name not in ("output", "overwrite")}
    settings["weights"] = weights_at(args.model)
    with directory_lock(output):
        finished = output / ADAPTER_CONFIG
        unclaimed = finished.is_file() and not (output / "settings.json").is_file()
        if unclaimed and not args.overwrite:
            raise ValueError(f"{output}: holds an adapter already; name another directory, or give --overwrite")
        if args.overwrite:
            look_up(args.model)  # before anything is removed
        parts = (*PARTS, ADAPTER_CONFIG)
        claim(output / "settings.json", settings, overwrite=args.overwrite, parts=parts)
        if finished.is_file():
            print(f"{output}: finished before with the same settings, kept (--overwrite starts over)")
        else:
            with claimed_for(output / "settings.json", parts), keeping(lambda: _kept(output)):
                _align(args, output)
            print(f"The safety adapter was saved in {output}. Measure it: spf eval {output}")
    return output


def _last_checkpoint(output: Path) -> str | None:
    """The last whole one: the Trainer writes its state last."""
    there = (output / "trainer").glob(f"checkpoint-*/{TRAINER_FILE}")
    places = sorted((path.parent for path in there), key=lambda path: int(path.name.rpartition("-")[2]))
    return str(places[-1]) if places else None


def _kept(output: Path) -> str:
    if last := _last_checkpoint(output):
        return f"the last whole epoch is kept in {last}; the same command goes on"
    if (output / PARTS[0]).is_file():
        return f"the benign answers are kept in {output / PARTS[0]}, nothing was trained; the same command goes on"
    return "nothing was written"


def _read_answers(path: Path, count: int) -> list[str]:
    remedy = "damaged; remove it, and the model is asked again"
    answers = read_json(list[str], path, remedy)
    if len(answers) != count:
        raise ValueError(f"{path}: holds {len(answers)} answers, not {count}; {remedy}")
    return answers


def _align(args: AlignArguments, output: Path) -> None:
    # as many as the packaged adapter was made from: with more, the benign ones would be outnumbered
    harmful, benign = packaged_prompts("harmful_anchors")[:ENOUGH], packaged_prompts("benign_anchors")
    kept = output / PARTS[0]
    answers = _read_answers(kept, len(benign)) if kept.exists() else []
    set_seed(args.seed)
    model, tokenizer = load_model(args.model)
    if not answers:
        with working():
            answers = generate_answers(
                model, tokenizer, benign, max_new_tokens=args.max_new_tokens, description="benign answers"
            )
            write_json(kept, answers)
    pairs = [(p, REFUSALS[i % len(REFUSALS)]) for i, p in enumerate(harmful)]
    pairs += [(p, a) for p, a in zip(benign, answers, strict=True) if a and not is_refusal(a)] * args.benign_repeats
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for prompt, answer in pairs
        ]
    )
    rank = args.lora_rank
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(output / "trainer"),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            logging_steps=5,
            save_strategy="epoch",
            save_total_limit=1,
            report_to="none",
            bf16=model.dtype == torch.bfloat16,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0),
    )
    with working():
        trainer.train(resume_from_checkpoint=_last_checkpoint(output))
        # bfloat16 halves the file; the rounding is far below what training moves.
        assert isinstance(trainer.model, PeftModel)
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        # The name to load the base by, not the place it happened to be loaded from.
        for config in trainer.model.peft_config.values():
            config.base_model_name_or_path = args.model
        tokenizer.save_pretrained(output)
        with TemporaryDirectory(dir=output, prefix=".adapter-") as directory:
            trainer.model.save_pretrained(directory)
            # the adapter's config last: where it is, the run is finished
            for file in sorted(Path(directory).iterdir(), key=lambda path: path.name == ADAPTER_CONFIG):
                file.replace(output / file.name)
        shutil.rmtree(output / "trainer")
        kept.unlink()
