"""The table of wrong inputs for the laboratory: commands, grids, and the files that it reads back."""

import copy
import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

from spf import arguments as given_to
from spf.lab import align
from spf.lab.bench import cell as cells
from spf.lab.bench.cell import Cell
from spf.lab.bench.grid import _done, read_grid
from spf.lab.bench.methods import OTHERS, RULES, check_settings
from spf.lab.bench.summary import load_cells
from spf.lab.demo import run as demo
from spf.lab.demo.report import load_results
from spf.lab.study import run as study
from spf.lab.study import training
from spf.safetylock.command import _read_sweep
from tests.lab.test_bench_report import cell as good_cell
from tests.malformed import Case, bad_values, changes, command, damages, hints, out_of_range, outcome, parameters, put
from tests.test_malformed import of_commands, short

COMMANDS = {
    "align": (given_to.AlignArguments, lambda p: [str(p / "model")], ("model",)),
    "bench": (given_to.BenchArguments, lambda p: [str(p / "grid.yaml"), f"--output={p / 'out'}"], ("config",)),
    "demo": (given_to.DemoArguments, lambda p: [f"--output={p / 'out'}"], ()),
    "report": (given_to.ReportArguments, lambda p: [str(p)], ("run",)),
    "study run": (given_to.RunArguments, lambda p: [f"--output={p / 'out'}"], ("output",)),
    "study report": (given_to.SeedsArguments, lambda p: ["--output", str(p / "out"), "--runs", str(p)], ("runs",)),
    "study measure": (
        given_to.MeasureArguments,
        lambda p: ["--aligned", str(p / "model"), "--tuned", str(p / "model"), "--output", str(p / "out")],
        ("aligned", "tuned"),
    ),
}


def of_study_texts():
    base = COMMANDS["study measure"][1]
    for flag, text in (
        ("alphas", "x"), ("alphas", "1,,2"), ("alphas", "nan"), ("alphas", ""), ("transforms", "hypnosis"),
        ("benign", "gone.jsonl"), ("harmful", "gone.jsonl"), ("tuned", "base=x"),
    ):  # fmt: skip
        words = f"--{flag}={text}"
        yield command(f"study measure {words}", lambda p, w=words: ["study", "measure", *base(p), w], flag, text)
    for words in (["study", "dance"], ["report", "nowhere"], ["study", "report", "nowhere", "--output", "x"]):
        yield command(" ".join(words), lambda p, w=words: w, "dance", "nowhere")


# ----------------------------------------------------------------------------------------------------------- grids

GRID = {"scenarios": ["benign"], "methods": ["plain"], "seeds": [0], "tunings": ["lora"], "variants": {"default": {}}}


def of_grids():
    def grid(what, changed, *names, config=None):
        def read(p):
            content = {"model": "demo", "grids": [changed]} if config is None else config
            return read_grid(put(p / "grid.yaml", yaml.safe_dump(content).encode()))

        return Case(f"grid: {what}", read, ("grid.yaml", *names))

    for name, good in GRID.items():
        for value in (3, True, "x", None, [], {}, [3.5], [None], [[]], {"a": 3}, {"a": []}):
            if value != good and (name, value) not in (("variants", None), ("variants", {"a": {}})):
                yield grid(f"{name} {short(value)}", GRID | {name: value}, name)
        if name not in ("tunings", "variants"):
            yield grid(f"without {name}", {key: kept for key, kept in GRID.items() if key != name}, name)
    for name in ("scenario", "method", "seed", "model", "tuning", "variant", "speed", "learning rate", ""):
        yield grid(f"unknown {name}", GRID | {name: 1}, name)
        yield grid(f"variant with {name}", GRID | {"variants": {"a": {name: 1}}}, name)
    for name, hint in hints(Cell).items():
        if name in ("learning_rate", "batch_size", "adam_beta1", "lora_rank", "rule", "curve_steps", "split"):
            for value in [*bad_values(hint), *out_of_range(Cell, name)]:
                yield grid(f"{name} {short(value)}", GRID | {name: value}, name)
    yield grid("dpo of one", GRID | {"scenarios": ["dpo"], "batch_size": 1}, "batch_size")
    yield grid("aligned that is trained", GRID | {"methods": ["aligned"]}, "aligned")
    yield grid("no grid", 3, "grids")
    for config in ({}, {"model": "demo"}, {"grids": []}, {"model": 3, "grids": [GRID]}, {"model": "demo", "grids": {}}):
        yield grid(f"config {short(config)}", None, config=config)
    yield grid("a key too many", None, config={"model": "demo", "grids": [GRID], "seeds": [1]})
    twice = [GRID | {"learning_rate": 1e-3}, GRID | {"learning_rate": 1e-4}]
    yield grid("one file for two", None, config={"model": "demo", "grids": twice})
    for what, content in damages(b"model: [demo\ngrids: x"):
        yield Case(f"grid file: {what}", lambda p, c=content: read_grid(put(p / "grid.yaml", c)), ("grid.yaml",))
    yield Case("grid file: gone", lambda p: read_grid(p / "grid.yaml"), ("grid.yaml",))


