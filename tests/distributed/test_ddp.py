"""Two gloo processes under DDP give the parameters of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("rule", ["null-space", "spf"])
def test_two_processes_equal_one(rule, tmp_path, rows):
    (tmp_path / "safety.jsonl").write_text(
        "\n".join(json.dumps({"prompt": r.messages[0]["content"], "refusal": r.refusal}) for r in rows)
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    worker = ["-m", "tests.distributed.ddp_worker", rule, str(tmp_path)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command in ([sys.executable, *worker], [sys.executable, *torchrun, *worker]):
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    single = torch.load(tmp_path / f"{rule}-1-0.pt", weights_only=True)
    assert int(single["corrected"]) >= 3
    for rank in (0, 1):
        double = torch.load(tmp_path / f"{rule}-2-{rank}.pt", weights_only=True)
        for name, tensor in single.items():
            assert torch.allclose(double[name].float(), tensor.float(), atol=1e-5), (rank, name)
