"""Cells know what they were made from, and only what is alike is compared."""

import json
import shutil

import pytest

pytest.importorskip("matplotlib")

from spf.cli import main
from spf.errors import SafetyDataError
from spf.lab.bench import grid
from spf.lab.bench.alike import made_from, unlike
from spf.lab.bench.bars import bars
from spf.lab.bench.cell import Cell
from spf.lab.bench.effort import efforts
from spf.lab.bench.report import write_bench_report
from spf.lab.bench.scenarios import other_prompts
from spf.lab.bench.summary import dominated, summarise
from tests.conftest import make_model
from tests.lab.test_bench_report import aligned, cell, find, part, save, tried, with_kind

MODEL = "my-model"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a model, a file of prompts, a grid of two cells, and no cell that is run."""
    monkeypatch.chdir(tmp_path)
    make_model(seed=0).save_pretrained(MODEL)
    prompts(tmp_path / "a.jsonl", "attack", "report")
    (tmp_path / "grid.yaml").write_text(
        f"model: {MODEL}\ngrids:\n  - {{scenarios: [none], methods: [aligned], seeds: [0]}}\n"
        "  - {scenarios: [foreign-50], methods: [plain], seeds: [0]}\n"
    )
    monkeypatch.setattr(grid, "prepare", lambda *given: pytest.fail("a cell was to be run"))
    return tmp_path


def prompts(path, *parts, count=3):
    rows = [{"prompt": f"{path.stem} {part} {i}", "part": part} for part in parts for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def bench(*more):
    return main(["bench", "grid.yaml", "--output", "out", *more])


def keep(directory, **more):
    """Both cells of the grid, as they would have been made."""
    made = [with_kind(aligned(), 5), with_kind(cell("foreign-50", asr=90), 45)]
    for of in made:
        config = vars(Cell(of["scenario"], of["method"], model=MODEL))
        of |= {"model": MODEL, "config": {name: value for name, value in config.items() if name != "curve_steps"}}
        save(directory / "out", of | more)


# -------------------------------------------------------------------------------------------------- made from


def test_cells_of_other_weights_are_refused_also_where_none_is_pending(place, capsys):
    keep(place, made_from=made_from(MODEL, None))
    assert bench() == 0
    assert "2 cells, 2 of them done" in capsys.readouterr().out
    shutil.move(MODEL, "elsewhere")
    shutil.copytree("elsewhere", MODEL, copy_function=shutil.copy)  # later files with the same weights
    assert bench() == 0
    shutil.rmtree("elsewhere")
    shutil.move(MODEL, "elsewhere")
    assert bench() == 0  # what is not there cannot be looked at
    make_model(seed=1).save_pretrained(MODEL)
    capsys.readouterr()
    assert bench() == 2
    printed = capsys.readouterr()
    assert "of them done" not in printed.out
    assert (
        f"out/{MODEL}/lora/foreign-50/plain/seed-0.json: made from other weights than {MODEL} has now; remove "
        f"out/{MODEL} and bench-work/{MODEL}, or give another --output and --work" in printed.err
    )
    assert bench("--report_only") == 0  # says nothing of today's model
    # other cells of the model than those of the grid would stand beside them, too
    shutil.move(f"out/{MODEL}/lora/foreign-50/plain", f"out/{MODEL}/lora/foreign-50/null-space")
    assert bench("--prompts", "a.jsonl") == 2
    assert "null-space/seed-0.json: made from other weights" in capsys.readouterr().err
    shutil.rmtree(f"out/{MODEL}")
    with pytest.raises(pytest.fail.Exception, match="a cell was to be run"):
        bench("--prompts", "a.jsonl")


def test_cells_of_other_prompts_are_refused(place, capsys):
    prompts(place / "b.jsonl", "attack", "report")
    keep(place, made_from=made_from(MODEL, place / "a.jsonl"))
    assert bench() == 0  # nothing is measured by them now
    assert bench("--prompts", "a.jsonl") == 0
    capsys.readouterr()
    assert bench("--prompts", "b.jsonl") == 2
    assert "plain/seed-0.json: made with other prompts than b.jsonl holds now; give the file" in capsys.readouterr().err


def test_cells_that_do_not_know_what_they_were_made_from_are_taken_as_before(place):
    keep(place)
    make_model(seed=1).save_pretrained(MODEL)
    assert bench("--prompts", "a.jsonl") == 0


def test_what_is_called_demo_here_is_not_the_demo_model(place):
    shutil.move(MODEL, "demo")
    assert made_from("demo", None) == {"weights": None, "prompts": None}


# ----------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("none.jsonl", "none.jsonl: no such file; --prompts takes a JSONL file with the columns prompt and part"),
        (MODEL, f"{MODEL}: a directory; --prompts takes"),
        ("report.jsonl", "report.jsonl: no prompt of the part 'attack', which is needed (parts there: report)"),
        ("attack.jsonl", "attack.jsonl: no prompt of the part 'report', which is needed (parts there: attack)"),
        ("empty.jsonl", "empty.jsonl: no prompt of the part"),
        ("damaged.jsonl", "damaged.jsonl:1: not a JSON object"),
        ("partless.jsonl", "partless.jsonl:1: `part` is missing; every row needs the columns prompt and part"),
    ],
)
def test_prompts_are_read_before_any_cell_runs(place, capsys, file, said):
    for part_name in ("report", "attack"):
        prompts(place / f"{part_name}.jsonl", part_name)
    for name, text in {"empty": "", "damaged": "{", "partless": '{"prompt": "x"}'}.items():
        (place / f"{name}.jsonl").write_text(text)
    assert bench("--prompts", file) == 2
    assert said in capsys.readouterr().err
    keep(place)
    assert bench("--prompts", file) == 2


def test_an_attack_with_other_prompts_asks_for_their_file_before_any_cell_runs(place, capsys):
    assert bench() == 2
    assert "foreign-50: attacks with prompts of another origin; name their file by --prompts" in capsys.readouterr().err


def test_other_splits_measure_other_prompts(place, capsys):
    text = (place / "grid.yaml").read_text().replace("seeds: [0]", "seeds: [0], split: validation")
    (place / "grid.yaml").write_text(text)
    assert bench("--prompts", "a.jsonl") == 2
    assert "a.jsonl: no prompt of the part 'validation'" in capsys.readouterr().err


def test_further_columns_and_line_separators_in_a_prompt_are_read(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two", "part": "report", "id": 3}, ensure_ascii=False), "utf-8")
    assert other_prompts(path, "report") == ["one\u2028two"]
    with pytest.raises(SafetyDataError, match="no prompt of the part 'attack'"):
        other_prompts(path, "attack")


# -------------------------------------------------------------------------------------------------- comparison


def of(made, **config):
    return made | {"config": made["config"] | config}


def grids():
    """Plain and the default rule from two grids."""
    plain = of(cell(utility=40, asr=90), learning_rate=3e-4)
    ours = of(cell(method="null-space", utility=60, asr=6), learning_rate=1e-3, batch_size=16, steps=20)
    return [aligned(asr=5), plain | {"steps": 40}, ours | {"steps": 20}]


def test_arms_of_other_training_settings_are_not_compared(tmp_path):
    cells = grids()
    group = find(summarise(cells), "null-space")
    assert "utility" not in group.differences
    assert group.differences["asr"].mean == pytest.approx(0.01)  # the aligned model was not trained
    found = {bar.metric: bar for bar in bars(summarise(cells))}
    assert (found["utility"].status, found["utility"].unlike) == ("unknown", True)
    assert not found["asr"].unlike
    assert dominated(part(cells)) == {}
    save(tmp_path, *cells)
    markdown, page, *_ = write_bench_report(tmp_path)
    said = (
        "Not compared, since they differ: null-space with plain (steps 20, not 40; learning rate 0.001, not 0.0003; "
        "batch size 16, not 8)."
    )
    for file in (markdown, page):
        assert said in file.read_text("utf-8")
        assert "1 not comparable" in file.read_text("utf-8")
    assert "not comparable |" in markdown.read_text("utf-8")


def test_arms_of_the_same_settings_are_compared(tmp_path):
    plain, ours = (of(made, learning_rate=3e-4) for made in (cell(asr=90), cell(method="null-space", asr=6)))
    asked = [
        plain | {"steps": 40},
        of(ours, steps=40, rule={"rank": 4}) | {"steps": 40},
    ]  # 40 are what the scenario has
    summary = summarise([aligned(asr=5), *asked])
    assert find(summary, "null-space").unlike == {}
    assert "utility" in find(summary, "null-space").differences
    assert dominated(part(asked)) == {"plain": ["null-space"]}
    # a method that adds rows takes more steps, which nobody asked for
    assert unlike([(plain | {"steps": 40}, ours | {"steps": 41})]) == {}
    # a variant says by its name that it has other settings than plain's default
    variant = of(cell(method="null-space", variant="lr-x3"), learning_rate=9e-4)
    assert "utility" in find(summarise([plain, variant]), "null-space", "lr-x3").differences
    save(tmp_path, aligned(asr=5), *asked)
    assert "Not compared" not in write_bench_report(tmp_path)[0].read_text("utf-8")


def test_each_seed_is_held_to_its_own_plain_cell():
    def arm(method, *rates):
        return [of(cell(method=method, seed=seed), learning_rate=rate) for seed, rate in enumerate(rates)]

    assert find(summarise([*arm("plain", 1e-3, 1e-3), *arm("lisa", 1e-3, 1e-3)]), "lisa").unlike == {}
    group = find(summarise([*arm("plain", 2e-3, 2e-3), *arm("lisa", 1e-3, 1e-3)]), "lisa")
    assert (group.unlike, group.differences) == ({"plain": {"learning_rate": (1e-3, 2e-3)}}, {})
    # also of seeds that plain was not run with
    assert find(summarise([*arm("plain", 1e-3), *arm("lisa", 2e-3, 2e-3)[1:]]), "lisa").unlike
    with pytest.raises(ValueError, match=r"learning_rate 0\.001, another 0\.002"):
        summarise(arm("lisa", 1e-3, 2e-3))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"judge": "prefix-2"}, "judge prefix-2, not prefix-1"),
        ({"made_from": {"weights": "bb", "prompts": "cc"}}, "weights bb, not aa"),
        ({"made_from": {"weights": "aa", "prompts": "dd"}}, "prompts dd, not cc"),
    ],
)
def test_other_judges_weights_and_prompts_are_not_compared(tmp_path, more, said):
    origin = {"made_from": {"weights": "aa", "prompts": "cc"}}
    cells = [aligned(asr=5, **origin), cell(asr=90, **origin), cell(method="null-space", **origin | more)]
    cells = [with_kind(made, 5) for made in cells]
    group = find(summarise(cells), "null-space")
    assert group.differences == {}
    assert find(summarise(cells), "plain").differences
    assert all(bar.unlike for bar in bars(summarise(cells)))
    save(tmp_path, *cells)
    text = write_bench_report(tmp_path)[0].read_text("utf-8")
    assert f"null-space with the aligned model ({said}) and null-space with plain ({said})." in text
    assert "): 3 not comparable" in text


def test_what_is_not_known_is_taken_as_the_same():
    known = {"made_from": {"weights": "aa", "prompts": None}}
    cells = [aligned(asr=5), cell(asr=90, made_from={"weights": "aa", "prompts": "cc"}), cell(method="spf", **known)]
    assert all(group.unlike == {} for group in summarise(cells))


def test_cells_of_another_judge_are_on_no_curve():
    cells = [tried("plain", steps, 99) for steps in (5, 40)]
    assert efforts(part([aligned(), *cells]))
    assert efforts(part([aligned(judge="prefix-2"), *cells])) == []
