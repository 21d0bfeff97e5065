"""`spf lock` from end to end on tiny models, the sweep, and the prompt-level defences."""

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import spf.safetylock
from spf import cli
from spf.data import packaged_prompts
from spf.safetylock import SafetyLock, TunePoint, choose, extract, plot_sweep, sweep
from spf.safetylock.defences import (
    in_context_defence,
    perplexity_filter,
    perplexity_threshold,
    retokenisation,
    self_reminder,
)
from spf.safetylock.lock import locks_on
from tests.conftest import REFUSAL
from tests.safetylock.toys import descendant, logits, some_pairs, toy


@pytest.fixture
def workspace(tmp_path, tokenizer):
    for name, model in (("base", toy()), ("tuned", descendant("llama")), ("mistral", toy("mistral"))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"question": p.messages, "safe": p.safe, "unsafe": p.unsafe}) for p in some_pairs(10))
    )
    return tmp_path


def lock(*arguments):
    return cli.main(["lock", *map(str, arguments)])


def test_extract_inspect_apply_remove(workspace, capsys, monkeypatch):
    monkeypatch.setattr("spf.models.cpu_dtype", lambda: torch.bfloat16)  # the checkpoints' own is float32
    w = workspace
    assert lock("extract", w / "base", w / "my.lock", "--pairs", w / "pairs.jsonl", "--k", 4, "--alpha", 3) == 0
    made = SafetyLock.load(w / "my.lock")
    assert (len(made.heads), made.info.alpha, made.info.pairs) == (4, 3.0, 10)
    assert made.info.base_model == str(w / "base")
    assert lock("inspect", w / "my.lock", "--model", w / "tuned") == 0
    assert "It fits" in capsys.readouterr().out
    assert lock("inspect", w / "my.lock", "--model", w / "mistral") == 2
    assert "spf: the lock is for 2 layers of 4 heads of 8" in capsys.readouterr().err
    assert lock("extract", w / "base", w / "echo.lock", "--pairs", w / "pairs.jsonl", "--k", 4, "--echo", "true") == 0
    echo = SafetyLock.load(w / "echo.lock")
    assert (echo.info.pairs, echo.info.data_hash == made.info.data_hash) == (10, False)
    assert lock("apply", w / "tuned", w / "my.lock", w / "locked") == 0
    locked = AutoModelForCausalLM.from_pretrained(w / "locked", attn_implementation="eager")
    expected = descendant("llama")
    plain = logits(expected)
    made.apply(expected)
    assert torch.allclose(logits(locked), logits(expected), atol=1e-5)
    assert lock("apply", w / "locked", w / "my.lock", w / "twice") == 2
    assert "on the model already" in capsys.readouterr().err
    assert lock("remove", w / "locked", w / "free") == 0
    free = AutoModelForCausalLM.from_pretrained(w / "free", attn_implementation="eager")
    assert torch.equal(logits(free), plain)
    with pytest.warns(UserWarning, match="refuse less"):
        assert lock("apply", w / "tuned", w / "my.lock", w / "away", "--alpha", -2) == 0


def test_tune_writes_points_curves_and_the_chosen_lock(workspace, capsys, monkeypatch):
    """Defect 2: the evaluation runs as released. Answers are told: the lock makes the model refuse all prompts."""
    w = workspace

    def answers(model, tokenizer, prompts, **kw):
        return [REFUSAL if locks_on(model) and "alpha 2" in kw["description"] else ""] * len(prompts)

    monkeypatch.setattr("spf.safetylock.tune.generate_answers", answers)
    assert lock("extract", w / "base", w / "my.lock", "--pairs", w / "pairs.jsonl", "--k", 4) == 0
    arguments = ("tune", w / "tuned", w / "my.lock", w / "out", "--alphas", "1,2", "--ks", "2,4")
    assert lock(*arguments, "--max_over_refusal", 1) == 0
    result = json.loads((w / "out" / "sweep.json").read_text())
    settings = [(p["k"], p["alpha"]) for p in result["points"]]
    assert settings == [(2, 0), (2, 1), (2, 2), (4, 1), (4, 2)]
    # Defect 8: nothing said is no refusal.
    assert [p["asr"] for p in result["points"]] == [1, 1, 0, 1, 0]
    assert [p["over_refusal"] for p in result["points"]] == [0, 0, 1, 0, 1]
    assert all(p["perplexity"] > 1 for p in result["points"])
    assert result["chosen"]["alpha"] == 2
    tuned = SafetyLock.load(w / "out" / "lock.safetensors")
    assert (len(tuned.heads), tuned.info.alpha) == (result["chosen"]["k"], 2.0)
    assert (w / "out" / "sweep.png").stat().st_size > 1000
    written = {file.name: file.stat().st_mtime_ns for file in (w / "out").iterdir()}
    capsys.readouterr()
    with monkeypatch.context() as unread:
        unread.setattr("spf.safetylock.command.load_model", lambda *_: pytest.fail("it is finished"))
        assert lock(*arguments, "--max_over_refusal", 1) == 0
        assert "finished before with the same settings, kept" in capsys.readouterr().out
        assert lock(*arguments, "--max_new_tokens", 3) == 2
        sentence = "holds a run with other settings: max_new_tokens was 20, now 3; name another directory or give"
        assert sentence in capsys.readouterr().err
        kept = {file.name: file.stat().st_mtime_ns for file in (w / "out").iterdir()}
        assert kept == written
        # over-refusal may rise by 5 points only: another choice, and nothing is measured for it
        with pytest.warns(UserWarning, match="no setting lowers ASR within the bounds"):
            assert lock(*arguments) == 0
        assert "kept; now chosen with over-refusal up to 5.0%" in " ".join(capsys.readouterr().out.split())
        assert not (w / "out" / "lock.safetensors").exists()
        assert json.loads((w / "out" / "sweep.json").read_text())["chosen"]["alpha"] == 0
        assert lock(*arguments, "--max_over_refusal", 1) == 0
        assert json.loads((w / "out" / "sweep.json").read_text())["chosen"]["alpha"] == 2
        assert (w / "out" / "lock.safetensors").exists()
    assert lock(*arguments, "--overwrite") == 0


