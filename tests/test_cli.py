"""Whole runs through the command line on tiny models."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from spf import cli
from spf.data.columns import refuse_unreadable
from spf.errors import keeping, working
from spf.files import write_json
from spf.models import ADAPTER_CONFIG, load_model
from spf.monitor import Monitor
from tests.conftest import REFUSAL, TEMPLATE, make_model

CONFIG = """
model_name_or_path: {model}
dataset_name: {data}
output_dir: {output}
use_peft: true
lora_r: 4
lora_target_modules: all-linear
learning_rate: 5.0e-3
max_steps: 3
logging_steps: 1
per_device_train_batch_size: 2
save_strategy: steps
save_steps: 3
report_to: none
use_cpu: true
bf16: false
dtype: float32
safety_data: {safety}
safety_rank: 8
safety_monitor_steps: 1
"""


def make_workspace(tmp_path, tokenizer, rows):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "Write a poem."}, {"role": "assistant", "content": "Tell me a story."}]
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps({"messages": messages})] * 12))
    (tmp_path / "safety.jsonl").write_text(
        "\n".join(json.dumps({"prompt": r.messages[0]["content"], "refusal": r.refusal}) for r in rows)
    )
    (tmp_path / "config.yaml").write_text(
        CONFIG.format(
            model=tmp_path / "model",
            data=tmp_path / "data.jsonl",
            output=tmp_path / "out",
            safety=tmp_path / "safety.jsonl",
        )
    )
    return tmp_path


@pytest.fixture
def workspace(tmp_path, tokenizer, rows):
    return make_workspace(tmp_path, tokenizer, rows)


def test_train_then_eval(workspace, capsys):
    assert cli.main(["train", str(workspace / "config.yaml")]) == 0
    output = capsys.readouterr()
    assert "was saved in" in output.out
    state = json.loads((workspace / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert all("spf/safety_loss" in entry for entry in state["log_history"] if "loss" in entry)
    # lora_A does not answer the held directions
    from safetensors.torch import load_file

    from spf import SafetySubspace

    weights = load_file(workspace / "out" / "adapter_model.safetensors")
    subspace = SafetySubspace.load(next((workspace / "out").glob("spf_subspace-*.safetensors")))
    assert len(subspace.right) == 14
    for name, V in subspace.right.items():
        A = weights[name.replace(".default", "")]
        assert (A @ V).norm() <= 1e-4 * A.norm()
        assert A.norm() > 0.1
    figures = workspace / "figures.json"
    assert cli.main(["eval", str(workspace / "out"), "--output", str(figures), "--max_new_tokens", "3"]) == 0
    written = json.loads(figures.read_text())
    assert written["asr"] == 1.0  # a random model refuses nothing
    assert written["asr_count"] == 104
    assert "asr" in capsys.readouterr().out


@pytest.mark.parametrize("steps", ["1", "10"])
def test_a_run_that_was_ended_since_refusals_were_lost_is_no_success(workspace, capsys, monkeypatch, steps):
    """Its exit code was 0, and a pipeline shipped it; of one of three steps that are not watched, too."""
    look, looked = Monitor.look, []
    monkeypatch.setattr(Monitor, "leaks", property(lambda monitor: bool(looked)))
    monkeypatch.setattr(Monitor, "look", lambda self, *given, **named: looked.append(look(self, *given, **named)))
    options = ["--safety_on_leak", "stop", "--safety_monitor_steps", steps]
    assert cli.main(["train", str(workspace / "config.yaml"), *options]) == 1
    assert "on_leak='stop'; the model was saved in" in capsys.readouterr().err
    assert (workspace / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("sft", "sft reads messages, or conversations, or prompt and completion, or text, or input_ids"),
        ("dpo", "dpo reads chosen and rejected"),
        ("kto", "kto reads prompt and completion and label, or chosen and rejected"),
    ],
)
def test_columns_that_no_trainer_reads_are_named_before_the_model_is_loaded(
    workspace, trainer, said, monkeypatch, capsys
):
    """It was a KeyError, as of a run that failed."""
    monkeypatch.setattr("spf.train._load_model", lambda *_: pytest.fail("the model was loaded"))
    (workspace / "alpaca.jsonl").write_text(json.dumps({"instruction": "Say hello.", "output": "Hello."}))
    arguments = ["--trainer", trainer, "--model", str(workspace / "model"), "--data", str(workspace / "alpaca.jsonl")]
    assert cli.main(["train", *arguments, "--output", str(workspace / "columns")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"the data have the columns instruction, output, and {said}; rename yours" in error


CHAT = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    ("trainer", "row", "said"),
    [
        ("sft", {"prompt": "Say hello.", "messages": CHAT}, "remove the column prompt"),  # as UltraChat has it
        ("sft", {"conversations": CHAT}, "rename the column to messages"),
        ("dpo", {"prompt": "Say hello.", "chosen": CHAT, "rejected": CHAT}, "remove the column prompt"),
    ],
)
def test_forms_that_trl_breaks_off_at_are_named_before_the_model_is_loaded(
    workspace, trainer, row, said, monkeypatch, capsys
):
    """KeyError: 'completion', KeyError: 'text' and a TypeError, when the model was there."""
    monkeypatch.setattr("spf.train._load_model", lambda *_: pytest.fail("the model was loaded"))
    (workspace / "form.jsonl").write_text(json.dumps(row))
    arguments = ["--trainer", trainer, "--model", str(workspace / "model"), "--data", str(workspace / "form.jsonl")]
    assert cli.main(["train", *arguments, "--output", str(workspace / "columns")]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("more", [{"text": "Hello."}, {"prompt": "Say hello.", "completion": "Hello."}])
def test_conversations_beside_what_trl_reads_are_no_mistake(more, tmp_path):
    refuse_unreadable(Dataset.from_list([{"conversations": CHAT, **more}]), "sft", "text")


def test_flags_override_the_file_and_the_rule_can_be_off(workspace):
    path = str(workspace / "config.yaml")
    assert cli.main(["train", path, "--safety_rule", "none", "--max_steps", "1", "--save_strategy", "no"]) == 0
    assert not (workspace / "out" / "checkpoint-1").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("safety.jsonl", "gone.jsonl"), "gone.jsonl: no such safety data file"),
        (("data.jsonl", "nodata.jsonl"), "nodata.jsonl: no such training data file"),
        (("safety_rank: 8", "safety_rule: nullspace"), "safety_rule: no rule nullspace; there are none, null-space"),
        (("safety_rank: 8", "safety_rank: 0"), "rank must be at least 1, not 0"),
        (("safety_rank: 8", "safety_rank: 8\nsafety_rule: mix"), "safety_rank: the rule mix has no rank"),
        (("lora_r: 4", "dataset_train_split: trian"), "has no split 'trian'; it has train"),
        (("lora_r: 4", "eval_strategy: steps"), "dataset_test_split: "),
        (("lora_r: 4", "dataset_streaming: true"), "dataset_streaming is not supported"),
        (("lora_r: 4", "datasets: [{path: a}]"), "datasets"),
        (("dataset_name", "dataset_config"), "spf train needs dataset_name"),
        (("model_name_or_path", "run_name"), "spf train needs model_name_or_path"),
        (("/model\n", "/modle\n"), "/modle: no such model directory"),
    ],
)
def test_mistakes_end_in_one_sentence(workspace, capsys, change, message):
    config = workspace / "config.yaml"
    config.write_text(config.read_text().replace(*change))
    assert cli.main(["train", str(config)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("spf: ")
    assert message in error


def test_the_file_knows_home_directories_and_the_names_of_the_other_commands(workspace, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(workspace))
    monkeypatch.chdir(workspace)
    names = "model: ~/model\ndata: ~/gone.jsonl\noutput: ~/there\nsafety_data: ~/safety.jsonl\nbatch_size: 3\n"
    (workspace / "short.yaml").write_text(names + "use_cpu: true\nbf16: false\n")
    assert cli.main(["train", "~/short.yaml"]) == 2
    assert capsys.readouterr().err == f"spf: {workspace}/gone.jsonl: no such training data file\n"
    assert (workspace / "there").is_dir()
    given = {}

    def trainer(model, args, **more):
        given.update(more, args=args)
        raise ValueError("enough seen")

    monkeypatch.setattr("spf.train.SFTTrainer", trainer)
    assert cli.main(["train", "~/short.yaml", "--data=~/data.jsonl", "--output", "~/elsewhere"]) == 2
    assert (given["args"].output_dir, given["args"].per_device_train_batch_size) == (f"{workspace}/elsewhere", 3)
    assert len(given["train_dataset"]) == 12
    assert not list(workspace.glob("~*"))


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_and_the_evaluation_split_are_not_ignored(workspace, monkeypatch, bits):
    """What the trainer is given; nothing is trained."""
    given = {}

    def trainer(model, args, **more):
        given.update(more, model=model)
        raise ValueError("enough seen")

    monkeypatch.setattr("spf.train.SFTTrainer", trainer)
    flags = [f"--load_in_{bits}bit", "true", "--eval_strategy", "steps", "--dataset_test_split", "train"]
    assert cli.main(["train", str(workspace / "config.yaml"), *flags]) == 2
    assert len(given["eval_dataset"]) == 12
    kinds = {type(module).__name__ for module in given["model"].modules()}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds


def test_a_mistyped_model_claims_no_directory(workspace, capsys, monkeypatch):
    """The right command was refused then: the directory held "a run with other settings"."""
    output = ["--output", str(workspace / "aligned")]
    assert cli.main(["align", str(workspace / "modle"), *output]) == 2
    assert not (workspace / "aligned" / "settings.json").exists()
    monkeypatch.setattr("spf.lab.align.generate_answers", lambda *_, **__: pytest.fail("it is asked"))
    with pytest.raises(pytest.fail.Exception, match="it is asked"):
        cli.main(["align", str(workspace / "model"), *output])
    capsys.readouterr()
    # what something was made with is kept
    write_json(workspace / "aligned" / "benign_answers.json", [])
    assert cli.main(["align", str(workspace / "model"), *output]) == 2
    assert "holds 0 answers" in capsys.readouterr().err
    # so is that of an adapter whose other parts are cleared away by then
    (workspace / "aligned" / "benign_answers.json").unlink()
    monkeypatch.setattr("spf.lab.align._align", lambda args, output: (output / ADAPTER_CONFIG).write_text("{}") / 0)
    assert cli.main(["align", str(workspace / "model"), *output]) == 1
    assert (workspace / "aligned" / "settings.json").exists()
    assert (workspace / "aligned" / "settings.json").is_file()


@pytest.mark.slow
def test_align_saves_the_tokenizer_and_an_adapters_own_is_preferred(workspace, monkeypatch):
    monkeypatch.setattr("spf.models.cpu_dtype", lambda: torch.float32)
    flags = ["--epochs", "1", "--max_new_tokens", "1", "--output", str(workspace / "aligned")]
    assert cli.main(["align", str(workspace / "model"), *flags]) == 0
    _, tokenizer = load_model(str(workspace / "aligned"))
    assert tokenizer.chat_template == TEMPLATE
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(workspace / "aligned")
    assert load_model(str(workspace / "aligned"))[1].chat_template == tokenizer.chat_template
    for file in [*(workspace / "aligned").glob("tokenizer*"), workspace / "aligned" / "chat_template.jinja"]:
        file.unlink()
    assert load_model(str(workspace / "aligned"))[1].chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{}/no/such/model"], "no/such/model: no such model directory"),
        (["lock", "inspect", "{}"], "{}"),
        (["train", "{}"], "{}"),
        (["bench", "{}/broken.yaml"], "broken.yaml"),
        (["study", "dance"], "no command 'study dance'; there are run, measure, report"),
    ],
)
def test_wrong_names_and_files_end_in_a_sentence(tmp_path, capsys, arguments, message):
    (tmp_path / "broken.yaml").write_text("model: [")
    assert cli.main([argument.format(tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "spf: " in error
    assert message.format(tmp_path) in error


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_study_shows_its_commands(capsys, arguments):
    assert cli.main(["study", *arguments]) == 0
    assert "spf study measure" in capsys.readouterr().out


def test_usage_and_unknown_command(capsys):
    assert cli.main([]) == 0
    assert "spf train --help" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert "spf demo" in capsys.readouterr().out
    assert cli.main(["dance"]) == 2
    assert "no command 'dance'" in capsys.readouterr().err
    assert cli.main(["report", "nowhere"]) == 2
    assert "nowhere/results.json: no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_runs_every_arm_and_is_resumable(tmp_path, tokenizer, monkeypatch, capsys):
    """The demo's own code from end to end; only the model is tiny, and told to have refused."""
    from spf.lab.demo import run

    monkeypatch.setenv("COLUMNS", "160")  # tables break words on a narrow terminal
    monkeypatch.setattr(run, "load_aligned_demo_model", lambda: (make_model(), tokenizer))
    monkeypatch.setattr(run, "cpu_dtype", lambda: torch.float32)
    monkeypatch.setattr("spf.data.refusals.generate_answers", lambda m, t, prompts, **kw: [REFUSAL] * len(prompts))
    arguments = ["demo", "--output", str(tmp_path), "--steps", "3", "--sql_eval", "6", "--safety_rank", "8"]
    assert cli.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["arms"]) == ["base", "plain", "spf", "paper"]
    for name, arm in results["arms"].items():
        low, high = arm["asr_ci"]
        assert 0 <= low <= arm["asr"] <= high <= 1
        assert {"over_refusal", "utility", "seconds_per_step"} <= set(arm)
        assert (arm["seconds_per_step"] is None) == (name == "base")
    assert results["config"]["prompts"]["harmful_eval"] == 104
    assert {"seed", "versions", "prompts"} <= set(results["config"])
    for file in (
        "safety_utility.png",
        "report.html",
        "spf/adapter_model.safetensors",
        "paper/adapter_model.safetensors",
    ):
        assert (tmp_path / file).stat().st_size > 1000
    out = capsys.readouterr().out
    assert "Load it with" in out
    assert "probe" in out
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("done before, kept") == 4


