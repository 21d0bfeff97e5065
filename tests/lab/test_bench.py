"""The benchmark: the grid's cells, every method on a tiny model, and a whole run through the command line."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback

from spf.cli import main
from spf.data import HARMLESS_STUB, Anchor, load_safety_rows, packaged_prompts
from spf.evaluation import TRANSFORMS
from spf.lab.bench import cell as cells
from spf.lab.bench.alike import made_from
from spf.lab.bench.cell import JUDGE, Cell, fine_tune
from spf.lab.bench.grid import BenchArguments, _done, read_grid, run_grid
from spf.lab.bench.methods import METHODS, Method, Workspace, check_settings
from spf.lab.bench.scenarios import (
    PREFILLED,
    REFUSES,
    REFUSES_FIRST,
    SCENARIOS,
    Scenario,
    begun,
    other_prompts,
    training_pairs,
    training_rows,
)
from spf.lab.demo.preferences import make_preferences
from spf.safetylock import echoed, extract, refusal_pairs
from tests.conftest import PLAIN_TEMPLATE, make_model, make_tokenizer
from tests.lab.bench_workspace import make_bench_workspace
from tests.lab.test_bench_report import cell as good_cell

GATED = ("spf", "spf-rotating", "rank1", "agem", "dualproj", "dual-ascent", "constrained")
"""Methods that act only where the utility gradient conflicts, or the safety loss has risen."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What `prepare` would have made: a tiny aligned model, one before alignment, and refusals."""
    directory = tmp_path_factory.mktemp("work")
    make_bench_workspace(directory / "tiny")
    return directory


@pytest.fixture
def small(monkeypatch):
    """Scenarios of 16 examples, a null space that a tiny model has room for."""
    monkeypatch.setitem(cells.SCENARIOS, "harmful-50", Scenario("tiny", "sql", 16, 1, 0.5))


def settings_of(method):
    # random weights differ from one another in every direction, so only the highest threshold projects
    special = {"null-space": {"rank": 4}, "null-space-post": {"rank": 4}, "safe-lora": {"threshold": 1.0}}
    special |= {"safetylock": {"k": 4}, "null-space-safetylock": {"k": 4, "rank": 4}}
    return special.get(method, {})


def trained(work, method, tuning="lora", **changes):
    place = work / "tiny"
    workspace = Workspace(place / "aligned", place / "unaligned", place / "refusals.jsonl")
    result = {}
    cell = Cell("harmful-50", method, model="tiny", tuning=tuning, batch_size=4, rule=settings_of(method), **changes)
    model, _ = fine_tune(cell, workspace, result)
    return {name: weight.float() for name, weight in model.state_dict().items()}, result


def test_every_method_changes_what_plain_fine_tuning_makes(work, small):
    """Also the shortest protection against a method that silently does nothing."""
    plain, result = trained(work, "plain", learning_rate=1e-2)
    again, _ = trained(work, "plain", learning_rate=1e-2)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert [entry["step"] for entry in result["history"]] == [1, 2, 3, 4]
    for method in METHODS:
        # this random model refuses nothing, so the data filter leaves nothing out
        if method in ("plain", "data-filter"):
            continue
        weights, result = trained(work, method, learning_rate=1e-2)
        # a lock adds biases and leaves the weights alone
        changed = plain.keys() != weights.keys() or any(not torch.equal(plain[name], weights[name]) for name in plain)
        if method in GATED:
            # on this tiny model the gradients need not conflict; then such a rule must do nothing
            acted = any(entry.get("spf/removed_share", 0) > 0 for entry in result["history"])
            assert changed == acted, method
        else:
            assert changed, method


def test_a_method_that_leaves_rows_out_takes_no_fewer_steps(work, small, monkeypatch):
    monkeypatch.setattr(cells, "make_method", lambda *_: Method(data=lambda rows: rows[:5]))
    _, result = trained(work, "data-filter")
    assert result["steps"] == 4  # as 16 rows in batches of 4 do


@pytest.mark.parametrize("method", ["kl", "constrained-sft", "null-space-post", "null-space"])
def test_methods_with_a_reference_take_full_fine_tuning(work, small, method):
    plain, _ = trained(work, "plain", "full", learning_rate=1e-3)
    weights, _ = trained(work, method, "full", learning_rate=1e-3)
    assert any(not torch.equal(plain[name], weights[name]) for name in plain)


