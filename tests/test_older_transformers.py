"""spf beside older libraries that frameworks pin: it imports, or its commands say which one they cannot use."""

import ast
import importlib.util
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path

import pytest
import transformers

from spf import models
from spf.cli import main
from tests.conftest import make_model
from tests.test_house import FILES, ROOT

NEWER = {"GgufConfig", "GgufLinear"}
"""Names that transformers 5.6 does not have."""


class Older(types.ModuleType):
    """transformers without the newer names."""

    def __getattr__(self, name):
        if name in NEWER:
            raise AttributeError(name)
        return getattr(transformers, name)


def test_models_are_imported_without_the_newer_names(monkeypatch):
    found = Path(models.__file__)
    monkeypatch.setitem(sys.modules, "transformers", Older("transformers"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=str(found)))
    spec = importlib.util.spec_from_file_location("models_again", found)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    with pytest.raises(ImportError, match="GgufConfig"):
        again.load_model(again.DEMO_MODEL)


def test_locks_are_imported_without_packed_layers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf.utils", None)
    spec = importlib.util.spec_from_file_location("heads_again", ROOT / "safetylock" / "heads.py")
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "heads_again", again)
    spec.loader.exec_module(again)
    outputs, geometry = again.attention_outputs(make_model())
    assert (len(outputs), geometry.heads) == (2, 4)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_of_the_core_imports_them_at_once(path):
    outside = ast.parse(path.read_text("utf-8")).body
    taken = {alias.name for node in outside if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not taken & NEWER


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'KTOTrainer' from 'trl'"),
        RuntimeError("Failed to import trl.trainer.dpo_trainer because of the following error:\nNo module named 'x'"),
    ],
)
def test_a_command_says_that_it_cannot_use_an_older_trl(monkeypatch, capsys, error):
    def broken(module):
        raise error

    monkeypatch.setattr("spf.cli.import_module", broken)
    assert main(["train", "--model", "m", "--data", "d"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"spf: spf train cannot use the installed TRL {version('trl')} (")
    assert said.count("\n") == 1
    assert "pip install -U trl, or use SafetyCallback" in said


def test_another_library_that_is_missing_is_not_taken_for_trl(monkeypatch, capsys):
    def broken(module):
        raise ModuleNotFoundError("No module named 'rouge_score'")

    monkeypatch.setattr("spf.cli.import_module", broken)
    assert main(["train", "--model", "m", "--data", "d"]) != 0
    assert "TRL" not in capsys.readouterr().err


def test_the_callback_needs_no_trl():
    """What the sentence above says; a process of its own, as this one has imported TRL."""
    code = "import sys; sys.modules['trl'] = None; import spf; print(spf.SafetyCallback.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "SafetyCallback", done.stderr
