"""Every command that writes: an output it cannot write to, or that another run holds, is refused before any work."""

import os
from dataclasses import fields
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from spf import cli
from spf.files import claim, directory_lock, weights_at

GRID = "model: m\ngrids: [{scenarios: [none], methods: [aligned], seeds: [0]}]\n"

DIRECTORIES = {
    "demo": [],
    "train": ["--model", "m", "--data", "d.jsonl", "--use_cpu", "true", "--bf16", "false"],
    "audit": ["data.jsonl", "--model", "m"],
    "align": ["m"],
    "bench": ["grid.yaml"],
    "lock apply": ["m", "l"],
    "lock remove": ["m"],
    "lock tune": ["m", "l"],
    "study run": [],
    "study measure": ["--aligned", "m", "--tuned", "n"],
    "study report": ["run"],
}
FILES = {"eval": ["m"], "lock extract": ["m"]}


@pytest.fixture
def no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "file").write_text("kept")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    lock = SimpleNamespace(top=lambda k: None, fingerprint="f")
    monkeypatch.setattr("spf.safetylock.command.SafetyLock.load", lambda path: lock)
    monkeypatch.setattr("spf.lab.demo.run.load_aligned_demo_model", lambda: pytest.fail("a model was loaded"))
    return tmp_path


def test_these_are_all_commands_that_write():
    assert {*DIRECTORIES, *FILES} - {"train"} == {
        name for name, command in cli.COMMANDS.items() if "output" in {f.name for f in fields(command.arguments)}
    }


@pytest.mark.parametrize("command", DIRECTORIES)
@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("file", "file: no directory, so nothing can be written there"),
        ("file/deeper/still", "file is no directory, so nothing can be written there"),
        ("/dev/null", "/dev/null: no directory, so nothing can be written there"),
        ("fifo", "fifo: no directory, so nothing can be written there"),
        ("/proc/out", "/proc/out: nothing can be written in /proc ("),
    ],
)
def test_no_directory_can_be_made_there(no_model, capsys, command, output, sentence):
    assert cli.main([*command.split(), *DIRECTORIES[command], "--output", output]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("spf: ")
    assert sentence in said
    assert (no_model / "file").read_text() == "kept"


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("directory", "directory: a directory, which is not replaced; name a file to write"),
        ("file/x.json", "file: no directory, so nothing can be written there"),
        ("/dev/null", "/dev/null: a device, fifo or socket, which is not replaced"),
        ("fifo", "fifo: a device, fifo or socket, which is not replaced"),
        ("/proc/x.json", "/proc: nothing can be written in /proc ("),
    ],
)
def test_no_file_can_be_written_there(no_model, capsys, command, output, sentence):
    assert cli.main([*command.split(), *FILES[command], "--output", output]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("spf: ")
    assert sentence in said
    assert (no_model / "file").read_text() == "kept"


def test_a_report_has_to_be_written_beside_its_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: (_ for _ in ()).throw(OSError(30, "Read-only")))
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: nothing can be written in {tmp_path} (Read-only)" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(DIRECTORIES.keys() - {"study report"}))
def test_a_second_run_in_a_directory_is_refused_with_the_pid(no_model, capsys, command):
    with directory_lock(no_model / "out"):
        assert cli.main([*command.split(), *DIRECTORIES[command], "--output", "out"]) == 2
        assert f"out: another run writes here (pid {os.getpid()}, since" in capsys.readouterr().err
    assert sorted(file.name for file in (no_model / "out").iterdir()) == [".spf.lock"]


def test_only_the_same_run_goes_on(tmp_path):
    path = tmp_path / "settings.json"
    claim(path, {"seed": 1, "sizes": {"a": 1, "b": [2, 3]}})
    written = path.stat().st_mtime_ns
    claim(path, {"sizes": {"b": (2, 3), "a": 1}, "seed": 1})
    assert path.stat().st_mtime_ns == written
    for other, difference in (
        ({"seed": 2, "sizes": {"a": 1, "b": [2, 3]}}, "seed was 1, now 2; name another directory$"),
        ({"seed": 1, "sizes": {"a": 1, "b": [2, 4]}}, r"sizes.b was \[2, 3\], now \[2, 4\]; name"),
        ({"seed": 1}, r"sizes was \{'a': 1, 'b': \[2, 3\]\}, now None; name"),
    ):
        with pytest.raises(ValueError, match=difference):
            claim(path, other)
    with pytest.raises(ValueError, match=r"now 2; name another directory or give --overwrite$"):
        claim(path, {"seed": 2}, parts=["made"])
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "here").write_text("")
    (tmp_path / "another's").write_text("")
    claim(path, {"seed": 2}, overwrite=True, parts=["made", "never made"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["another's", "settings.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match=r"settings.json: not a JSON file; damaged; remove it"):
        claim(path, {"seed": 2})


def test_weights_that_changed_are_another_model(tmp_path):
    assert weights_at("some/hub-id") == {}
    (tmp_path / "model.safetensors").write_text("1")
    before = weights_at(str(tmp_path))
    assert list(before) == ["model.safetensors"]
    (tmp_path / "model.safetensors").write_text("12")
    assert weights_at(str(tmp_path)) != before