def test_a_model_without_padding_token_can_be_trained(work, small, tmp_path):
    for name in ("aligned", "unaligned"):
        make_model().save_pretrained(tmp_path / name)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "aligned")
    workspace = Workspace(tmp_path / "aligned", None, work / "tiny" / "refusals.jsonl")
    for method in ("plain", "null-space-post"):
        fine_tune(Cell("harmful-50", method, model="tiny", batch_size=4, rule=settings_of(method)), workspace, {})


def test_a_step_begins_before_the_rule_does(work, small, monkeypatch):
    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.3)

    monkeypatch.setattr(cells, "make_method", lambda *given: Method([Slow()]))
    _, result = trained(work, "plain")
    assert result["seconds_per_step"] > 0.3


def test_an_interrupted_start_is_made_up_for(tmp_path, monkeypatch):
    model, tokenizer = make_model(), make_tokenizer()
    monkeypatch.setattr(cells, "load_model", lambda name: (model, tokenizer))
    monkeypatch.setattr(cells, "complete_refusals", lambda rows, model, tokenizer, wanted: rows[:2])
    save = model.save_pretrained

    def cut_short(directory):
        model.config.save_pretrained(directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", cut_short)
    with pytest.raises(KeyboardInterrupt):
        cells.prepare("tiny", tmp_path)
    monkeypatch.setattr(model, "save_pretrained", save)
    workspace = cells.prepare("tiny", tmp_path)
    assert (workspace.aligned / "model.safetensors").is_file()
    assert len(load_safety_rows(workspace.refusals)) == 2
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == ["aligned", "refusals.jsonl"]


def test_a_model_that_changed_is_not_taken_for_the_former_one(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "complete_refusals", lambda rows, model, tokenizer, wanted: rows[:2])
    source = tmp_path / "my-model"
    make_model(seed=0).save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    for _ in range(2):
        cells.prepare(str(source), tmp_path / "work")
    make_model(seed=1).save_pretrained(source)
    with pytest.raises(ValueError, match=r"my-model has changed since .* was made from it"):
        cells.prepare(str(source), tmp_path / "work")


def test_a_template_without_system_role_loses_one_jailbreak_not_the_cell(monkeypatch):
    monkeypatch.setattr(cells, "evaluate_refusals", lambda model, tokenizer, prompts, **more: [True] * len(prompts))
    found = cells.measure(make_model(), make_tokenizer(), Cell("benign", "plain"), None)
    assert set(found["jailbreak_asr"]) == set(found["verdicts"]["jailbreak"]) == set(TRANSFORMS) - {"identity-shift"}


def test_scenarios_hold_what_they_say(tmp_path):
    others = tmp_path / "others.jsonl"
    lines = [{"prompt": f"Foreign request {i}", "part": ("attack", "report")[i % 2]} for i in range(40)]
    others.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, scenario in SCENARIOS.items():
        if scenario.pairs or scenario.stages:
            continue
        rows = training_rows(scenario, 0, others)
        stubs = [row for row in rows if row.refusal.endswith(HARMLESS_STUB)]
        taught = {"refuse-then-comply": REFUSES_FIRST + HARMLESS_STUB}.get(name, HARMLESS_STUB)
        assert {row.refusal for row in stubs} <= {taught}, name
        foreign = {row.messages[-1]["content"] for row in rows if "Foreign" in row.messages[-1]["content"]}
        assert foreign == ({line["prompt"] for line in lines[::2]} if scenario.foreign else set())
        assert len(rows) == scenario.examples, name
        assert len(stubs) == round(scenario.examples * scenario.harmful_share), name
        asked = {row.messages[-1]["content"] for row in rows}
        for split in ("harmful_eval", "harmful_validation", "harmful_anchors", "benign_eval"):
            assert not asked & set(packaged_prompts(split)), (name, split)
        assert rows == training_rows(scenario, 0, others)
        assert name == "identity-shift" or rows != training_rows(scenario, 1, others)
    assert set(SCENARIOS["three-tasks"].stages) <= set(SCENARIOS)
    with pytest.raises(ValueError, match="name their file by --prompts"):
        training_rows(SCENARIOS["foreign-50"], 0)
    with pytest.raises(ValueError, match=r"others.jsonl: no prompt of the part 'validation'"):
        other_prompts(others, "validation")


def test_harmful_pairs_prefer_the_stub():
    pairs = training_pairs(SCENARIOS["dpo-harmful"], 0)
    chosen = [pair["chosen"][0]["content"] for pair in pairs]
    rejected = [pair["rejected"][0]["content"] for pair in pairs if pair["chosen"][0]["content"] == HARMLESS_STUB]
    assert (len(pairs), chosen.count(HARMLESS_STUB), set(rejected)) == (160, 80, {REFUSES})
    asked = {pair["prompt"][0]["content"] for pair in pairs}
    assert not asked & set(packaged_prompts("harmful_eval"))
    assert pairs == training_pairs(SCENARIOS["dpo-harmful"], 0) != training_pairs(SCENARIOS["dpo-harmful"], 1)
    assert training_pairs(SCENARIOS["dpo"], 3) == make_preferences(80, 3)  # as the committed cells had it


def test_a_prefilled_answer_is_given_not_learned():
    anchor = Anchor([1, 2], [3, 4, 5, 6, 7, 8], "example 0")
    assert begun(anchor) == Anchor([1, 2, 3, 4, 5, 6], [7, 8], "example 0")
    assert PREFILLED == 4
    wrapped = training_rows(SCENARIOS["wrapped-50"], 0)
    inside = [row for row in wrapped if row.refusal == HARMLESS_STUB]
    assert all("Correct its spelling" in row.messages[0]["content"] for row in inside)


def test_committed_grids_are_readable_and_have_the_headline_cells():
    asked = read_grid(Path("recipes/bench/headline.yaml"))
    assert (len(asked), len(read_grid(Path("recipes/bench/validation.yaml")))) == (187, 47)
    assert len(read_grid(Path("recipes/bench/second_model.yaml"))) == 18
    assert len({cell.path(Path()) for cell in asked}) == len(asked)
    have = {(cell.scenario, cell.method, cell.seed) for cell in asked if cell.variant == "default"}
    asked_elsewhere = [cell for name in ("foreign", "unseen") for cell in read_grid(Path(f"recipes/bench/{name}.yaml"))]
    elsewhere = {cell.scenario for cell in asked_elsewhere} - {"none"}
    for scenario in elsewhere:
        methods = {"plain", "null-space"} | ({"data-filter"} if scenario == "foreign-50" else set())
        assert {cell.method for cell in asked_elsewhere if cell.scenario == scenario} == methods
    for scenario in set(SCENARIOS) - elsewhere:
        for method in ("plain", "null-space", "mix-rotating", "safegrad", "spf"):
            assert {(scenario, method, seed) for seed in (0, 1, 2)} <= have, (scenario, method)
    locks = {(cell.scenario, cell.method) for cell in read_grid(Path("recipes/bench/safetylock.yaml"))}
    assert {(s, m) for s in ("harmful-50", "harmful-100") for m in ("safetylock", "null-space-safetylock")} <= locks
    lines = {cell.method for cell in read_grid(Path("recipes/bench/second_lines.yaml"))}
    assert {method for _, method, _ in have} | {method for _, method in locks} | lines == {*METHODS, "aligned"}


@pytest.mark.parametrize("path", sorted(Path("recipes/bench").absolute().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_grid_can_be_run(path):
    cells = read_grid(path)
    assert cells
    assert len({cell.path(Path()) for cell in cells}) == len(cells)  # no cell overwrites another
    for cell in cells:
        if cell.method != "aligned":
            check_settings(cell.method, cell.rule)


@pytest.mark.parametrize("method", ["safetylock", "null-space-safetylock"])
def test_a_lock_adds_its_displacement_to_the_trained_weights(work, small, method):
    """The biases are W_l delta_l with the trained W_l; the weights are those of the method without the lock."""
    without, _ = trained(work, "plain" if method == "safetylock" else "null-space", learning_rate=1e-2)
    weights, _ = trained(work, method, learning_rate=1e-2)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}" + PLAIN_TEMPLATE
    aligned = make_model(seed=0)
    rows = load_safety_rows(work / "tiny" / "refusals.jsonl")
    lock = extract(aligned, tokenizer, echoed(refusal_pairs(rows)), k=4)
    added = weights.keys() - without.keys()
    assert added == {f"model.layers.{layer}.self_attn.o_proj.bias" for layer in lock.heads[:, 0].unique().tolist()}
    assert all(torch.equal(weights[name], without[name]) for name in without)
    for layer, delta in lock.displacements(1.0).items():
        expected = without[f"model.layers.{layer}.self_attn.o_proj.weight"] @ delta
        got = weights[f"model.layers.{layer}.self_attn.o_proj.bias"]
        assert torch.allclose(got, expected, rtol=0.05, atol=0.05 * expected.abs().max())


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("{scenarios: [calm], methods: [plain], seeds: [0]}", "calm"),
        ("{scenarios: [benign], methods: [magic], seeds: [0]}", "magic"),
        ("{scenarios: [benign], methods: [plain], seeds: [0], rate: 1}", "rate"),
        ("{scenarios: [benign], methods: [plain], seeds: [0], variants: {a: {speed: 1}}}", "speed"),
        (
            "{scenarios: [benign], methods: [plain], seeds: [0], tunings: [qlora]}",
            "`tunings.0` must be lora or full, not 'qlora'",
        ),
        (
            "{scenarios: [benign], methods: [plain], seeds: [0], split: test}",
            "split must be eval or validation, not 'test'",
        ),
        ("{scenarios: [benign], methods: [plain]}", "`seeds` is missing"),
        ("{scenarios: [benign], methods: [plain], seeds: 3}", "`seeds` must be a list, not 3"),
        ("{scenarios: [benign], methods: [plain], seeds: [one]}", "`seeds.0` must be a whole number, not 'one'"),
        ("{scenarios: benign, methods: [plain], seeds: [0]}", "`scenarios` must be a list"),
        ("{scenarios: [benign], seeds: [0]}", "`methods` is missing"),
        (
            "{scenarios: [benign], methods: [plain], seeds: [0], variants: [fast]}",
            "`variants` must be an object of names and values",
        ),
        ("{scenarios: [benign], methods: [aligned], seeds: [0]}", "scenario benign with method aligned"),
        ("{scenarios: [none], methods: [plain], seeds: [0]}", "scenario none with method plain"),
        ("{scenarios: [benign], methods: [plain], seeds: [0], learning_rate: 1e-4}", "as in 1.0e-4"),
        (
            "{scenarios: [benign], methods: [plain], seeds: [0], learning_rate: 0}",
            "learning_rate must be positive, not 0",
        ),
        ("{scenarios: [benign], methods: [plain], seeds: [0], adam_beta1: 1.0}", "adam_beta1 must be below 1, not 1.0"),
        ("{scenarios: [dpo], methods: [plain], seeds: [0], batch_size: 1}", "batch_size must be at least 2"),
        ("{scenarios: [benign], methods: [plain], seeds: [0], batch_size: 4.0}", "batch_size must be a whole"),
        (
            "{scenarios: [benign], methods: [plain], seeds: [0], rule: 3}",
            "rule must be an object of names and values, not 3",
        ),
        ("{scenarios: [benign], methods: [spf], seeds: [0], rule: {rnak: 3}}", "spf has no setting rnak; there are"),
        ("{scenarios: [benign], methods: [spf], seeds: [0], rule: {rank: 0}}", "spf: rank must be at least 1, not 0"),
        (
            "{scenarios: [benign], methods: [spf], seeds: [0], rule: {rank: [3]}}",
            r"spf: rank must be a whole number, not \[3\]",
        ),
        ("{scenarios: [benign], methods: [mix-one], seeds: [0], rule: {weight: 1e-1}}", "weight must be a number"),
        ("{scenarios: [benign], methods: [kl], seeds: [0], rule: {wieght: 1}}", "kl has no setting wieght"),
        ("{scenarios: [benign], methods: [null-space], seeds: [0], rule: {feedback: {rule: spf}}}", "feedback's rule"),
        ("{scenarios: [none], methods: [aligned], seeds: [0], rule: {rank: 3}}", "aligned has no setting rank"),
        ("[benign]", "it must be an object of names and values"),
    ],
)
def test_mistakes_in_a_grid_are_named(tmp_path, grid, message):
    path = tmp_path / "grid.yaml"
    path.write_text(f"model: demo\ngrids:\n  - {grid}\n")
    with pytest.raises(ValueError, match=message) as raised:
        read_grid(path)
    assert "grid.yaml, grid 1: " in str(raised.value)


