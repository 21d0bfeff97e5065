"""What commands are told: names, help, home directories, completion. Nothing here loads a model."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from spf import arguments, cli
from spf import words as command_line

ROOT = Path(__file__).parent.parent


def test_no_help_text_imports_torch_and_each_shows_every_option():
    code = """
import sys
from dataclasses import fields
from spf import cli
for name, command in cli.COMMANDS.items():
    assert cli.main([*name.split(), "--help"]) == 0
heavy = {"torch", "transformers", "trl", "datasets", "numpy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    pages = done.stdout.split("usage: ")[1:]
    assert len(pages) == len(cli.COMMANDS) == 15
    for (name, command), page in zip(cli.COMMANDS.items(), pages, strict=True):
        assert page.startswith(f"spf {name} ")
        for f in fields(command.arguments):
            assert f"--{f.name} " in page
            assert all(f"--{former} " not in page for former in f.metadata.get("former", ()))


def test_train_help_has_the_safety_flags_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # help is as wide as the terminal, and so the longer the narrower it is
    assert cli.main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert "spf train --help_all" in short
    assert len(short.splitlines()) < 60
    assert cli.main(["train", "--help_all"]) == 0
    whole = capsys.readouterr().out
    options = re.findall(r"^  (?:-h, )?--(\w+)", whole, re.M)
    safety = [f.name for f in fields(arguments.SafetyArguments)]
    assert [option for option in options if option != "help"][: len(safety)] == safety
    assert {*arguments.TRAIN_NAMES.values()} <= set(options)


def test_the_same_thing_has_the_same_name_everywhere():
    """Of these words one is used, with the types and the one meaning that the other commands give it."""
    kinds = {name: {f.name for f in fields(command.arguments)} for name, command in cli.COMMANDS.items()}
    for name, names in kinds.items():
        assert not names & {"out", "outdir", "output_dir", "out_dir", "directory", "bs", "lr", "rank", "safe", "unsafe"}
        assert not names & {"answer_tokens", "locked", "rule", "random_seed", "model_name"}, name
    writes = {name for name, names in kinds.items() if "output" in names}
    assert kinds.keys() - writes == {"train", "lock inspect", "report"}  # train: TRL's output_dir; report: its run


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["M", "L", "O", "--ks", "2"], ("M", "L", "O", "2")),
        (["M", "--ks", "2", "L", "O"], ("M", "L", "O", "2")),
        (["--ks=2", "M", "--lock", "L", "O"], ("M", "L", "O", "2")),
        (["--output", "O", "--model", "M", "L", "--ks", "2"], ("M", "L", "O", "2")),
        (["--overwrite", "M", "L", "O", "--ks", "2"], ("M", "L", "O", "2")),
    ],
)
def test_what_has_no_name_goes_in_order(words, found):
    args = command_line.parse(arguments.TuneArguments, "lock tune", words)
    assert (args.model, args.lock, args.output, args.ks) == found
    assert args.overwrite == ("--overwrite" in words)
    assert args.batch_size == 65


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lock", "tune", "M"], "--lock, --output must be given (spf lock tune --help shows the options)"),
        (["lock", "tune", "M", "L", "O", "P"], "unknown: P ("),
        (["eval", "m", "--batch", "3"], "unknown: --batch 3 ("),
        (["eval", "m", "--batch_size", "many"], "argument --batch_size: invalid int value: 'many'"),
        (["eval", "m", "--perplexity=maybe"], "argument --perplexity: invalid true or false value: 'maybe'"),
        (["study", "run", "--output", "x", "--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
        (["align"], "--model must be given"),
        (["--print_completion", "korn"], "--print_completion needs the name of a shell: bash, zsh"),
    ],
)
def test_mistakes_are_one_sentence(capsys, words, sentence):
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("spf: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_former_names_work_and_say_so(capsys):
    args = command_line.parse(
        arguments.AlignArguments, "align", ["m", "--rank", "4", "--answer-tokens=7", "--seed", "1"]
    )
    assert (args.lora_rank, args.max_new_tokens, args.seed) == (4, 7, 1)
    assert capsys.readouterr().err.splitlines() == [
        "spf: --rank is now --lora_rank; the old name goes with the next release",
        "spf: --answer_tokens is now --max_new_tokens; the old name goes with the next release",
    ]
    kinds = [command.arguments for command in cli.COMMANDS.values()]
    former = {old: f.name for kind in kinds for f in fields(kind) for old in f.metadata.get("former", ())}
    assert former == {
        "rule": "safety_rule",
        "null_space_rank": "safety_rank",
        "rank": "lora_rank",
        "answer_tokens": "max_new_tokens",
        "lock": "output",
        "locked": "model",
        "safe": "benign",
        "unsafe": "harmful",
    }


def test_home_directories_are_expanded_wherever_they_stand(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command_line.expanded(["~/a", "--output=~/b", "name=~/c", "x,~/d.yaml", "~"]) == [
        f"{tmp_path}/a",
        f"--output={tmp_path}/b",
        f"name={tmp_path}/c",
        f"x,{tmp_path}/d.yaml",
        str(tmp_path),
    ]
    untouched = ["a~b", "a/~", "~ about", "file~", 3, None, True]
    assert command_line.expanded(untouched) == untouched
    assert command_line.expanded({"a": ["~/x", {"b": "~/y"}]}) == {"a": [f"{tmp_path}/x", {"b": f"{tmp_path}/y"}]}
    assert command_line.expanded("~root/x") == str(Path("~root/x").expanduser())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "~/run"]) == 2
    assert f"{tmp_path}/run/results.json: no such file" in capsys.readouterr().err
    assert cli.main(["report", "~nobody-of-this-name/run"]) == 2
    assert "~nobody-of-this-name/run: no home directory of ~nobody-of-this-name is known" in capsys.readouterr().err
    (tmp_path / "grid.yaml").write_text(
        "model: ~/model\ngrids: [{scenarios: [none], methods: [aligned], seeds: [0]}]\n"
    )
    from spf.lab.bench.grid import read_grid

    assert [cell.model for cell in read_grid(tmp_path / "grid.yaml")] == [f"{tmp_path}/model"]
    assert not list(tmp_path.glob("~*"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("spf a", {"align", "audit"}),
        ("spf lock ", {"extract", "apply", "remove", "inspect", "tune"}),
        ("spf study run --pre", {"--preset"}),
        ("spf study run --preset ", {"tiny", "paper"}),
        ("spf train --safety_r", {"--safety_rule", "--safety_rank"}),
        ("spf lock inspect REA", {"README.md"}),
    ],
)
def test_the_tab_key_completes(line, offered, capsys):
    assert cli.main(["--print_completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = line.split(" ")
    ask = f"""
{script}
COMP_WORDS=({" ".join(words[:-1])} "{words[-1]}"); COMP_CWORD={len(words) - 1}
_shtab_spf
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, cwd=ROOT, env={**os.environ})
    assert offered <= set(done.stdout.split()), done
    if not words[-1].startswith("REA"):
        assert set(done.stdout.split()) <= {*offered, "-h", "--help"}