def of_methods():
    """Every setting that a grid may give a method."""

    def settings(method, name, value):
        return Case(
            f"{method}: {name} {short(value)}",
            lambda p: check_settings(method, {name: value}),
            (name,),
        )

    for method in (*RULES, *OTHERS):
        yield settings(method, "nonsense", 1)
        for name in OTHERS.get(method, {}):
            for value in (True, "x", math.nan, [1], None, {}):
                if (name, value) not in (("rank", None), ("layers", [1])):
                    yield settings(method, name, value)
        if method in RULES:
            for name, hint in hints(RULES[method][0]).items():
                for value in bad_values(hint) if name != "feedback" else (3, "mix", []):
                    yield settings(method, name, value)
    for feedback in ({}, {"rule": "spf"}, {"rule": "mix", "weight": 0}, {"rule": "mix", "rate": 1}, {"weight": 1}):
        yield settings("null-space", "feedback", feedback)


# ----------------------------------------------------------------------------------------------------------- files


def of_cells():
    """A cell with one thing wrong, as the report and as a grid that goes on find it."""
    good = good_cell(
        jailbreaks={"base64": 3},
        curve=[{"step": 0, "asr": 0.1, "utility": None}],
        history=[{"step": 1, "loss": 2.0}],
        config={"split": "eval", "learning_rate": 1e-3, "batch_size": 8, "rule": {}},
    )

    def case(what, content, *names):
        place = Path("demo/lora/benign/plain/seed-0.json")
        return Case(
            f"cell: {what}", lambda p: load_cells(put(p / "x" / place, content).parents[4]), ("seed-0.json", *names)
        )

    free = ("versions", "config.rule")
    optional = ("seconds_per_step missing", "peak_memory_mb missing", "counts.utility missing")
    for what, name, whole in changes(good, free):
        missing_setting = what.startswith("config.") and what.endswith(" missing") and name != "split"
        if what not in optional and not missing_setting:
            yield case(what, json.dumps(whole).encode(), name)
    for what, (name, value) in {
        "a step without a number": ("curve", [{"asr": 0.1}]), "a curve of text": ("curve", [{"step": 0, "asr": "x"}]),
        "a share above one": ("asr", 1.2), "a share of others": ("asr", 0.5), "disorder": ("asr_ci", [0.4, 0.1]),
        "one end": ("asr_ci", [0.1]), "an unknown scenario": ("scenario", "worse"), "a tuning": ("tuning", "qlora"),
        "a metric": ("utility_metric", "bleu"), "no metric": ("utility_metric", None), "no ends": ("utility_ci", None),
        "a negative seed": ("seed", -1), "no name": ("model", ""), "a utility of others": ("utility", 0.9),
        "a task": ("utilities", {"chess": {"utility": 0.1}}), "no split": ("config", {}),
        "another split": ("config", {"split": "test"}), "infinite": ("perplexity", math.inf),
        "a count of others": ("counts", good["counts"] | {"harmful": 99}),
        "no verdicts": ("verdicts", good["verdicts"] | {"asr": "01x"}),
    }.items():  # fmt: skip
        yield case(what, json.dumps(good | {name: value}).encode(), name)
    content = json.dumps(good).encode()
    for what, damaged in damages(content):
        yield case(what, damaged)
        cell = Cell("benign", "plain")

        def again(p, c=damaged, cell=cell):
            put(cell.path(p), c)
            return _done(cell, p)

        yield Case(f"cell of before: {what}", again, ("seed-0.json",))
    yield Case("cells: none", lambda p: load_cells(p), ("holds no benchmark cells",))


def of_sources():
    def case(what, content):
        def prepare(p):
            put(p / "model" / "model.safetensors", b"x")
            put(p / "work" / str(p / "model").replace("/", "--") / "source.json", content)
            return cells.prepare(str(p / "model"), p / "work")

        return Case(f"source.json: {what}", prepare, ("source.json", "model has changed"))

    for what, content in [*damages(b'{"model.safetensors": [1, 2]}'), ("other types", b'{"model.safetensors": ["1"]}')]:
        yield case(what, content)


@cache
def results():
    return json.loads(Path("benchmarks/results/demo/results.json").absolute().read_text())