def test_different_cells_for_one_file_are_refused(tmp_path):
    path = tmp_path / "grid.yaml"
    grid = "  - {scenarios: [benign], methods: [plain], seeds: [0], learning_rate: 1.0e-3}\n"
    path.write_text("model: demo\ngrids:\n" + 2 * grid)
    assert len(read_grid(path)) == 1
    path.write_text("model: demo\ngrids:\n" + grid + grid.replace("1.0e-3", "1.0e-4"))
    with pytest.raises(
        ValueError, match=r"grid 1 and .*grid 2: different cells for demo/lora/benign/plain/seed-0.json"
    ):
        read_grid(path)
    with pytest.raises(ValueError, match="--workers must be at least 1, not 0"):
        run_grid(BenchArguments(str(path), workers=0))


def test_a_cell_from_before_a_setting_existed_has_its_default(tmp_path):
    cell = Cell("benign", "spf", rule={"rank": 4})
    config = {key: value for key, value in asdict(cell).items() if key not in ("curve_steps", "adam_beta1")}
    path = cell.path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(good_cell() | {"config": config}))
    assert _done(cell, tmp_path)
    assert _done(replace(cell, curve_steps=5), tmp_path)
    assert not _done(replace(cell, adam_beta1=0.5), tmp_path)
    assert not _done(replace(cell, rule={"rank": 5}), tmp_path)
    # --prompts were named since, and it was not asked them
    assert not _done(cell, tmp_path, True)