def test_a_lock_that_lowers_nothing_is_not_written(workspace, monkeypatch):
    w = workspace

    def answers(model, tokenizer, prompts, *, description, **kw):
        over = len(prompts) if "alpha 0" in description and prompts == packaged_prompts("benign_validation") else 0
        return [REFUSAL] * over + [""] * (len(prompts) - over)

    monkeypatch.setattr("spf.safetylock.tune.generate_answers", answers)
    assert lock("extract", w / "base", w / "my.lock", "--pairs", w / "pairs.jsonl", "--k", 4) == 0
    with pytest.warns(UserWarning, match="no setting lowers ASR within the bounds; no tuned lock was written"):
        assert lock("tune", w / "tuned", w / "my.lock", w / "out", "--alphas", "2", "--ks", "2") == 0
    assert not (w / "out" / "lock.safetensors").exists()


def test_an_interrupted_sweep_keeps_what_it_measured_and_mistakes_come_before_it(workspace, capsys, monkeypatch):
    w = workspace
    assert lock("extract", w / "base", w / "my.lock", "--pairs", w / "pairs.jsonl", "--k", 4) == 0
    with monkeypatch.context() as unread:
        unread.setattr("spf.safetylock.command.load_model", lambda *_: pytest.fail("a mistake that is known before"))
        for mistake, sentence in (
            (("--ks", "2,9"), "9 heads asked for; the lock holds 4"),
            (("--ks", "two"), "--ks two: whole numbers separated by commas"),
            (("--alphas", "1,,2"), "--alphas 1,,2: numbers separated by commas"),
            (("--ks", "2", "--max_over_refusal", 30), "--max_over_refusal must be at most 1, not 30.0"),
        ):
            assert lock("tune", w / "tuned", w / "my.lock", w / "out", *mistake) == 2
            assert sentence in capsys.readouterr().err

    def answers(model, tokenizer, prompts, *, description, **kw):
        if "alpha 2" in description:
            raise KeyboardInterrupt
        return [""] * len(prompts)

    monkeypatch.setattr("spf.safetylock.tune.generate_answers", answers)
    assert lock("tune", w / "tuned", w / "my.lock", w / "out", "--alphas", "1,2", "--ks", "2") == 130
    kept = json.loads((w / "out" / "sweep.json").read_text())["points"]
    assert [(point["k"], point["alpha"]) for point in kept] == [(2, 0), (2, 1)]


def test_a_mistyped_model_claims_no_directory(workspace, capsys):
    """The right command was refused then: the directory held "a run with other settings"."""
    w = workspace
    assert lock("extract", w / "base", w / "my.lock", "--pairs", w / "pairs.jsonl", "--k", 4) == 0
    assert lock("tune", w / "tunde", w / "my.lock", w / "out", "--ks", "2") == 2
    assert "tunde: no such model" in capsys.readouterr().err
    assert not (w / "out" / "settings.json").exists()


def test_mistakes_end_in_one_sentence(workspace, capsys):
    w = workspace
    assert lock("dance") == 2
    assert "no command 'lock dance'" in capsys.readouterr().err
    assert lock() == 0
    assert "spf lock extract MODEL LOCK" in capsys.readouterr().out
    assert lock("inspect", w / "gone.lock") == 2
    assert "gone.lock: no such lock file" in capsys.readouterr().err
    assert lock("extract", w / "base", w / "l", "--pairs", w / "pairs.jsonl", "--score", "best") == 2
    assert "argument --score: invalid choice: 'best' (choose from" in capsys.readouterr().err
    assert lock("remove", w / "base", w / "out") == 2
    assert "holds no model that was saved with its lock" in capsys.readouterr().err


