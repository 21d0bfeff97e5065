"""What is said and kept when a run is broken off: by Ctrl-C, and by an error in the middle of it."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tqdm import tqdm
from trl import SFTTrainer

from spf import cli
from tests.conftest import make_model
from tests.lab.test_bench_killed import interruptible, wait_for
from tests.safetylock.toys import descendant, some_pairs, toy
from tests.test_cli import make_workspace

FULL = OSError(28, "No space left on device")


@pytest.fixture
def workspace(tmp_path, tokenizer, rows):
    return make_workspace(tmp_path, tokenizer, rows)


def interrupted(place, arguments, begun):
    """Start `spf`, press Ctrl-C when `begun` is there; the exit code and the last line."""
    spf = subprocess.Popen(
        [sys.executable, "-m", "spf", *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},  # as here: the same bits
        stdout=subprocess.DEVNULL,
        stderr=(place / "stderr").open("w"),
        text=True,
        preexec_fn=interruptible,
    )
    try:
        assert wait_for(lambda: begun() or spf.poll() is not None, 120)
        spf.send_signal(signal.SIGINT)
        code = spf.wait(60)
    finally:
        spf.kill()
    return code, re.split(r"[\r\n]+", (place / "stderr").read_text().strip())[-1]


@pytest.mark.slow
def test_train_names_the_checkpoint_that_it_goes_on_from(workspace):
    w = workspace
    arguments = ["train", str(w / "config.yaml"), "--save_steps", "2", "--max_steps"]
    first = w / "out" / "checkpoint-2" / "spf_state.json"
    code, said = interrupted(w, [*arguments, "100000"], first.is_file)
    assert code == 130, said
    found = re.fullmatch(
        r"spf: interrupted; --resume_from_checkpoint (.*) goes on from the last whole checkpoint", said
    )
    assert found, said
    checkpoint = Path(found[1])
    assert {"spf_state.json", "trainer_state.json"} <= {file.name for file in checkpoint.iterdir()}
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert cli.main([*arguments, str(step + 2), "--resume_from_checkpoint", str(checkpoint)]) == 0
    assert (w / "out" / f"checkpoint-{step + 2}").is_dir()
    # the last one, if it is whole
    assert cli.main([*arguments, str(step + 4), "--resume_from_checkpoint", "true"]) == 0
    log = json.loads((w / "out" / f"checkpoint-{step + 4}" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry][-1] == step + 4


@pytest.mark.slow
def test_train_that_wrote_nothing_says_so(workspace):
    w = workspace
    arguments = ["train", w / "config.yaml", "--max_steps", "100000", "--save_strategy", "no"]
    code, said = interrupted(w, arguments, (w / "out" / ".spf.pid").is_file)
    assert (code, said) == (130, "spf: interrupted; nothing was written")
    assert [file.name for file in (w / "out").iterdir()] == [".spf.lock"]


@pytest.mark.slow
def test_align_goes_on_to_what_it_would_have_been(workspace, monkeypatch, capsys, no_matrix_tiles):
    w = workspace
    # the process that is interrupted computes as the machine does, so this one, too
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", no_matrix_tiles)
    sizes = ["--epochs", "3", "--max_new_tokens", "2", "--batch_size", "64", "--benign_repeats", "1"]
    assert cli.main(["align", str(w / "model"), *sizes, "--output", str(w / "whole")]) == 0
    arguments = ["align", str(w / "model"), *sizes, "--output", str(w / "parts")]
    code, said = interrupted(w, arguments, lambda: any((w / "parts").glob("trainer/checkpoint-*/trainer_state.json")))
    assert code == 130, said
    assert re.fullmatch(
        r"spf: interrupted; the last whole epoch is kept in .*/parts/trainer/checkpoint-\d+; the same command goes on",
        said,
    )
    assert not (w / "parts" / "adapter_config.json").exists()
    capsys.readouterr()
    assert cli.main([*arguments, "--seed", "1"]) == 2
    assert "parts: holds a run with other settings: seed was 0, now 1; name another" in capsys.readouterr().err
    monkeypatch.setattr("spf.lab.align.generate_answers", lambda *_, **__: pytest.fail("the answers are kept"))
    train, begun = SFTTrainer.train, []

    def from_where(trainer, resume_from_checkpoint):
        begun.append(resume_from_checkpoint)
        return train(trainer, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(SFTTrainer, "train", from_where)
    assert cli.main(arguments) == 0
    assert "parts/trainer/checkpoint-" in begun[0]
    one, other = (load_file(w / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = {file.name for file in (w / "parts").iterdir()}
    assert kept == {file.name for file in (w / "whole").iterdir()}
    assert not kept & {"trainer", "benign_answers.json"}
    # it is finished: the same command changes nothing, --overwrite starts over
    written = (w / "parts" / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert "finished before with the same settings, kept (--overwrite starts over)" in capsys.readouterr().out
    assert (w / "parts" / "adapter_model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(pytest.fail.Exception, match="the answers are kept"):
        cli.main([*arguments, "--overwrite"])
    assert not (w / "parts" / "adapter_config.json").exists()


def test_align_does_not_take_over_an_adapter_it_did_not_make(workspace, capsys):
    (workspace / "other").mkdir()
    (workspace / "other" / "adapter_config.json").write_text("{}")
    assert cli.main(["align", str(workspace / "model"), "--output", str(workspace / "other")]) == 2
    assert "other: holds an adapter already; name another directory, or give --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["{}/no/such/model", "modle", "{}/adapter"])
@pytest.mark.parametrize("command", ["align {} --output", "lock tune --ks 2 {} my.lock"])
def test_overwrite_with_a_mistyped_model_removes_nothing(command, name, lockspace, monkeypatch, capsys):
    w = lockspace
    monkeypatch.chdir(w)
    # "modle" is a hub's; without a network it is asked again and again
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    LoraConfig(base_model_name_or_path=str(w / "gone")).save_pretrained(w / "adapter")
    (w / "results").mkdir()
    names = ["settings.json", "adapter_config.json", "sweep.json", "lock.safetensors", "benign_answers.json"]
    for file in names:
        (w / "results" / file).write_text("{}")
    assert cli.main([*command.format(name.format(w)).split(), "results", "--overwrite"]) == 2
    assert all((w / "results" / file).read_text() == "{}" for file in names)
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def lockspace(tmp_path, tokenizer):
    for name, model in (("base", toy()), ("tuned", descendant("llama"))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pairs = [json.dumps({"question": p.messages, "safe": p.safe, "unsafe": p.unsafe}) for p in some_pairs(10)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    extract = ["extract", tmp_path / "base", tmp_path / "my.lock", "--pairs", tmp_path / "pairs.jsonl", "--k", "4"]
    assert cli.main(["lock", *map(str, extract)]) == 0
    return tmp_path


@pytest.mark.slow
def test_tune_measures_nothing_twice(lockspace, monkeypatch, capsys):
    w = lockspace
    alphas = ",".join(str(i / 4) for i in range(1, 25))
    arguments = ["lock", "tune", str(w / "tuned"), str(w / "my.lock"), str(w / "out"), "--ks", "2", "--alphas", alphas]
    code, said = interrupted(w, arguments, (w / "out" / "sweep.json").is_file)
    assert code == 130, said
    kept_in = f"settings are measured and kept in {w}/out/sweep.json; the same command goes on"
    found = re.fullmatch(rf"spf: interrupted; (\d+) of 25 {kept_in}", said)
    assert found, said
    kept = json.loads((w / "out" / "sweep.json").read_text())["points"]
    assert len(kept) == int(found[1]) < 25
    from spf.safetylock import tune

    measured, measure = [], tune.measure

    def counted(model, tokenizer, k, alpha, *rest, **more):
        measured.append(alpha)
        return measure(model, tokenizer, k, alpha, *rest, **more)

    monkeypatch.setattr(tune, "measure", counted)
    assert cli.main(arguments) == 0
    points = json.loads((w / "out" / "sweep.json").read_text())["points"]
    assert points[: len(kept)] == kept
    assert [p["alpha"] for p in points] == [i / 4 for i in range(25)]
    assert measured == [i / 4 for i in range(len(kept), 25)]
    (w / "tuned" / "model.safetensors").touch()
    assert cli.main(arguments) == 2
    assert "holds a run with other settings: weights.model.safetensors was [" in capsys.readouterr().err


def test_a_full_disk_in_the_middle_is_a_failed_run(workspace, monkeypatch, capsys):
    """Code 1, and what was kept; the same error before training is one of the input."""
    config = str(workspace / "config.yaml")

    def fail(*_, **__):
        raise FULL

    with monkeypatch.context() as full:
        full.setattr("spf.callback.write_checkpoint", fail)
        assert cli.main(["train", config]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    _, _, written = said.partition("spf: [Errno 28] No space left on device; no whole checkpoint was written, only ")
    assert set(written.split(", ")) == {str(path) for path in (workspace / "out").glob("[!.]*")}
    assert str(workspace / "out" / "checkpoint-3") in written
    with monkeypatch.context() as full:
        full.setattr("spf.train.SFTTrainer.save_model", fail)
        assert cli.main(["train", config, "--save_strategy", "no"]) == 1
    assert "may not be whole" in capsys.readouterr().err
    with monkeypatch.context() as full:
        full.setattr("spf.evaluation.command.write_json", fail)
        figures = ["--output", str(workspace / "figures.json"), "--max_new_tokens", "1"]
        assert cli.main(["eval", str(workspace / "model"), *figures]) == 1
    assert "No space left on device; nothing was written" in capsys.readouterr().err
    with monkeypatch.context() as full:
        full.setattr("spf.train.load_safety_rows", fail)
        assert cli.main(["train", config]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "spf: [Errno 28] No space left on device"


def test_train_names_the_base_that_it_wrote(workspace, monkeypatch, capsys):
    """Above an adapter what that was merged into is written first; it said that nothing was."""
    w = workspace
    get_peft_model(make_model(), LoraConfig(target_modules="all-linear")).save_pretrained(w / "adapter")
    adapter = json.loads((w / "adapter" / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": str(w / "model")
    }
    (w / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))

    def stop(*_, **__):
        raise KeyboardInterrupt

    arguments = ["train", str(w / "config.yaml"), "--model", str(w / "adapter")]
    monkeypatch.setattr("spf.train.SFTTrainer.train", stop)
    assert cli.main(arguments) == 130
    (base,), audit = (w / "out").glob("base-*"), w / "out" / "spf_audit.json"
    said = "spf: interrupted; no whole checkpoint was written, only "
    assert capsys.readouterr().err.splitlines()[-1] == f"{said}{base}, {audit}"
    # the second time it is there already
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"{said}{audit}"


def test_eval_says_that_it_wrote_nothing(workspace, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("spf.evaluation.run.generate_answers", stop)
    assert cli.main(["eval", str(workspace / "model"), "--output", str(workspace / "figures.json")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "spf: interrupted; nothing was written"
    assert not (workspace / "figures.json").exists()


@pytest.mark.slow
def test_demo_counts_the_arms_that_are_finished_with_these_settings(tmp_path, tokenizer, monkeypatch, capsys):
    from spf.lab.demo import run

    monkeypatch.setattr(run, "load_aligned_demo_model", lambda: (make_model(), tokenizer))
    monkeypatch.setattr(run, "cpu_dtype", lambda: torch.float32)
    arguments = ["demo", "--output", str(tmp_path), "--steps", "2", "--sql_eval", "2"]
    for error, code, said in ((KeyboardInterrupt, 130, "interrupted; "), (FULL, 1, f"{FULL}; ")):

        def stop(*_, error=error, **__):
            raise error

        with monkeypatch.context() as broken:
            broken.setattr(run, "fine_tune", stop)
            assert cli.main(arguments) == code
            kept = f"1 of 4 arms are finished and kept in {tmp_path}/arms; the same command goes on"
            assert capsys.readouterr().err.splitlines()[-1] == f"spf: {said}{kept}"
            broken.setattr(run, "evaluate", stop)
            assert cli.main([*arguments, "--seed", "1"]) == code
            assert "0 of 4 arms are finished" in capsys.readouterr().err
            assert cli.main(arguments) == code  # what the other seed did not finish did not replace the arm
            assert "1 of 4 arms are finished" in capsys.readouterr().err


def test_study_names_the_stages_that_are_finished(tmp_path, monkeypatch, capsys):
    from spf.lab.study.run import Study

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "_tests", lambda study, count: {})
    monkeypatch.setattr(Study, "_data", lambda study: {"lengths": 1})
    monkeypatch.setattr(Study, "_pretrain", stop)
    arguments = ["study", "run", "--output", str(tmp_path)]
    assert cli.main(arguments) == 130
    kept = f"finished stages are kept in {tmp_path} (data); the same command goes on"
    assert capsys.readouterr().err.splitlines()[-1] == f"spf: interrupted; {kept}"
    assert cli.main([*arguments, "--seed", "1"]) == 2
    assert "holds a run with other settings: seed was 0, now 1" in capsys.readouterr().err


def test_an_interrupt_while_torch_is_imported_says_so(monkeypatch, capsys):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", stop)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "spf: interrupted; nothing was written\n"


def test_of_several_processes_one_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "import_module", lambda name: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == ""


class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # it is raised here, and ignored
            pass


EXECUTED = """
import os, runpy, signal, sys
from spf import cli
def run(name, arguments):
    exec("os.kill(os.getpid(), signal.SIGINT)\\nfor _ in range(10**6): pass")
