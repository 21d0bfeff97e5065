"""One rank of a DDP run: python -m torch.distributed.run ... ddp_worker.py RULE OUTPUT. Also runs alone."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

from spf import SPF, NullSpace, SafetyCallback
from tests.conftest import make_model, make_tokenizer
from tests.test_callback import token_data

if __name__ == "__main__":
    rule, output = sys.argv[1], Path(sys.argv[2])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    callback = SafetyCallback(str(output / "safety.jsonl"), NullSpace(rank=8) if rule == "null-space" else SPF(rank=4))
    trainer = Trainer(
        make_model(),
        TrainingArguments(
            output_dir=str(output / f"run{world}"),
            max_steps=4,
            per_device_train_batch_size=4 // world,
            learning_rate=0.5,
            optim="sgd",  # AdamW would amplify the order of summation
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=3,
            disable_tqdm=True,
        ),
        train_dataset=token_data(),
        processing_class=make_tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.attachment is not None
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = {name: p.detach() for name, p in model.named_parameters()}
    state["corrected"] = torch.tensor(callback.attachment.corrected)
    torch.save(state, output / f"{rule}-{world}-{os.environ.get('RANK', '0')}.pt")
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    # gloo's teardown at interpreter exit aborts now and then
    os._exit(0)
