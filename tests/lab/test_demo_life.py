"""`spf demo` is never silent for long: whatever takes long is inside of a part that shows life."""

import io
import shlex
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers.utils import logging

from spf import progress
from spf.arguments import DemoArguments
from spf.lab.demo import run
from spf.words import parse


class Watched(io.StringIO):
    """A terminal that tells when something is written to it."""

    def isatty(self):
        return True

    def __init__(self):
        super().__init__()
        self.written = threading.Event()

    def write(self, text):
        self.written.set()
        return super().write(text)


@pytest.fixture
def soon(monkeypatch):
    """Bars are on, and a beat takes no time."""
    were = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "BEAT", 0.01)
    yield
    logging.set_verbosity_warning()
    if not were:
        logging.disable_progress_bar()


def test_every_long_call_of_the_demo_shows_life(soon, tmp_path, monkeypatch):
    stream = Watched()
    monkeypatch.setattr("sys.stderr", stream)
    assert run.progress is progress.progress
    silent, called = [], []
    figures = {"asr": 0.0, "utility": 0.0, "over_refusal": 0.0}

    def long(name, gives=None):
        def call(*given, **options):
            called.append(name)
            stream.written.clear()
            if not all(stream.written.wait(5) and not stream.written.clear() for _ in range(2)):
                silent.append(name)
            return gives

        return call

    monkeypatch.setattr(run, "load_aligned_demo_model", long("load", (None, None)))
    monkeypatch.setattr(run, "save_whole", long("save"))
    models = SimpleNamespace(from_pretrained=long("load again"))
    monkeypatch.setattr(run, "AutoModelForCausalLM", models)
    monkeypatch.setattr(run, "AutoTokenizer", models)
    monkeypatch.setattr(run, "fine_tune", long("train", (None, None)))
    monkeypatch.setattr(run, "evaluate", long("ask", figures))
    monkeypatch.setattr(run, "plot_demo", long("plot"))
    monkeypatch.setattr(run, "write_report", long("report", tmp_path / "report.html"))
    for table in ("demo_table", "overhead_table", "rich_table"):
        monkeypatch.setattr(run, table, lambda *given: "")
    monkeypatch.setattr(run, "write_json", lambda *given: None)
    args = DemoArguments(quick=True, harmful_share=0.2, output=str(tmp_path))
    results = run.run_demo(args, Console(file=io.StringIO()))
    assert results["config"]["command"] == f"spf demo --output {tmp_path} --quick --harmful_share 0.2"
    assert set(called) == {"load", "save", "load again", "train", "ask", "plot", "report"}
    assert not silent
    assert "so far: 00:00" in stream.getvalue()


def test_the_beat_is_shorter_than_ten_seconds():
    assert progress.DELAY + progress.BEAT < 10


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ({}, "spf demo"),
        ({"output": "my run", "quick": True, "seed": 3}, "spf demo --output 'my run' --quick --seed 3"),
        (
            {"safety_rule": "spf", "steps": 400, "harmful_share": 0.5, "safety_rank": 8},
            "spf demo --safety_rule spf --safety_rank 8 --steps 400 --harmful_share 0.5",
        ),
    ],
)
def test_the_command_of_a_run_makes_it_again(given, command):
    """A run with other steps or another rule was reproduced as the default one."""
    args = DemoArguments(**given)
    assert run.command_of(args) == command
    assert parse(DemoArguments, "demo", shlex.split(command)[2:]) == args