def small_results():
    found = copy.deepcopy(results())
    for arm in found["arms"].values():
        arm["history"], arm["examples"] = arm["history"][:1], arm["examples"][:1]
    return found


PER_STEP = ("arms.spf.overhead.probe_per_step missing", "result.overhead.probe_per_step missing")
"""Older runs have none."""


def of_demos():
    good = small_results()
    good["arms"] = {name: good["arms"][name] for name in ("base", "spf")}

    def case(what, content, *names):
        def arguments(p):
            put(p / "results.json", content)
            return ["report", str(p)]

        return command(f"demo: {what}", arguments, "results.json", *names)

    for what, name, whole in changes(good, ("config", "arms.base")):
        # an arm of another name is drawn too, and a run may lack arms
        if what not in ("arms has an unknown name", "arms.spf missing", "arms.base missing", *PER_STEP):
            yield case(what, json.dumps(whole).encode(), name)
    for name, value in (
        ("asr", 1.5),
        ("asr_ci", [0.9, 0.1]),
        ("seconds_per_step", -1),
        ("history", [{"loss": "x"}]),
        ("examples", [{"kind": "harmful"}]),
    ):
        bad = copy.deepcopy(good)
        bad["arms"]["spf"][name] = value
        yield case(f"{name} {short(value)}", json.dumps(bad).encode(), name)
    for what, content in damages(json.dumps(good).encode()):
        yield case(what, content)
    arm = json.dumps({"config": {}, "result": good["arms"]["spf"]}).encode()
    wrong = [
        (what, json.dumps(whole).encode()) for what, _, whole in changes(json.loads(arm), ("config", "result.history"))
    ]
    for what, content in [*damages(arm), *wrong]:
        if what not in PER_STEP:

            def resumed(p, c=content):
                put(p / "out" / "arms" / "spf.json", c)
                return ["demo", "--output", str(p / "out")]

            yield command(f"demo arm: {what}", resumed, "spf.json")


STUDY = {
    "command": "spf study run", "preset": "tiny", "grammar": "matched", "seed": 0, "versions": {"spf": "0.1.0"},
    "seconds": {"data": 1.0}, "data": {"lengths": {}}, "training": {}, "evaluation": {}, "attack": {}, "bridge": {},
    "measurements": {
        "config": {"seed": 0}, "models": {"base": {"tau": []}}, "updates": {}, "alpha": {}, "seconds": {"base": 1.0},
    },
}  # fmt: skip


def of_studies():
    def case(what, content, *names):
        def arguments(p):
            put(p / "run" / "results.json", content)
            return ["study", "report", str(p / "run"), "--output", str(p / "out")]

        return command(f"study: {what}", arguments, "results.json", *names)

    free = ("data", "training", "evaluation", "attack", "bridge", "measurements.config", "measurements.models")
    for what, name, whole in changes(STUDY, (*free, "versions", "seconds", "measurements.seconds")):
        yield case(what, json.dumps(whole).encode(), name)
    yield case("as small as that", json.dumps(STUDY).encode())
    for models in ([], {"base": 3}, {"base": {"tau": 3}}, {"base": {"tau": [{}]}}, {"other": {}}):
        bad = STUDY | {"measurements": STUDY["measurements"] | {"models": models}}
        yield case(f"models {short(models)}", json.dumps(bad).encode())
    for what, content in damages(json.dumps(STUDY).encode()):
        yield case(what, content)


