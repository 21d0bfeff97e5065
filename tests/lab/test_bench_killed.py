"""A benchmark that is ended from outside leaves no worker behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CELL = """
import os, time
from pathlib import Path
def run_cell(cell, place):
    Path(place, "worker.tmp").write_text(str(os.getpid()))
    Path(place, "worker.tmp").rename(Path(place, "worker"))
    time.sleep(300)
"""
BENCH = """
import sys
import slow_cell
from spf import cli
from spf.lab.bench import grid
grid.run_cell, grid.prepare = slow_cell.run_cell, lambda name, work, others: str(work)
sys.exit(cli.main(["bench", "grid.yaml", "--output", "out", "--work", "."]))
"""


def interruptible() -> None:
    """In a process that is started: Ctrl-C counts, also where these tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads process states from /proc")
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_worker_is_left(tmp_path, number, code):
    (tmp_path / "slow_cell.py").write_text(CELL)
    (tmp_path / "grid.yaml").write_text("model: tiny\ngrids: [{scenarios: [none], methods: [aligned], seeds: [0]}]\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    bench = subprocess.Popen(
        [sys.executable, "-c", BENCH],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    worker = tmp_path / "worker"
    try:
        assert wait_for(worker.exists, 120)
        pid = int(worker.read_text())
        assert alive(pid)
        bench.send_signal(number)
        assert bench.wait(20) == code
        assert wait_for(lambda: not alive(pid), 10)
        if number != signal.SIGKILL:
            assert "interrupted; 0 of 1 cells are finished and kept in out" in bench.stderr.read()
    finally:
        bench.kill()
        if worker.exists() and alive(int(worker.read_text())):
            os.kill(int(worker.read_text()), signal.SIGKILL)
