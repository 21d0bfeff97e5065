"""`spf` under `accelerate launch` on a machine without accelerators: -m tests.distributed.cpu_cli train ...

Accelerate starts FSDP2 and DeepSpeed only on accelerators, so there its choice of a backend is overridden with
gloo. DDP needs `--use_cpu true` only.
"""

import importlib
import os
import sys

FSDP, DEEPSPEED = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
if FSDP or DEEPSPEED:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

import accelerate.state as accelerate_state  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers.training_args  # noqa: E402

if FSDP or DEEPSPEED:
    accelerate_state.PartialState._prepare_backend = lambda *args, **kwargs: (
        "gloo",
        accelerate_state.DistributedType.MULTI_GPU,
    )
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
if DEEPSPEED:
    # a kernel for shared memory that g++ would have to compile; gloo does without (deepspeed.comm.torch is torch)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

from spf.cli import main  # noqa: E402

if __name__ == "__main__":
    code = main()
    if dist.is_initialized() and code == 0:
        dist.barrier()
    sys.stdout.flush()
    # gloo's teardown at interpreter exit aborts now and then
    os._exit(code)