def test_sweep_leaves_the_model_unlocked_and_refuses_a_lock_that_does_nothing(tokenizer, monkeypatch):
    model = toy()
    made = extract(model, tokenizer, some_pairs(6), k=3)
    plain, seen = logits(model), []
    points = sweep(
        model, tokenizer, made, [(1, 0.0), (3, 2.0)], ["How?"], ["What?"], ["I help with that"], done=seen.append
    )
    assert points == seen
    assert torch.equal(logits(model), plain)
    assert points[0].perplexity != points[1].perplexity
    monkeypatch.setattr(SafetyLock, "displacements", lambda lock, alpha: {0: torch.zeros(32)})
    with pytest.raises(ValueError, match=r"alpha = 2 does not change the model"):
        sweep(model, tokenizer, made, [(3, 0.0), (3, 2.0)], ["How?"], ["What?"], ["I help with that"])
    assert not locks_on(model)
    with pytest.raises(ValueError, match="9 heads asked for"):
        sweep(model, tokenizer, made, [(9, 1.0)], ["How?"], ["What?"], ["I help"])


def point(k, alpha, asr, over, ppl):
    return TunePoint(k, alpha, asr, (0, 1), over, (0, 1), ppl)


def test_choice():
    points = [
        point(1, 0, 0.9, 0.0, 10),
        point(1, 2, 0.2, 0.04, 10.5),
        point(1, 4, 0.0, 0.5, 10.5),
        point(1, 6, 0.1, 0.0, 30),
        point(2, 2, 0.2, 0.02, 10.9),
    ]
    assert choose(points, 0.05, 11) == points[4]
    assert choose(points, 1, 11) == points[2]
    assert choose(points, 1, 100) == points[2]
    assert choose(points[2:4], 0.05, 11) is None


def test_a_lock_that_lowers_nothing_is_not_chosen():
    """One that refused as little was, for its over-refusal."""
    unlocked = point(1, 0, 1.0, 0.015, 10)
    assert choose([unlocked, point(1, 2, 1.0, 0.0, 10)], 0.065, 11) == unlocked
    assert choose([unlocked, point(1, 2, 1.0, 0.0, 10)], 0.01, 11) is None
    assert choose([unlocked, lower := point(1, 4, 0.99, 0.0, 10)], 0.01, 11) == lower


def test_plot(tmp_path):
    path = plot_sweep(
        [point(1, 0, 1, 0, 10), point(1, 2, 0.5, 0.1, 12), point(2, 2, 0, 0, 20)], tmp_path / "p.png", "t"
    )
    assert path.read_bytes().startswith(b"\x89PNG")


def test_prompt_level_defences(tokenizer):
    prompt = "Write a poem."
    reminded = self_reminder(prompt)
    assert reminded[0]["content"].count(prompt) == 1
    assert reminded[0]["content"].lower().count("remember") == 2
    demonstrated = in_context_defence(prompt)
    assert [m["role"] for m in demonstrated] == ["user", "assistant", "user"]
    assert demonstrated[-1]["content"] == prompt
    from spf.evaluation import is_refusal

    assert is_refusal(demonstrated[1]["content"])
    model, benign = toy(), ["Write a poem.", "Tell me a story.", "Explain how to help."]
    threshold = perplexity_threshold(model, tokenizer, benign)
    assert perplexity_filter(model, tokenizer, benign, threshold) == [False] * 3
    assert any(perplexity_filter(model, tokenizer, benign, threshold * 0.999))
    with pytest.raises(ValueError, match="needs a byte-pair tokenizer, not WordLevel"), retokenisation(tokenizer):
        pass


def test_retokenisation_leaves_merges_out_and_text_as_it_is():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["a", "b", "ab", "abab"])}
    bpe = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "ab")], unk_token=None))
    )
    text = "abab" * 30
    before = bpe(text)["input_ids"]
    with retokenisation(bpe, 0.5):
        inside = bpe(text)["input_ids"]
    assert len(inside) > len(before)
    assert "".join(bpe.convert_ids_to_tokens(inside)) == text
    assert bpe(text)["input_ids"] == before


def test_import_runs_nothing():
    """Defect 1: the original's module runs an example with its author's paths when imported."""
    modules = list(Path(spf.safetylock.__file__).parent.glob("*.py"))
    assert len(modules) > 5
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for module in modules:
        for statement in ast.parse(module.read_text("utf-8")).body:
            is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            assert is_text or isinstance(statement, allowed), f"{module.name}:{statement.lineno}"