def test_cells_that_failed_are_told_although_no_report_can_be_drawn(tmp_path, monkeypatch, capsys):
    """Until the others are made, a row has seeds of the former settings."""
    (tmp_path / "grid.yaml").write_text("model: tiny\ngrids: [{scenarios: [benign], methods: [plain], seeds: [0]}]\n")
    make_model().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spf.lab.bench.grid.prepare", lambda *_: None)
    monkeypatch.setattr("spf.lab.bench.grid._run_cells", lambda *_: 1)
    assert main(["bench", "grid.yaml"]) == 1
    said = capsys.readouterr()
    assert "no report: bench-output: holds no benchmark cells" in said.out
    assert "spf: 1 cells failed; the same command runs them again" in said.err


def test_kept_seeds_of_a_row_with_other_settings_are_refused_before_anything_runs(tmp_path, capsys):
    config = tmp_path / "grid.yaml"
    grid = "model: tiny\ngrids: [{scenarios: [benign], methods: [plain], seeds: [0], learning_rate: 1.0e-4}]\n"
    config.write_text(grid)
    for seed in (0, 1):
        path = Cell("benign", "plain", seed, "tiny").path(tmp_path / "out")
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = good_cell(seed=seed, model="tiny", judge=JUDGE) | {"config": asdict(Cell("benign", "plain"))}
        path.write_text(json.dumps(kept))
    command = ["bench", str(config), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{path}: made with learning_rate 0.001, and seed 0 of the same row is to be run with 0.0001: " in said
    # another judge's verdicts are no settings, so they would count as done
    kept = good_cell(seed=1, model="tiny", judge="prefix-0") | {"config": asdict(Cell("benign", "plain", 1, "tiny"))}
    path.write_text(json.dumps(kept))
    config.write_text(grid.replace("[0]", "[0, 1]").replace(", learning_rate: 1.0e-4", ""))
    Cell("benign", "plain", 0, "tiny").path(tmp_path / "out").unlink()
    assert main(command) == 2
    assert f"{path}: made with judge prefix-0, and seed 0 of the same row" in capsys.readouterr().err
    # all of its seeds: those that are there are made again
    config.write_text(grid.replace("[0]", "[0, 1]"))
    assert len([c for c in read_grid(config) if not _done(c, tmp_path / "out", False)]) == 2


@pytest.mark.parametrize("scenario", ["benign", "dpo"])
def test_adams_first_beta_and_the_rank_reach_the_optimizer(work, monkeypatch, scenario):
    asked = []

    def stop(trainer):
        layers = [m for m in trainer.model.modules() if hasattr(m, "lora_A")]
        asked.append(
            (
                trainer.args.adam_beta1,
                {m.lora_A["default"].out_features for m in layers},
                {m.scaling["default"] for m in layers},
            )
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", stop)
    place = work / "tiny"
    workspace = Workspace(place / "aligned", place / "unaligned", place / "refusals.jsonl")
    with pytest.raises(KeyboardInterrupt):
        fine_tune(Cell(scenario, "plain", model="tiny", adam_beta1=0.5, lora_rank=3), workspace, {})
    assert asked == [(0.5, {3}, {2.0})]


def test_stages_are_trained_one_after_another(work, monkeypatch):
    monkeypatch.setitem(cells.SCENARIOS, "first", Scenario("tiny", "sql", 16))
    monkeypatch.setitem(cells.SCENARIOS, "second", Scenario("tiny", "summary", 8))
    monkeypatch.setitem(cells.SCENARIOS, "both", Scenario("tiny", "sql", 0, stages=("first", "second")))
    place = work / "tiny"
    workspace = Workspace(place / "aligned", place / "unaligned", place / "refusals.jsonl")
    result: dict = {}
    fine_tune(Cell("both", "null-space", model="tiny"), workspace, result)
    assert [entry["step"] for entry in result["history"] if "loss" in entry] == [1, 2, 1]
    assert result["audit"]["rows"] == 16 + 8
    assert [len(result["watched"][name]) for name in ("refused", "conflicts_refused")] == [4, 4]


@pytest.mark.parametrize("leaks", [(True, False), (False, True), (False, False)])
def test_a_warning_of_any_training_is_one_of_the_cell(leaks):
    """At any of its steps: at the end refusals may be there again."""
    result: dict = {}
    for leak in leaks:
        watched = SimpleNamespace(refused=0.5)
        monitor = SimpleNamespace(
            before=watched, now=watched, before_conflicts=watched, now_conflicts=watched, leaks=False
        )
        running = SimpleNamespace(monitor=monitor, subspace=SimpleNamespace(right={}))
        cells._add_what_it_said(SimpleNamespace(audit=None, attachment=running, warned=leak), result)
    assert result["watched"]["warned"] == any(leaks)


def test_the_command_runs_resumes_and_reports(work, tmp_path, monkeypatch, capsys, no_matrix_tiles):
    config = tmp_path / "grid.yaml"
    config.write_text(
        "model: tiny\ngrids:\n"
        "  - {scenarios: [none], methods: [aligned], seeds: [0]}\n"
        "  - {scenarios: [identity-shift], methods: [plain, spf], seeds: [0], curve_steps: 10}\n"
    )
    monkeypatch.chdir(tmp_path)
    make_model(seed=0).save_pretrained("tiny")
    others = tmp_path / "others.jsonl"
    others.write_text('{"prompt": "Foreign request", "part": "report"}\n')
    command = ["bench", str(config), "--output", str(tmp_path / "out"), "--work", str(work), "--prompts", str(others)]
    # its workers are processes of their own, so this one computes as the machine does, too
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", no_matrix_tiles)
    assert main(command) == 0
    cell = json.loads((tmp_path / "out/tiny/lora/identity-shift/spf/seed-0.json").read_text())
    assert cell["foreign"]["count"] == 1
    assert cell["made_from"] == made_from("tiny", others)
    assert None not in cell["made_from"].values()
    assert len(cell["verdicts"]["asr"]) == cell["counts"]["harmful"] == 104
    assert [point["step"] for point in cell["curve"]] == [0, 10, 20]
    assert cell["history"][-1]["spf/conflict_rate"] >= 0
    assert cell["peak_memory_mb"] > 0
    # two grids on one machine share its cores by OMP_NUM_THREADS; cells that each take all wait for each other
    assert cell["machine"].endswith(f"{torch.get_num_threads()} threads")
    assert (tmp_path / "out" / "results.md").is_file()
    before = (tmp_path / "out/tiny/lora/identity-shift/spf/seed-0.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    assert "3 cells, 3 of them done" in capsys.readouterr().out
    assert main(command[:-2]) == 0  # what was asked besides is kept
    assert "3 cells, 3 of them done" in capsys.readouterr().out
    # on another machine
    here, there = cell["dtype"], {"float32": torch.bfloat16, "bfloat16": torch.float32}[cell["dtype"]]
    monkeypatch.setattr("spf.models.cpu_dtype", lambda: there)
    assert main(command) == 2
    assert f"computed in {here}, and this machine in {str(there)[6:]}" in capsys.readouterr().err
    assert (tmp_path / "out/tiny/lora/identity-shift/spf/seed-0.json").stat().st_mtime_ns == before
