import copy
import re

import pytest
import torch

from spf.cli import main
from spf.evaluation import Rate
from spf.files import directory_lock
from spf.lab.analysis.inputs import Prompts
from spf.lab.study import measure, report
from tests.conftest import make_model

MODELS = ["instruct-medium", "ssft-medium", "dpo-medium", "unlearning-medium", "ssft-small"]
SETS = ["safe", "unsafe", "jb_co_task", "jb_co_text"]


def changed(base, seed):
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return tuned


def rate(value):
    found = Rate(round(50 * value), 50)
    return {"hits": found.hits, "count": 50, "value": found.value, "interval": list(found.interval)}


def readings(value):
    return {name: rate(value) for name in ("first_token", "teacher_forced", "free_running")}


def evaluation(names, success=0.5):
    sets = {name: {"instruct": readings(success), "null": readings(1 - success)} for name in SETS}
    sets["safe"], sets["unsafe"] = ({"instruct": readings(a), "null": readings(1 - a)} for a in (1, 0))
    return {name: copy.deepcopy(sets) for name in names}


def make_results(seed):
    base = make_model("llama", seed=seed)
    ids = torch.randint(5, 2048, (4, 8, 7), generator=torch.Generator().manual_seed(seed))
    sets = {name: Prompts(x, torch.ones_like(x)) for name, x in zip(SETS, ids, strict=True)}
    tuned = {name: changed(base, i) for i, name in enumerate(MODELS)}
    embeds = sets["unsafe"].embed(base)
    measured = measure.measure_world(
        base,
        tuned,
        sets,
        positions=2,
        attacked={"ssft-medium": {"m=1": embeds, "m=2": embeds}},
        evaluate=lambda model: {"safe_instruct": 1.0, "unsafe_null": 0.5, "jb_co_text": 0.25},
        scaled=["ssft-medium", "dpo-medium"],
        alphas=(0, 1),
        lipschitz_prompts=4,
    )
    arms = {"plain": tuned["ssft-medium"], "null-space": tuned["dpo-medium"]}
    return {
        "preset": "tiny",
        "grammar": "matched",
        "seed": seed,
        "command": "spf study run --preset tiny",
        "versions": {"torch": "0"},
        "data": {"lengths": {"safe": [3, 5]}, "separability": {"6-gram": 0.51}},
        "training": {"pretrain": {"seconds": 3.0, "steps": 2, "loss": [[1, 2.0], [2, 1.0]]}},
        "evaluation": evaluation(["base", *MODELS]),
        "attack": {"ssft-medium": {m: {"success": rate(0.4)} for m in ("m=1", "m=2")}},
        "measurements": measured,
        "bridge": {
            "measurements": measure.measure_world(base, arms, sets, positions=2, lipschitz_prompts=4),
            "evaluation": evaluation(["before", *arms]),
        },
    }


@pytest.fixture(scope="module")
def runs():
    return [make_results(0), make_results(1)]


FIGURES = {
    "tau", "tau-layers", "separation", "angles", "null-space", "rows", "gains", "lipschitz-means", "lipschitz",
    "spans", "alpha", "attack", "bridge", "training",
}  # fmt: skip


def test_page_of_several_seeds_has_every_figure_and_nothing_from_elsewhere(runs, tmp_path):
    page = report.write_report(runs, tmp_path).read_text("utf-8")
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == FIGURES
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert re.search(r"[✓≈✗] \d of 2\b", page)
    assert "JB-CO-Text" in page
    assert "2 seeds" in page


def test_parts_that_were_not_run_are_left_out(runs, tmp_path):
    only = {"measurements": copy.deepcopy(runs[0]["measurements"]), "preset": "tiny"}
    only["measurements"]["alpha"] = {}
    for part in ("models", "updates"):
        kept = {"base", "ssft-medium"}
        only["measurements"][part] = {k: v for k, v in only["measurements"][part].items() if k in kept}
    report.write_report(only, tmp_path)
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == FIGURES - {"alpha", "attack", "bridge", "training"}


def test_a_path_leads_to_every_place_that_it_fits():
    tree = {"a": [{"x": 1}, {"x": 2}, {}], "b": {"c": {"x": 3}}, "none": None}
    assert list(report.walk(tree, "a/*/x")) == [(0, 1), (1, 2)]
    assert list(report.walk(tree, "b/*/*")) == [("c", "x", 3)]
    assert list(report.walk(tree, "b")) == [({"c": {"x": 3}},)]
    assert not [*report.walk(tree, "nowhere/*"), *report.walk(tree, "none/*/x")]


