"""A sign of life where something takes long, nothing where it does not, and one process that gives it."""

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.utils import logging

from spf import cli, next_token, waiting
from spf import progress as module
from spf.audit import audit
from spf.data.examples import read_examples
from spf.over_refusal import looks
from spf.probe import SafetyProbe
from spf.progress import progress, tracked
from tests.conftest import make_model
from tests.test_audit import BENIGN, COMPLIES, HARMFUL, REFUSAL, anchors, refusing, rows_of, samples, tokenizer  # noqa: F401


@pytest.fixture(autouse=True)
def bars_are_on():
    """Whatever other tests left behind: a benchmark turns transformers' bars off in its process."""
    were = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    if not were:
        logging.disable_progress_bar()


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(module, "DELAY", 0.05)
    monkeypatch.setattr(module, "BEAT", 0.02)


def test_imports_show_life_and_leave_no_trace(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "BEAT", 0.02)
    with waiting.waiting("loading"):
        time.sleep(0.2)
    said = capsys.readouterr().err
    assert said.startswith("\rloading: 00:00\rloading: 00:00")
    assert said.endswith("\r              \r")
    monkeypatch.undo()
    with waiting.waiting("loading"):
        pass
    assert capsys.readouterr().err == ""


def test_commands_say_that_they_import(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "BEAT", 0.02)

    def slow(name):
        time.sleep(0.1)
        return SimpleNamespace(evaluate=lambda args: None)

    monkeypatch.setattr(cli, "import_module", slow)
    assert cli.main(["eval", "model"]) == 0
    assert "loading torch, transformers and TRL: 00:00" in capsys.readouterr().err


def test_what_is_over_soon_says_nothing(capsys):
    assert list(tracked(range(3), "quick")) == [0, 1, 2]
    with progress(None, "quick"):
        pass
    assert capsys.readouterr().err == ""


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(module, "_is_drawn_over", lambda: True)


@pytest.mark.parametrize(("total", "shown"), [(2, "0/2"), (None, "slow: 00:00")])
def test_one_long_step_shows_life(soon, terminal, capsys, total, shown):
    with progress(total, "slow"):
        time.sleep(0.3)
        alive = capsys.readouterr().err
    assert alive.count("\rslow: ") > 2
    assert shown in alive
    assert capsys.readouterr().err.endswith("\r")  # it goes when it is done


def test_in_a_file_a_bar_is_a_line_now_and_then(monkeypatch, capsys):
    """Each tick of a bar was written into the log, behind a carriage return."""
    monkeypatch.setattr(module, "DELAY", 0.0)
    monkeypatch.setattr(module, "SELDOM", 0.2)
    for leave in (False, True):
        with progress(50, "slow", mininterval=0.01, leave=leave) as bar:
            for _ in range(50):
                time.sleep(0.01)
                bar.update()
        lines = capsys.readouterr().err.splitlines()
        assert 1 <= len(lines) <= 5
        assert all(line.startswith("slow: ") for line in lines)
        assert ("50/50" in lines[-1]) == leave
    with progress(None, "slow"):
        time.sleep(0.7)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 4
    assert lines[0] == "slow: 00:00"
    monkeypatch.undo()
    assert list(tracked(range(50), "quick")) == list(range(50))
    assert capsys.readouterr().err == ""


def test_the_bars_of_an_audit_have_names_of_their_own(monkeypatch, refusing, tokenizer, anchors):  # noqa: F811
    names = []
    bar = SimpleNamespace(update=lambda: None)
    monkeypatch.setattr(next_token, "bar_of", lambda total, name, shown: names.append(name) or nullcontext(bar))
    examples = read_examples(rows_of((p, COMPLIES) for p in [*HARMFUL[:12], *BENIGN[:12]]), tokenizer)
    audit(refusing, tokenizer, examples, anchors)
    looks(refusing, tokenizer, [anchor.prompt_ids for anchor in anchors], samples((p, REFUSAL) for p in HARMFUL))
    assert list(dict.fromkeys(names)) == [
        "audit: first tokens",
        "audit: second tokens",
        "audit: harmful or harmless",
    ]


@pytest.mark.parametrize("reason", ["another rank", "turned off", "not asked for"])
def test_it_is_silent_where_it_should_be(soon, terminal, capsys, monkeypatch, reason):
    if reason == "another rank":
        monkeypatch.setattr(module, "is_first", lambda: False)
    elif reason == "turned off":
        monkeypatch.setattr(module, "is_progress_bar_enabled", lambda: False)
    with progress(2, "slow", shown=reason != "not asked for") as bar:
        time.sleep(0.1)
        bar.update()
    assert capsys.readouterr().err == ""
    assert logging.is_progress_bar_enabled()


def test_set_up_shows_its_passes_and_bases(soon, terminal, monkeypatch, capsys, anchors):  # noqa: F811
    monkeypatch.setattr(module, "DELAY", 0.0)
    probe = SafetyProbe(make_model(), anchors, pad_token_id=1)
    probe.input_bases(anchors, list(probe.matrices), rank=4)
    said = capsys.readouterr().err
    assert "safety samples: " in said
    assert "held directions: " in said


def test_bars_are_made_in_one_place():
    root = Path(module.__file__).parent
    files = [path for path in root.rglob("*.py") if "import tqdm" in path.read_text("utf-8")]
    assert files == [root / "progress.py"]