cli._run = run
sys.argv = ["spf", "audit"]
runpy.run_module("spf", run_name="__main__")
"""


def test_an_interrupt_within_an_exec_has_the_exit_code_too(tmp_path):
    """CI met it while a dataclass was made: -2, the signal's, after `spf: interrupted` was printed."""
    (tmp_path / "executed.py").write_text(EXECUTED)
    done = subprocess.run(
        [sys.executable, "-m", "executed"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])},
        capture_output=True,
        text=True,
        preexec_fn=interruptible,
    )
    assert (done.returncode, done.stderr) == (130, "spf: interrupted\n")


def test_an_interrupt_while_a_progress_bar_is_made_ends_in_the_sentence(monkeypatch, capsys):
    """CI met it: `close` of a bar that has no position raised, and the exit code was 1."""

    def command(first, arguments):
        with monkeypatch.context() as patch:
            patch.setattr(tqdm, "_get_free_pos", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(1))
            tqdm(range(3))

    monkeypatch.setattr(cli, "_run", command)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["audit"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    gc.collect()
    assert capsys.readouterr().err.splitlines()[-1] == "spf: interrupted"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None], ids=["ignored", "another's"])
def test_a_handler_that_is_not_pythons_own_is_left(handler, monkeypatch):
    before = signal.signal(signal.SIGINT, handler)
    try:
        monkeypatch.setattr(cli, "_run", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert cli.main(["audit"]) == 0
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_python_ignores_is_sent_again(monkeypatch, capsys):
    """Ctrl-C while a weak reference's object was taken down: a training of 100 000 steps went on."""

    def command(arguments):
        Dying()
        for _ in range(500):
            time.sleep(0.01)
        pytest.fail("the interrupt was lost")

    before, hook = signal.signal(signal.SIGINT, signal.default_int_handler), sys.unraisablehook
    monkeypatch.setattr(cli, "_run", lambda first, arguments: command(arguments))
    try:
        assert cli.main(["audit"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "spf: interrupted" in capsys.readouterr().err
    assert sys.unraisablehook is hook
