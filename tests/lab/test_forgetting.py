"""The benchmark's measure of forgetting: how far harmless prompts are answered as the aligned model answered them."""

import re

import pytest

from spf.data import load_safety_rows, packaged_prompts
from spf.lab.bench import cell as cells
from spf.lab.bench import methods
from spf.lab.bench import summary as of_cells
from spf.lab.bench.cell import Cell, measure_forgetting, run_cell
from spf.lab.bench.grid import _line
from spf.lab.bench.methods import check_settings, make_method
from spf.lab.bench.report import write_bench_report
from spf.lab.bench.summary import summarise
from tests.conftest import make_model
from tests.lab.bench_workspace import make_bench_workspace
from tests.lab.test_bench_report import aligned, cell, find, save

REFUSED = "I'm sorry, but I can't help with that."


@pytest.fixture
def workspace(tmp_path):
    return make_bench_workspace(tmp_path / "work" / "tiny")


def answering(monkeypatch, answers):
    """Have models answer prompts by these functions of the prompt, in turn."""
    turns = iter(answers)

    def answer(model, tokenizer, prompts, **options):
        assert options["max_new_tokens"] == 32
        say = next(turns)
        return [say(prompt) for prompt in prompts]

    monkeypatch.setattr("spf.lab.baselines.replay.generate_answers", answer)
    monkeypatch.setattr(cells, "generate_answers", answer)


@pytest.mark.parametrize("split", ["eval", "validation"])
def test_answers_are_compared_with_the_aligned_models(workspace, tokenizer, monkeypatch, split):
    prompts = packaged_prompts(f"benign_{split}")
    before = dict.fromkeys(prompts, REFUSED) | {p: f"first{i} second{i}" for i, p in enumerate(prompts[:10])}
    now = dict(before) | {prompts[0]: "First0 ... other", prompts[1]: "second1 first1", prompts[2]: ""}
    answering(monkeypatch, [before.get, now.get, now.get])
    found = measure_forgetting(None, tokenizer, split, workspace)
    assert found["count"] == 10  # what was refused is no ability
    assert found["values"] == [0.5, 1.0, 0.0, *[1.0] * 7]
    assert (found["f1"], found["exact"], found["chance"]) == pytest.approx((0.85, 0.7, 0.0))
    asked = load_safety_rows(workspace.benign(split))
    assert [row.messages[0]["content"] for row in asked] == prompts
    monkeypatch.setattr(cells, "_load_aligned", lambda *given: pytest.fail("asked once"))
    assert measure_forgetting(None, tokenizer, split, workspace) == found


def test_chance_is_the_answer_to_another_prompt(workspace, tokenizer, monkeypatch):
    prompts = packaged_prompts("benign_eval")
    numbered = {p: f"same w{i}" for i, p in enumerate(prompts)}
    answering(monkeypatch, [numbered.get, numbered.get])
    found = measure_forgetting(None, tokenizer, "eval", workspace)
    assert (found["f1"], found["exact"], found["chance"]) == pytest.approx((1.0, 1.0, 0.5))


def test_the_rule_is_given_the_answers_to_keep(workspace, monkeypatch):
    given = []
    monkeypatch.setattr(methods, "SafetyCallback", lambda *args, keep=None, **options: given.append(keep))
    tokenizer = cells.load_tokenizer(workspace.aligned)
    for settings in ({"rank": 4}, {"rank": 4, "keep": False}, {"rank": 4, "keep": True}):
        check_settings("null-space", settings)
        make_method("null-space", settings, 0, workspace, make_model(), tokenizer)
    assert given == [None, None, str(workspace.benign())]
    rows = load_safety_rows(given[2])
    assert {row.messages[0]["content"] for row in rows} <= set(packaged_prompts("benign_anchors"))
    assert all(row.refusal for row in rows)
    with pytest.raises(ValueError, match="spf has no setting keep"):
        check_settings("spf", {"keep": True})
    with pytest.raises(ValueError, match="keep must be true or false"):
        check_settings("null-space", {"keep": "prompts.jsonl"})


def kept(values, **more):
    mean = sum(values) / len(values)
    figures = {"f1": mean, "f1_ci": [mean, mean], "exact": 0.25, "chance": 0.1, "count": len(values), "values": values}
    return {"kept_answers": figures | more}


def test_the_report_says_what_is_kept(tmp_path):
    plain, rule = kept([0.2, 0.4, 0.6, 0.8]), kept([0.5, 0.7, 0.9, 0.9])
    made = [aligned(**kept([1.0] * 4, exact=1.0)), cell(**plain), cell(method="null-space", **rule)]
    group = find(summarise(made), "null-space")
    assert group.metrics["kept/f1"].mean == pytest.approx(0.75)
    assert group.differences["kept/f1"].mean == pytest.approx(0.25)
    assert group.differences["kept/f1"].low < 0.25 < group.differences["kept/f1"].high
    save(tmp_path, *made)
    text = write_bench_report(tmp_path)[0].read_text("utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert "- **Answers kept**: how far harmless prompts are answered as the aligned model did" in text
    (row,) = [line for line in text.splitlines() if "null-space" in line and "chance" in line]
    assert "75.0 (25.0% the same; chance 10.0)" in row
    assert "+25.0" in row
    save(tmp_path / "without", aligned(), cell(), cell(method="null-space"))
    assert "Answers kept" not in write_bench_report(tmp_path / "without")[0].read_text("utf-8")


@pytest.mark.parametrize("more", [{"f1": 0.9}, {"count": 3}])
def test_figures_that_do_not_fit_are_named(more):
    with pytest.raises(ValueError, match=re.escape("`kept_answers.f1` must be the mean of its values")):
        of_cells._Cell.model_validate(cell(**kept([0.2, 0.4, 0.6, 0.8], **more)))


def test_a_cell_measures_it_where_it_is_asked_for(workspace, monkeypatch):
    monkeypatch.setattr(cells, "measure", lambda *given: {})

    def made(method, **settings):
        shared = {"model": "tiny", "steps": 4, "learning_rate": 3e-2}
        return run_cell(Cell("overfit-10", method, **(shared | {"forgetting": True} | settings)), workspace)

    assert "kept_answers" not in made("plain", forgetting=False)
    plain, keeping = made("plain")["kept_answers"], made("null-space", rule={"rank": 4, "keep": True})["kept_answers"]
    assert plain["f1"] < 1
    assert plain["count"] == keeping["count"] > 90
    monkeypatch.setattr(cells, "measure_task", lambda *given: {})
    same = run_cell(Cell("none", "aligned", model="tiny", forgetting=True), workspace)["kept_answers"]
    assert (same["f1"], same["exact"]) == (1.0, 1.0)
    assert "answers kept 1.000" in _line(aligned(kept_answers=same))