def test_of_several_matrices_of_a_layer_the_first_is_drawn(runs):
    run = {**runs[0], **runs[0]["measurements"]}
    first, *others = run["updates"]["ssft-medium"]["rows"][0].values()
    gains = [rows["sets"]["safe"]["gain"]["mean"] / rows["chance_gain"] for rows in (first, *others)]
    assert len(set(gains)) > 1
    [ax] = [ax for ax in report.plot_gains([run]).axes if ax.get_title(loc="left") == "SSFT, medium rate"]
    [line] = [line for line in ax.lines if line.get_label() == "safe"]
    assert line.get_ydata()[0] == pytest.approx(gains[0])


def planted(run, model, safe, unsafe, jailbreak=0.0):
    for layer in run["measurements"]["models"][model]["tau"]:
        for name, value in (("safe", safe), ("unsafe", unsafe), ("jb_co_task", jailbreak), ("jb_co_text", jailbreak)):
            layer[name]["mean"] = value


def test_claims_follow_what_was_measured(runs):
    run = copy.deepcopy(runs[0])
    for i, name in enumerate(["base", "ssft-small", "ssft-medium", "dpo-medium", "unlearning-medium"]):
        planted(run, name, 1.0 + i, -1.0 - i)
    found = {claim.text: claim for claim in report.claims(run)}
    assert found["τ gap: SSFT < DPO < unlearning"].holds
    assert found["τ gap: SSFT < DPO < unlearning"].measured == "6, 8, 10"
    assert found["SSFT, medium rate: larger τ gap than at the small rate"].holds
    assert found["SSFT, medium rate: τ of JB-CO-Text lies between"].holds
    assert found["SSFT, medium rate: safe prompts are executed, at least 95 %"].holds
    assert not found["DPO, medium rate: JB-CO-Text succeeds more than JB-CO-Task (%)"].holds  # both 50 %
    planted(run, "dpo-medium", 20.0, -1.0, jailbreak=-2.0)
    run["evaluation"]["ssft-medium"]["unsafe"]["null"] = readings(0.9)
    again = {claim.text: claim for claim in report.claims(run)}
    assert not again["τ gap: SSFT < DPO < unlearning"].holds
    assert not again["DPO, medium rate: τ of JB-CO-Text lies between"].holds
    assert not again["SSFT, medium rate: unsafe ones refused, at least 95 %"].holds
    for topic, model_part in (("lipschitz", "models"), ("matrices", "updates")):
        assert topic in run["measurements"][model_part]["ssft-medium"]
    steep = run["measurements"]["models"]["ssft-medium"]["lipschitz"]
    steep["safe"]["mean"], steep["unsafe"]["mean"] = 1e9, 0.0
    lip = [c for c in report.claims(run) if c.topic.startswith("O4") and c.text.startswith("SSFT, medium")]
    assert [claim.holds for claim in lip] == [True, True]
    for matrix in run["measurements"]["updates"]["ssft-medium"]["matrices"]:
        matrix["share"] = matrix["chance_share"] / 2
    null = [c for c in report.claims(run) if c.topic.startswith("O2") and c.text.startswith("SSFT, medium")]
    assert not any(claim.holds for claim in null)


def test_a_claim_that_shows_in_some_seeds_only_is_marked_so(runs):
    yes, no = (report.Claim("t", "c", "1", holds) for holds in (True, False))
    table = report.claims_table([[yes, yes, no], [yes, no, no]])
    assert [row[2].line for row in table.rows] == ["✓ 2 of 2", "≈ 1 of 2", "✗ 0 of 2"]


def test_table_of_models_gives_the_spread_over_seeds(runs):
    table = report.summary_table([r["measurements"] for r in runs])
    assert [row[0].text for row in table.rows][:2] == ["before", "instructions only (baseline)"]
    assert all(len(row) == len(table.head) for row in table.rows)
    assert all("±" in row[1].text for row in table.rows)
    single = report.summary_table([runs[0]["measurements"]])
    assert not any("±" in cell.text for row in single.rows for cell in row)


def gradients(cosine, overlap):
    """As measure_gradients gives them; nothing of the update is known where no watched matrix changed."""
    kinds = {f"{what}_{kind}": 2.5 for what in ("effective_rank", "cer") for kind in ("safety", "utility")}
    after = {f"{what}_{side}": overlap for what in ("overlap", "update") for side in ("left", "right")}
    chance = {"chance_left": 0.25, "chance_right": 0.125}
    models = {"base": kinds, "ssft-medium": {**kinds, **after, **chance}, "dpo-medium": {**kinds, **after, **chance}}
    models["dpo-medium"] = models["dpo-medium"] | {"update_left": None, "update_right": None}
    return {"k": 10, "counts": {}, "models": {name: {**of, "cosine": cosine} for name, of in models.items()}}