def test_demo_prompts_are_three_disjoint_sets():
    from spf.data import packaged_prompts
    from spf.lab.demo.run import DemoArguments, training_data

    data, counts = training_data(DemoArguments())
    trained = {row.messages[0]["content"] for row in data}
    attack = set(packaged_prompts("harmful_attack"))
    assert len(trained & attack) == counts["harmful_train"] > 30
    assert not trained & set(packaged_prompts("harmful_anchors"))
    assert not trained & set(packaged_prompts("harmful_eval"))
    assert not set(packaged_prompts("harmful_anchors")) & set(packaged_prompts("harmful_eval"))


def test_demo_loss_is_the_mean_over_answer_tokens(tmp_path, tokenizer):
    from transformers import TrainingArguments

    from spf.lab.trainer import AnswerTrainer, collate_answers

    rows = [
        {"prompt_ids": [3, 10, 11, 12, 4], "answer_ids": [20, 21, 2]},
        {"prompt_ids": [3, 13, 4], "answer_ids": [22, 2]},
    ]
    model = make_model().eval()
    batch = collate_answers(rows, 1)
    trainer = AnswerTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    loss = float(trainer.compute_loss(model, batch).detach())
    total = count = 0.0
    for row in rows:  # one by one, without padding
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        labels = torch.tensor([[-100] * len(row["prompt_ids"]) + row["answer_ids"]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * len(row["answer_ids"])
        count += len(row["answer_ids"])
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_installed_command_prints_its_usage():
    done = subprocess.run(
        [sys.executable, "-m", "spf.cli", "--help"], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0
    assert "spf train CONFIG" in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("first\nsecond"), 2, "spf: first\n"),
        (RuntimeError("shape"), 1, "spf: RuntimeError: shape (--traceback shows where)\n"),
        (KeyboardInterrupt(), 130, "spf: interrupted\n"),
    ],
)
def test_every_error_is_one_sentence_and_a_code(monkeypatch, capsys, error, code, sentence):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "redraw", fail)
    assert cli.main(["report", "run"]) == code
    assert capsys.readouterr().err == sentence
    assert cli.main(["report", "run", "--traceback"]) == code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_could_not_be_ended_in_order_is_one(number, code, monkeypatch, capsys):
    """The progress bar of an interrupted run raised; what a supervisor saw was a run that failed."""

    @contextmanager
    def half_made():
        try:
            yield
        finally:
            raise AttributeError("no position")

    def run(arguments):
        with keeping(lambda: "step 4 is kept"), working(), half_made():
            signal.raise_signal(number)

    monkeypatch.setattr(cli, "redraw", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["report", "run"]) == code
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == (
        "spf: interrupted, and ending it failed: AttributeError: no position (--traceback shows where)\n"
    )


def test_sigterm_ends_like_an_interrupt(monkeypatch, capsys):
    monkeypatch.setattr(cli, "redraw", lambda arguments: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["report", "run"]) == 143
    assert capsys.readouterr().err == "spf: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_help_and_version_import_no_torch():
    code = (
        "import sys, spf.cli; spf.cli.main(['--help']); spf.cli.main(['--version']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trl " in done.stdout


def test_lazy_names_are_all_there():
    import spf

    assert set(spf.__all__) <= set(dir(spf))
    assert all(getattr(spf, name).__name__ == name for name in spf.__all__)
    assert set(spf._MODULES) == set(spf.__all__)