def of_parts():
    """What interrupted runs keep."""
    stage = {"seconds": 1.0, "content": {}}
    history = {"schedule": {"steps": 2}, "steps": 2, "seconds": 1.0, "loss": [[1, 2.0]]}
    point = {
        "k": 2,
        "alpha": 1.0,
        "asr": 0.5,
        "asr_ci": [0.4, 0.6],
        "over_refusal": 0.1,
        "over_refusal_ci": [0.0, 0.2],
        "perplexity": 9.0,
    }
    sweep = {
        "model": "m",
        "lock": "l",
        "points": [point],
        "max_over_refusal": 0.2,
        "max_perplexity": 10.0,
        "chosen": point,
    }

    def read_stage(path):
        one = object.__new__(study.Study)
        one.directory, one.seconds = path.parent, {}
        return one._stage(path.stem, lambda: {})

    kinds = {
        "data.json": (stage, read_stage, ("content",)),
        "history.json": (
            history,
            lambda path: training.run_stage(None, training.Schedule(2, 8, 1e-3), None, path.parent, "x"),
            ("schedule",),
        ),
        "sweep.json": (sweep, lambda path: _read_sweep(path.parent), ()),
        "settings.json": ({"seed": 1}, lambda path: study.claim(path, {"seed": 1}), ("",)),
    }
    for file, (good, read, free) in kinds.items():
        optional = ("max_over_refusal missing", "max_perplexity missing", "chosen missing")
        wrong = [(w, json.dumps(whole).encode()) for w, _, whole in changes(good, free) if w not in optional]
        nan = ("max_perplexity is NaN", "chosen.perplexity is NaN")  # a strong lock may take it there
        for what, content in [*damages(json.dumps(good).encode()), *(x for x in wrong if x[0] not in nan)]:
            yield Case(f"{file}: {what}", lambda p, c=content, f=file, r=read: r(put(p / "run" / f, c)), (file, "/run"))
    for what, content in [*damages(b'["a", "b"]'), ("numbers", b"[1, 2]"), ("one too few", b'["a"]')]:
        yield Case(
            f"benign_answers.json: {what}",
            lambda p, c=content: align._read_answers(put(p / "benign_answers.json", c), 2),
            ("benign_answers.json",),
        )
    about = json.dumps({"schedule": vars(training.Schedule(2, 8, 1e-3)), "step": 1, "seconds": 1.0, "loss": []})
    part = {"config": {}, "seconds": 1.0, "result": {}}
    wrong = [(w, json.dumps(whole).encode()) for w, _, whole in changes(part, ("config", "result"))]
    for what, content in [*damages(json.dumps(part).encode()), *wrong]:
        if "result is" not in what:

            def measured(p, c=content):
                put(p / "out" / "parts" / "models.json", c)
                return ["study", "measure", *COMMANDS["study measure"][1](p)]

            yield command(f"a part of study measure: {what}", measured, "models.json")
    model = torch.nn.Linear(2, 2)
    for what, content in [
        *damages(save({"model.weight": torch.zeros(2, 2)}, metadata={"about": about})),
        ("tensors missing", save({"model.weight": torch.zeros(2, 2)}, metadata={"about": about})),
        ("tensors of others", save({"model.weight": torch.zeros(3, 3)}, metadata={"about": about})),
        ("nothing said", save({"model.weight": torch.zeros(2, 2)})),
        ("no JSON", save({"model.weight": torch.zeros(2, 2)}, metadata={"about": "x"})),
        *(
            (w, save({"a": torch.zeros(1)}, metadata={"about": json.dumps(x)}))
            for w, _, x in changes(json.loads(about), ("schedule",))
        ),
    ]:
        yield Case(
            f"state: {what}",
            lambda p, c=content: training._load_state(
                put(p / "state.safetensors", c),
                model,
                torch.optim.AdamW(model.parameters()),
                training.Schedule(2, 8, 1e-3),
            ),
            ("state.safetensors",),
        )


CASES = [
    case
    for make in (
        lambda: of_commands(COMMANDS),
        of_study_texts,
        of_grids,
        of_methods,
        of_cells,
        of_sources,
        of_demos,
        of_studies,
        of_parts,
    )
    for case in make()
]


def test_the_table_is_large_enough():
    print(f"{len(CASES)} malformed inputs of the laboratory")
    assert len(CASES) >= 600


@pytest.mark.parametrize("case", parameters(CASES))
def test_it_is_refused_in_one_sentence_before_any_work(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study.Study, "run", too_late)
    monkeypatch.setattr(demo, "load_aligned_demo_model", too_late)
    assert outcome(case, tmp_path) == "refused"


def too_late(*args, **kwargs):
    raise AssertionError("TOO LATE")


def of_good():
    yield Case("demo", lambda p: load_results(put(p / "results.json", json.dumps(results()).encode())), ())
    yield Case("cell", lambda p: load_cells(put(p / "a" / "seed-0.json", json.dumps(good_cell()).encode()).parent), ())
    yield Case(
        "grid", lambda p: read_grid(put(p / "g.yaml", yaml.safe_dump({"model": "m", "grids": [GRID]}).encode())), ()
    )
    feedback = {"rule": "dual-ascent", "rate": 2}
    yield Case(
        "feedback", lambda p: check_settings("null-space", {"feedback": feedback, "rank": None, "anchors": 3}), ()
    )


@pytest.mark.parametrize("case", parameters(list(of_good())))
def test_what_is_right_is_accepted(case, tmp_path):
    assert outcome(case, tmp_path) == "accepted"


def test_committed_results_are_read():
    """Of the demo and the study; those of the benchmark are read in test_bench_report."""
    root = Path("benchmarks/results")
    assert {"base", "plain", "spf", "paper"} == load_results(root / "demo" / "results.json")["arms"].keys()
    from spf.lab.study.report import _Results, read_json

    found = [*root.glob("study/*-[0-9].json"), *root.glob("study/demo_model/**/*.json")]
    assert len(found) >= 6
    for path in found:
        read_json(_Results, path, "")