def test_table_of_the_safety_gradient_gives_means_over_seeds_and_chance(runs, tmp_path):
    names = ("base", "ssft-medium", "dpo-medium")
    many = [
        {"models": dict.fromkeys(names), "gradients": gradients(cosine, overlap)}
        for cosine, overlap in ((-0.1, 0.5), (-0.3, 0.7))
    ]
    table = report.gradient_table(many)
    assert table.head[:4] == ["Model", "effective rank, safety", "utility", "CER(10), safety"]
    assert table.head[-4:] == [
        "overlap with before, left", "overlap with before, right", "update's share, left", "update's share, right",
    ]  # fmt: skip
    base, ssft, dpo = [[cell.text for cell in row] for row in table.rows]
    assert [row[0] for row in (base, ssft, dpo)] == ["before", "SSFT, medium rate", "DPO, medium rate"]
    assert base[1:6] == ["2.5 ± 0", "2.5 ± 0", "2.5 ± 0", "2.5 ± 0", "-0.2 ± 0.14"]
    assert base[6:] == [""] * 4
    assert ssft[6:] == ["0.6 ± 0.14 (0.25)", "0.6 ± 0.14 (0.12)"] * 2
    assert dpo[6:] == [*ssft[6:8], "", ""]
    measured = copy.deepcopy(runs[0])
    before = gradients(0.5, 0.1)["models"]["base"]
    models = dict.fromkeys(measured["measurements"]["models"], before)
    measured["measurements"]["gradients"] = {**gradients(0, 0), "models": models}
    page = report.write_report(measured, tmp_path).read_text("utf-8")
    assert "CER(10), safety" in page


def test_command_reads_the_runs_and_names_what_does_not_fit(runs, tmp_path, capsys, monkeypatch):
    for i, run in enumerate(runs):
        measure.write_json(tmp_path / f"{i}" / "results.json", run)
    measure.write_json(tmp_path / "parity" / "results.json", {**runs[0], "grammar": "parity"})
    seen = []
    monkeypatch.setattr(report, "write_report", lambda found, directory: seen.append(found) or directory)
    command = ["study", "report", "--output", str(tmp_path), "--runs"]
    assert main([*command, str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    assert [run["seed"] for run in seen[0]] == [0, 1]
    assert main([*command, str(tmp_path / "0"), str(tmp_path / "parity")]) == 2
    assert main([*command, str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert "differ in preset or grammar" in said
    assert "nowhere/results.json: no such file" in said.replace("\n", "")
    with directory_lock(tmp_path):
        assert main([*command, str(tmp_path / "0")]) == 2
    assert "another run writes here (pid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {}, "one seed, which would count as 2; name each once"),
        ({"settings": {"steps": 1}}, {"seed": 1, "settings": {"steps": 2}}, "differ in settings; they are no seeds"),
        ({"kind": "measure", "aligned": "a"}, {"kind": "measure", "aligned": "b"}, "differ in aligned (a, and b)"),
        ({"kind": "measure", "unsafe": "a"}, {"kind": "measure", "unsafe": "b"}, "differ in unsafe (a, and b)"),
    ],
)
def test_what_is_no_seed_of_another_has_no_mean_with_it(first, second, said, runs, tmp_path, capsys, monkeypatch):
    """Two measures of different models, or one run named twice, were drawn with a spread over seeds."""
    for name, more in (("0", first), ("1", second)):
        measure.write_json(tmp_path / name / "results.json", {**runs[0], **more})
    monkeypatch.setattr(report, "write_report", lambda found, directory: pytest.fail("a report of both"))
    command = ["study", "report", "--output", str(tmp_path / "out"), "--runs", str(tmp_path / "0"), str(tmp_path / "1")]
    assert main(command) == 2
    assert said in capsys.readouterr().err


def test_what_is_wrong_deep_inside_is_a_mistake_in_the_input(runs, tmp_path, capsys):
    """Not a run that failed: such results were once code 1, or a traceback."""
    short, other = copy.deepcopy(runs[0]), copy.deepcopy(runs[1])
    short["measurements"]["models"]["base"]["separation"].pop()
    del other["measurements"]["models"]["ssft-small"]
    for name, run in {"short": short, "good": runs[0], "other": other}.items():
        measure.write_json(tmp_path / name / "results.json", run)
    command = ["study", "report", "--output", str(tmp_path / "out"), "--runs"]
    assert main([*command, str(tmp_path / "short")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"spf: {tmp_path / 'short'}: results.json does not fit (ValueError('zip() argument")
    assert main([*command, str(tmp_path / "good"), str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "spf: the seeds did not measure the same models and prompts"


def test_unusable_results_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="no results"):
        report.write_report([], tmp_path)
    other = copy.deepcopy(runs[1])
    del other["measurements"]["models"]["ssft-small"]
    with pytest.raises(ValueError, match="not measure the same"):
        report.write_report([runs[0], other], tmp_path)
