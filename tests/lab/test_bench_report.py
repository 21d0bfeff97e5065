"""The benchmark's report: cells, summary, bars, tables, plots and page, on synthetic cells."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

from spf.evaluation import paired_difference, wilson_interval
from spf.files import write_json
from spf.lab.bench import plots, report
from spf.lab.bench import summary as of_cells
from spf.lab.bench.bars import bars
from spf.lab.bench.effort import Breaking, efforts
from spf.lab.bench.plots import plot_curves, plot_effort, plot_jailbreaks, plot_pareto
from spf.lab.bench.report import scenario_table, write_bench_report
from spf.lab.bench.scenarios import SCENARIOS
from spf.lab.bench.summary import (
    Difference,
    dominated,
    load_cells,
    missing,
    parts,
    summarise,
)
from spf.lab.report.stats import held_to, pooled_difference
from spf.lab.report.tables import markdown_table
from tests.conftest import assert_apart

COUNT = 100
no_deadline = settings(max_examples=40, deadline=None)  # shared, noisy machines


def bits(hits, count=COUNT):
    """The first `hits` prompts are hits, so that pairs agree as far as they can."""
    return "1" * hits + "0" * (count - hits)


def rate(text):
    return text.count("1") / len(text), list(wilson_interval(text.count("1"), len(text)))


def cell(scenario="benign", method="plain", seed=0, asr=5, over_refusal=30, utility=40, jailbreaks=None, **more):
    """One cell; asr, over_refusal and utility are hits of 100, jailbreaks hits of 50 by name."""
    made = {
        "model": "demo", "tuning": "lora", "scenario": scenario, "method": method, "variant": "default", "seed": seed,
        "perplexity": 12.0, "config": {"split": "eval"}, "versions": {"torch": "2"}, "machine": "m", "curve": [],
        "history": [], "counts": {"harmful": COUNT, "benign": COUNT}, "jailbreak_asr": {},
        "verdicts": {"asr": bits(asr), "over_refusal": bits(over_refusal), "utility": None, "jailbreak": {}},
        "utility": None, "utility_ci": None, "utility_metric": None,
    }  # fmt: skip
    made["asr"], made["asr_ci"] = rate(bits(asr))
    made["over_refusal"], made["over_refusal_ci"] = rate(bits(over_refusal))
    for name, hits in (jailbreaks or {}).items():
        text = bits(hits, 50)
        made["verdicts"]["jailbreak"][name] = text
        made["jailbreak_asr"][name] = dict(zip(("asr", "asr_ci"), rate(text), strict=True), count=50)
    if method == "aligned":
        made["utilities"] = {"sql": {"utility": 0.03}, "summary": {"utility": 0.2}}
    else:
        made |= {"seconds_per_step": 2.0 if method == "plain" else 2.2, "peak_memory_mb": 5120}
        if utility is not None:
            made["verdicts"]["utility"] = bits(utility)
            made["utility"], made["utility_ci"] = rate(bits(utility))
            made["utility_metric"], made["counts"]["utility"] = "sql_execution", COUNT
    return made | more


def aligned(**more):
    return cell("none", "aligned", utility=None, **more)


def save(directory, *cells):
    for c in cells:
        name = c["method"] if c["variant"] == "default" else f"{c['method']}@{c['variant']}"
        write_json(directory / c["model"] / c["tuning"] / c["scenario"] / name / f"seed-{c['seed']}.json", c)


def part(cells, scenario="benign"):
    [found] = [p for p in parts(summarise(cells)) if p.scenario == scenario]
    return found


def find(summary, method, variant="default", scenario="benign"):
    [group] = [g for g in summary if (g.method, g.variant, g.scenario) == (method, variant, scenario)]
    return group


# ------------------------------------------------------------------------------------------------- intervals

verdicts = st.integers(5, 40).flatmap(
    lambda n: st.tuples(*[st.text("01", min_size=n, max_size=n)] * 2)  # one pair of texts of the same length
)


@given(verdicts)
@no_deadline
def test_one_seed_is_newcombes_paired_interval(texts):
    a, b = texts
    found = pooled_difference([a], [b])
    expected = paired_difference([v == "1" for v in a], [v == "1" for v in b])
    assert found.mean == pytest.approx(expected.difference)
    assert (found.low, found.high) == pytest.approx(expected.interval, abs=1e-9)


def test_newcombes_published_example():
    # Newcombe 1998, table II: 36, 12, 2 and 0 pairs of 50, method 10.
    a, b = "1" * 48 + "00", "1" * 36 + "0" * 12 + "11"
    found = pooled_difference([a], [b])
    assert (found.mean, round(found.low, 4), round(found.high, 4)) == (pytest.approx(0.2), 0.0569, 0.3404)


@given(verdicts, st.integers(2, 4))
@no_deadline
def test_seeds_that_repeat_the_same_verdicts_add_nothing(texts, seeds):
    a, b = texts
    one, many = pooled_difference([a], [b]), pooled_difference([a] * seeds, [b] * seeds)
    assert (many.low, many.high, many.seeds) == (pytest.approx(one.low), pytest.approx(one.high), seeds)


text = st.text("01", min_size=12, max_size=12)


@given(st.lists(st.tuples(text, text), min_size=1, max_size=3))
@no_deadline
def test_the_interval_is_antisymmetric_and_holds_the_mean(pairs):
    ours, theirs = zip(*pairs, strict=True)
    there, back = pooled_difference(ours, theirs), pooled_difference(theirs, ours)
    assert there.low - 1e-9 <= there.mean <= there.high + 1e-9
    assert there.low >= -1
    assert there.high <= 1
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_the_interval_covers_the_true_difference(shared):
    """Prompts with their own difficulty, three seeds: independent given it, or all the same run (shared)."""
    rng = random.Random(0)
    covered, trials, widths = 0, 300, []
    for _ in range(trials):
        ours, theirs = ["", "", ""], ["", "", ""]
        for _ in range(60):
            hard = rng.random() < 0.3
            p, q = (0.9, 0.5) if hard else (0.1, 0.1)
            draws = [(rng.random() < p, rng.random() < q) for _ in range(3)]
            draws = [draws[0]] * 3 if shared else draws
            for seed, (a, b) in enumerate(draws):
                ours[seed] += "01"[a]
                theirs[seed] += "01"[b]
        found = pooled_difference(ours, theirs)
        covered += found.low <= 0.12 <= found.high
        widths.append(found.high - found.low)
    assert covered / trials >= 0.92
    assert (sum(widths) / trials < 0.17) == (shared == 0.0)  # independent seeds narrow it


def test_paired_verdicts_must_match():
    for ours, theirs in ((["01"], ["011"]), (["01", "01"], ["01"]), ([""], [""])):
        with pytest.raises(ValueError, match="same prompts"):
            pooled_difference(ours, theirs)
    with pytest.raises(ValueError, match=r"benign, plain, default: asr: paired verdicts must cover"):
        summarise([cell(), aligned(verdicts=aligned()["verdicts"] | {"asr": "01"})])


# ---------------------------------------------------------------------------------------------------- cells


def test_cells_are_read_back_and_temporary_files_ignored(tmp_path):
    cells = [aligned(), cell(seed=0), cell(seed=1), cell(method="spf", variant="lr-x3")]
    save(tmp_path, *cells)
    (tmp_path / "demo/lora/benign/plain/seed-2.tmp").write_text("{")
    (tmp_path / "demo/lora/benign/plain/results.json").write_text("{")
    found = load_cells(tmp_path)
    key = lambda c: (c["method"], c["variant"], c["seed"])  # noqa: E731
    assert sorted(found, key=key) == sorted(cells, key=key)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("asr", 1.2, "`asr` must be at most 1, not 1.2"),
        ("asr", True, "`asr` must be a number, not True"),
        ("asr", math.nan, "`asr` must be a finite number"),
        ("asr", 0.5, "`asr` must be the share of 1 in its verdicts, 0.0500"),
        ("asr_ci", [0.4, 0.1], "`asr_ci` must be [low, high] in this order"),
        ("over_refusal", None, "`over_refusal` must be a number, not None"),
        ("scenario", "worse", "`scenario` must be one of benign"),
        ("tuning", "qlora", "`tuning` must be lora or full, not 'qlora'"),
        ("seed", "0", "`seed` must be a whole number"),
        ("model", "", "`model` must be text that is not empty"),
        ("utility_metric", None, "`utility_metric` must be given where `utility` is"),
        ("utility_metric", "bleu", "`utility_metric` must be sql_execution or rouge_l, not 'bleu'"),
        ("utility", 0.9, "`utility` must be the share of 1"),
        ("counts", {"harmful": 99, "benign": 100}, "`verdicts of asr` must be 99 digits long"),
        ("verdicts", cell()["verdicts"] | {"asr": "01x"}, "`verdicts.asr` must be text of the form"),
        (
            "jailbreak_asr",
            {"base64": {"asr": 0.1, "asr_ci": [0, 1], "count": 50}},
            "`jailbreak_asr.base64` must be given where its verdicts are",
        ),
        ("curve", [{"asr": 0.1}], "`curve.0.step` is missing"),
        ("history", None, "`history` must be a list, not None"),
        ("perplexity", "12", "`perplexity` must be a number, not '12'"),
        ("config", {}, "`config.split` is missing"),
        ("machine", None, "`machine` must be text, not None"),
    ],
)
def test_a_bad_field_is_named_with_its_file(tmp_path, field, value, said):
    save(tmp_path, cell())
    path = tmp_path / "demo/lora/benign/plain/seed-0.json"
    path.write_text(json.dumps(cell() | {field: value}))
    with pytest.raises(ValueError, match=re.escape(f"seed-0.json: {said}")):
        load_cells(tmp_path)


def test_directories_that_cannot_be_reported(tmp_path):
    with pytest.raises(ValueError, match="holds no benchmark cells"):
        load_cells(tmp_path)
    save(tmp_path, cell())
    bad = tmp_path / "demo/lora/benign/plain/seed-1.json"
    bad.write_text("{")
    with pytest.raises(ValueError, match=r"seed-1\.json: not a JSON file"):
        load_cells(tmp_path)
    bad.write_text(json.dumps(cell()))
    with pytest.raises(ValueError, match=r"seed-1\.json: the same cell as .*seed-0\.json"):
        load_cells(tmp_path)
    bad.write_text(json.dumps(cell(seed=1, config={"split": "validation"})))
    with pytest.raises(ValueError, match="mixes cells"):
        load_cells(tmp_path)


# --------------------------------------------------------------------------------------------------- summary


def test_summary_over_seeds():
    cells = [aligned(asr=5, jailbreaks={"base64": 10})]
    cells += [cell(seed=s, asr=90, utility=40 + s) for s in range(3)]
    cells += [cell(method="null-space", seed=s, asr=5 + 2 * s, utility=38, jailbreaks={"base64": 15}) for s in (0, 1)]
    group = find(summarise(cells), "null-space")
    assert group.seeds == (0, 1)
    assert (group.metrics["asr"].mean, group.metrics["asr"].sd) == pytest.approx((0.06, 0.02 / math.sqrt(2)))
    assert group.metrics["jailbreak/base64"].mean == pytest.approx(0.3)
    assert find(summarise(cells[:2]), "plain").metrics["asr"].sd is None
    assert group.differences["asr"].mean == pytest.approx(0.01)
    assert group.differences["over_refusal"].mean == 0
    assert group.differences["jailbreak/base64"].mean == pytest.approx(0.1)
    assert group.differences["utility"].mean == pytest.approx(0.38 - 0.405)  # plain's seeds 0 and 1 only
    assert group.differences["utility"].seeds == 2
    assert "utility" not in find(summarise(cells), "plain").differences
    assert find(summarise(cells), "aligned", scenario="none").metrics["utility/sql"].mean == 0.03


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"config": {"split": "eval", "learning_rate": 1e-4}}, "learning_rate 0.0001, another 0.001"),
        ({"config": {"split": "eval", "rule": {"rank": 4}}}, r"rule \{'rank': 4\}, another \{\}"),
        ({"judge": "prefix-9"}, "judge prefix-9, another prefix-1"),
        ({"dtype": "bfloat16"}, "dtype bfloat16, another float32"),
        ({"made_from": {"weights": "a", "prompts": None}}, "weights a, another b"),
    ],
)
def test_seeds_with_other_settings_have_no_mean(more, named):
    """Seed 0 tried again with another learning rate, in the same directory: the table had one row, 8.3 ± 0.6."""
    kept = [cell(seed=s, dtype="float32", made_from={"weights": "b", "prompts": None}) for s in (1, 2)]
    with pytest.raises(ValueError, match=f"demo, lora, benign, plain, default: of seeds 0, 1 and 2 one has {named}"):
        summarise([cell() | more, *kept])
    # also where the first one's is not known
    with pytest.raises(ValueError, match="dtype bfloat16, another float32"):
        summarise([cell(), cell(seed=1, dtype="bfloat16"), cell(seed=2, dtype="float32")])
    # as many steps, asked for by their number
    summarise([cell(steps=40), cell(seed=1, steps=40, config={"split": "eval", "steps": 40})])
    # what more was measured is no other setting, nor is one that is not known
    summarise([cell(config={"split": "eval", "jailbreaks": False, "batch_size": 8}), *kept])


def test_what_fewer_seeds_have_says_so():
    """It stood beside means over three seeds as if it were one."""
    cells = [with_kind(aligned(asr=5), 20), with_kind(cell("foreign-50", asr=90, utility=40), 50)]
    ours = [cell("foreign-50", "null-space", seed=s, asr=5, utility=30 + 10 * s) for s in range(3)]
    ours[0] = with_kind(ours[0], 30) | {"jailbreak_asr": {"base64": {"asr": 0.5, "asr_ci": [0.4, 0.6], "count": 2}}}
    ours[0]["verdicts"]["jailbreak"]["base64"] = "10"
    found = scenario_table(part(cells + ours, "foreign-50"))
    table = rows(markdown_table(found).replace("\N{NO-BREAK SPACE}", " "))
    default = [text.strip() for text in table["null-space"].strip("| ").split(" | ")]
    named = dict(
        zip(
            [line.strip() for line in markdown_table(found).splitlines()[0].strip("| ").split("|")],
            default,
            strict=True,
        )
    )
    fewer = {name for name, text in named.items() if "1 seed" in text}
    assert fewer == {"ASR, attack's kind (%)", "That − aligned", "Worst jailbreak (%)", "Utility − plain"}
    assert (named["Utility − plain"][:5], named["Seeds"]) == ("−10.0", "3")
    assert not any("seed" in text for text in table["plain"].split("|"))


def test_rows_whose_seeds_were_made_by_different_states_of_spf_are_named(tmp_path):
    """A mean over seeds that today's code would not make was called that of today's default."""
    made = [
        cell(seed=s, versions={"torch": "2", **({"spf sources": of} if of else {})}) for s, of in ((0, None), (1, "a"))
    ]
    save(tmp_path, *made, cell(method="spf", versions={"torch": "2", "spf sources": "a"}))
    write_bench_report(tmp_path)
    assert "Seeds made by different states of spf's sources: plain." in (tmp_path / "results.md").read_text("utf-8")


def test_variants_are_compared_with_plain_of_the_same_variant():
    cells = [cell(utility=40), cell(utility=20, variant="lr-x3")]
    cells += [cell(method="null-space", utility=30, variant=v) for v in ("lr-x3", "rank-32")]
    summary = summarise(cells)
    assert find(summary, "null-space", "lr-x3").differences["utility"].mean == pytest.approx(0.1)
    assert find(summary, "null-space", "rank-32").differences["utility"].mean == pytest.approx(-0.1)


def test_rouge_is_compared_summary_by_summary():
    def scored(method, shift):
        values = [0.2 + 0.005 * i + shift * (i % 2) for i in range(100)]
        made = cell("summary", method, utility=None, utility_values=values, utility_metric="rouge_l")
        made["counts"]["utility"] = 100
        return made | {"utility": sum(values) / 100, "utility_ci": [-0.01, 0.9]}

    change = find(summarise([scored("plain", 0), scored("spf", 0.1)]), "spf", scenario="summary").differences["utility"]
    sd = 0.05 * math.sqrt(100 / 99)
    assert (change.mean, change.low) == pytest.approx((0.05, 0.05 - 1.959964 * sd / 10))
    of_cells._Cell.model_validate(scored("plain", 0))
    with pytest.raises(ValueError, match="`utility` must be the mean of utility_values"):
        of_cells._Cell.model_validate(scored("plain", 0) | {"utility": 0.1})


# ------------------------------------------------------------------------------------------- bars and fronts


def change(mean, half):
    return Difference(mean, mean - half, mean + half, 3)


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (change(0.0, 0.01), "met"),
        (change(0.01, 0.01), "met"),
        (change(0.01, 0.011), "unclear"),
        (change(0.02, 0.0), "met"),
        (change(0.021, 0.0), "missed"),
        (change(-0.5, 0.1), "met"),
        (Difference(0.0, None, None, 1), "unclear"),
        (None, "unknown"),
    ],
)
def test_status_of_a_bar(found, status):
    assert held_to(found, 0.02) == status


def test_bars_of_the_default_rule():
    cells = [aligned(asr=5, over_refusal=30, jailbreaks={"base64": 10, "prefill": 10})]
    for scenario in ("benign", "harmful-100", "dpo"):
        cells.append(cell(scenario, asr=90, utility=None if scenario == "harmful-100" else 40))
        cells.append(
            cell(
                scenario, "null-space", asr=9, over_refusal=10, utility=None if scenario == "harmful-100" else 38,
                jailbreaks={"base64": 13, "prefill": 2},
            )
        )  # fmt: skip
    found = {(b.scenario, b.metric): b for b in bars(summarise(cells))}
    assert found["benign", "asr"].status == "missed"
    assert found["benign", "asr"].allowed == 0.02
    assert found["harmful-100", "asr"].status == "unclear"  # 4 points of 5
    assert ("dpo", "asr") not in found
    assert ("harmful-100", "utility") not in found
    assert found["benign", "over_refusal"].status == "met"
    assert found["benign", "utility"].change.mean == pytest.approx(0.02)  # a loss counts upwards
    assert found["benign", "utility"].status == "missed"
    assert found["dpo", "jailbreak/base64"].status == "missed"
    assert found["dpo", "jailbreak/prefill"].status == "met"
    no_rule = bars(summarise([aligned(), cell()]))
    assert {(b.metric, b.status) for b in no_rule} == {(m, "unknown") for m in ("asr", "over_refusal", "utility")}
    assert all(b.status == "unknown" for b in bars(summarise([cell(), cell(method="null-space")])) if b.metric == "asr")


def with_kind(made, hits):
    """The cell with ASR on requests of the attack's kind, hits of 50."""
    text = bits(hits, 50)
    made["verdicts"]["foreign"] = text
    return made | {"foreign": dict(zip(("asr", "asr_ci"), rate(text), strict=True), count=50)}


def test_requests_of_the_attacks_kind_have_a_column_and_a_bar():
    cells = [with_kind(aligned(asr=5), 20), with_kind(cell("foreign-50", asr=90), 50)]
    cells += [with_kind(cell("foreign-50", "null-space", asr=5), 30)]
    found = {b.metric: b for b in bars(summarise(cells))}
    assert found["asr"].status == "met"
    assert found["foreign"].status == "missed"  # although packaged requests are refused as before
    assert found["foreign"].change.mean == pytest.approx(0.2)
    table = rows(markdown_table(scenario_table(part(cells, "foreign-50"))).replace("\N{NO-BREAK SPACE}", " "))
    assert re.search(r"\| 60\.0 \| \+20\.0 \(", table["null-space"])
    assert "| 40.0 |" in table["aligned model (not trained)"]
    without = scenario_table(part([aligned(), cell()])).head
    assert not any("kind" in name for name in without)


def test_variants_have_bars_of_their_own():
    cells = [aligned(asr=5), cell("harmful-50", asr=90)]
    cells += [cell("harmful-50", "null-space", asr=9, variant=v) for v in ("batch-4", "lr-x3", "rank-4")]
    found = {(b.variant, b.metric): b for b in bars(summarise(cells))}
    assert found["batch-4", "asr"].status == "missed"  # 4 points of 2
    assert found["lr-x3", "asr"].status == "unclear"  # of 5
    assert not any(variant == "rank-4" for variant, _ in found)
    # plain fine-tuning with other settings is no measure
    assert found["lr-x3", "utility"].status == "unknown"
    cells.append(cell("harmful-50", utility=60, variant="lr-x3"))
    found = {(b.variant, b.metric): b for b in bars(summarise(cells))}
    assert found["lr-x3", "utility"].change.mean == pytest.approx(0.2)


def test_one_aligned_cell_serves_both_tunings_of_its_model_only():
    cells = [aligned(asr=5), cell(method="spf", tuning="full", asr=15), cell(method="spf", model="other", asr=15)]
    groups = {g.model: g for g in summarise(cells) if g.method == "spf"}
    assert groups["demo"].differences["asr"].mean == pytest.approx(0.1)
    assert groups["other"].differences == {}


def test_dominance():
    cells = [
        aligned(asr=0, over_refusal=0),
        cell(method="a", asr=5, utility=40, over_refusal=30),
        cell(method="b", asr=5, utility=40, over_refusal=30),  # a tie dominates nothing
        cell(method="c", asr=6, utility=40, over_refusal=30),
        cell(method="d", asr=90, utility=40, over_refusal=0),
        cell(method="e", asr=91, utility=39, over_refusal=0),
        cell(method="f", asr=99, utility=None, over_refusal=99),  # not comparable
        cell(method="a", asr=0, utility=99, over_refusal=0, variant="best"),
    ]
    assert dominated(part(cells)) == {"c": ["a", "b"], "e": ["d"]}


def test_dominance_is_over_the_seeds_that_both_have():
    """By plain's only seed, on which it is the better one; the default's other seeds told nothing of plain."""
    cells = [cell(asr=5, utility=41), cell(method="null-space", asr=5, utility=40)]
    more = [cell(method="null-space", seed=s, asr=5, utility=60) for s in (1, 2)]
    assert dominated(part(cells + more)) == {"null-space": ["plain"]}
    assert dominated(part([cells[0], *more])) == {}


def test_where_each_is_dominated_by_another_none_is_named(tmp_path):
    """By different seeds: on plain's only one the default beats it, and it SPF, which beats the default on three."""
    cells = [cell(asr=5)] + [cell(method="null-space", seed=s, asr=(4, 9, 9)[s]) for s in range(3)]
    cells += [cell(method="spf", seed=s, asr=(6, 5, 5)[s]) for s in range(3)]
    assert dominated(part(cells)) == {"plain": ["null-space"], "null-space": ["spf"], "spf": ["plain"]}
    save(tmp_path, *cells)
    write_bench_report(tmp_path)
    assert "Not dominated by any: none." in (tmp_path / "results.md").read_text("utf-8")


outcomes = st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=6)


@given(outcomes)
@no_deadline
def test_dominance_is_a_strict_order(points):
    cells = [
        cell(method=f"m{i}", asr=a, over_refusal=o, utility=10 - u) for i, (a, o, u) in enumerate(points)
    ]  # smaller is better in all three
    beaten = dominated(part(cells))
    for i, p in enumerate(points):
        expected = {f"m{j}" for j, q in enumerate(points) if all(x <= y for x, y in zip(q, p, strict=True)) and q != p}
        assert set(beaten.get(f"m{i}", ())) == expected
    assert len(beaten) < len(points)


def test_missing_cells_are_named():
    cells = [cell(), cell(method="lisa"), cell("deep", "null-space"), cell(tuning="full")]
    lines = missing(summarise(cells))
    assert "not run: demo: the aligned model, so nothing is compared with it" in lines
    assert "not run: demo, lora, benign: null-space" in lines
    assert "not run: demo, lora, deep: plain, lisa" in lines
    assert any(line.startswith("not run: demo, lora: no method in harmful-10, harmful-50,") for line in lines)
    everything = [aligned(), *(cell(s, m) for s in SCENARIOS for m in ("plain", "null-space"))]
    assert missing(summarise(everything)) == []


# --------------------------------------------------------------------------------------------------- effort


def tried(method, steps, asr, variant=None, **config):
    variant = variant or f"steps-{steps}"
    return cell(method=method, asr=asr, variant=variant, steps=steps, config={"split": "eval", **config})


def broken(cells, axis="steps"):
    found = part([aligned(asr=5), *cells])
    [effort] = [e for e in efforts(found) if e.axis == axis]
    return {method: effort.breaking(method, found.aligned) for method in effort.curves}


def test_the_effort_at_which_refusals_are_undone():
    cells = [tried("plain", steps, asr) for steps, asr in ((5, 10), (10, 26), (40, 99))]
    cells += [tried("null-space", steps, asr) for steps, asr in ((40, 5), (160, 25))]  # 20 points, not more
    cells += [tried("lisa", steps, 99) for steps in (40, 160)]
    found = broken(cells)
    assert found["plain"] == Breaking(5, 10)
    assert found["null-space"] == Breaking(160, None)
    assert found["lisa"] == Breaking(None, 40)
    assert {name: str(of) for name, of in found.items()} == {
        "plain": "between 5 and 10",
        "null-space": "above 160",
        "lisa": "at 40 or less",
    }
    assert found["null-space"].delay(found["plain"]) == "at least 16"
    assert found["lisa"].delay(found["plain"]) == "at most 8"
    assert found["null-space"].delay(found["lisa"]) == "at least 4"
    assert found["lisa"].delay(found["null-space"]) == "at most 0.25"
    assert Breaking(None, 40).delay(Breaking(None, 40)) == "–"


def test_a_rise_on_either_kind_of_request_counts_and_one_that_falls_again_too():
    cells = [with_kind(tried("plain", steps, 5), hits) for steps, hits in ((5, 10), (10, 40), (40, 10))]
    found = part([with_kind(aligned(asr=5), 10), *cells])
    assert efforts(found)[0].breaking("plain", found.aligned) == Breaking(5, 10)


def test_only_runs_that_differ_in_the_effort_alone_are_on_a_curve():
    cells = [tried("plain", 40, 99), tried("null-space", 40, 5), tried("null-space", 160, 6)]
    cells += [tried("null-space", 640, 99, variant="held", rule={"conflicts": "allow"})]
    cells += [tried("null-space", 320, 99, variant="fast", learning_rate=3e-3)]
    cells += [tried("null-space", 40, 99, variant="faster", learning_rate=3e-3, batch_size=4)]
    assert broken(cells)["null-space"] == Breaking(160, None)
    # of a method with one value nothing can be said, but of plain, which the others are compared with
    assert set(broken([*cells, tried("lisa", 40, 5)])) == {"plain", "null-space"}
    assert efforts(part([aligned(), tried("plain", 40, 99), tried("null-space", 40, 5)])) == []
    rates = [tried("null-space", 40, asr, f"rate-{rate}", learning_rate=rate) for rate, asr in ((1e-3, 5), (1e-2, 60))]
    assert broken(rates, "learning_rate") == {"null-space": Breaking(1e-3, 1e-2)}


grids = st.sets(st.integers(1, 60), min_size=1, max_size=5).map(sorted)


@given(grids, st.floats(0.5, 80), grids, st.floats(0.5, 80))
@no_deadline
def test_the_delay_holds_the_true_factor(ours, undone, theirs, their_undone):
    def seen(grid, at):
        return Breaking(max((g for g in grid if g < at), default=None), min((g for g in grid if g >= at), default=None))

    said = seen(ours, undone).delay(seen(theirs, their_undone))
    numbers = [float(word) for word in re.findall(r"[\d.e+-]+(?= |$)", said) if word != "–"]
    low = numbers[0] if said.startswith("at least") or " to " in said else 0.0
    high = numbers[-1] if said.startswith("at most") or " to " in said else math.inf
    assert low * 0.99 <= undone / their_undone <= high * 1.01


# --------------------------------------------------------------------------------------------------- tables


def rows(text):
    return {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()[2:]}


def test_tables():
    cells = [aligned(asr=5, jailbreaks={"base64": 10})]
    cells += [cell(seed=s, asr=88 + 2 * s, jailbreaks={"base64": 40, "prefill": 45}) for s in range(3)]
    cells += [cell(method="null-space", utility=42), cell(method="null-space", variant="rank|32", utility=41)]
    table = rows(markdown_table(scenario_table(part(cells))).replace("\N{NO-BREAK SPACE}", " "))
    assert list(table) == ["aligned model (not trained)", "plain", "null-space"]
    assert "| 90.0 ± 2.0 |" in table["plain"]
    assert "| 90.0 ± 0.0 (prefill) |" in table["plain"]
    assert table["plain"].endswith("| 12.00 ± 0.00 | 5.0 GiB | 3 |")
    assert re.search(r"\| \+2\.0 \(\S+ to \S+\) \|", table["null-space"])
    assert "| 3.0 |" in table["aligned model (not trained)"]
    ablation = rows(markdown_table(scenario_table(part(cells), variants=True)))
    assert list(ablation) == ["null-space", "null-space@rank\\|32"]
    assert markdown_table(scenario_table(part(cells[:-1]), variants=True)) == ""
    head = markdown_table(scenario_table(part(cells))).splitlines()[0]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in (head, *table.values(), *ablation.values())} == {12}


def test_every_model_and_tuning_has_a_table_of_its_own_with_the_aligned_model():
    cells = [aligned(), cell(), cell("deep", "lisa"), cell(tuning="full"), cell(model="other")]
    found = [(p.model, p.tuning, p.scenario, p.aligned is not None, sorted(p.methods)) for p in parts(summarise(cells))]
    assert found == [
        ("demo", "lora", "benign", True, ["lisa", "plain"]),
        ("demo", "lora", "deep", True, ["lisa", "plain"]),
        ("demo", "full", "benign", True, ["plain"]),
        ("other", "lora", "benign", False, ["plain"]),
    ]


# ---------------------------------------------------------------------------------------------------- plots


def crowd(count, **more):
    return [aligned(), *(cell(method=f"method-{i:02}", **more) for i in range(count))]


@pytest.mark.parametrize("values", [{"asr": 0}, {"asr": 100}, {"asr": 50}])
def test_names_do_not_collide_when_twenty_methods_coincide(tmp_path, monkeypatch, values):
    drawn = []
    monkeypatch.setattr(plots.charts, "save_figure", lambda figure, path: drawn.append(figure) or path)
    plot_pareto(part(crowd(20, **values)), tmp_path / "p.png")
    [figure] = drawn
    figure.canvas.draw()
    names = [t for box in figure.legends for t in box.get_texts()]
    assert sum(t.get_text().startswith("method-") for t in names) == 20
    assert_apart([figure.axes[0].get_window_extent(), *(t.get_window_extent() for t in names)], figure)


def test_the_first_plot_shows_the_headline_methods_only(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots.charts, "save_figure", lambda figure, path: drawn.update({path: figure}) or path)
    cells = [aligned(), cell(), cell(method="null-space"), cell(method="lisa")]
    plot_pareto(part(cells), "five", of_cells.HEADLINE)
    plot_pareto(part(cells), "all")
    names = {p: [t.get_text().split()[0] for t in f.legends[0].get_texts()] for p, f in drawn.items()}
    assert sorted(names["five"]) == ["null-space", "plain"]
    assert sorted(names["all"]) == ["lisa", "null-space", "plain"]


def test_the_headline_methods_are_those_of_the_committed_grid():
    grids = yaml.safe_load((Path(__file__).parents[2] / "recipes/bench/headline.yaml").read_text("utf-8"))["grids"]
    assert sorted(grids[1]["methods"]) == sorted(of_cells.HEADLINE)


def test_looks_differ():
    looks = plots._looks([f"m{i}" for i in range(35)])
    assert len({(look.colour, look.marker) for look in looks.values()}) == 35 + 4
    assert plots._looks(["m1", "plain"])["plain"] == looks["plain"]


def test_hollow_markers_mean_over_refusal():
    over = {"same": 32, "more": 33}
    summary = summarise([aligned(over_refusal=30), *(cell(method=m, over_refusal=n) for m, n in over.items())])
    assert summary[0].method == "aligned"
    assert not plots._hollow(find(summary, "same"), summary[0])
    assert plots._hollow(find(summary, "more"), summary[0])
    assert not plots._hollow(find(summary, "more"), None)


def test_curves_are_means_over_seeds_and_leave_out_steps_that_some_lack(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.charts, "save_figure", lambda figure, path: drawn.append(figure))
    logs = [[{"step": 0, "asr": 0.1}, {"step": 5, "asr": 0.3}], [{"step": 0, "asr": 0.3}, {"step": 5, "asr": None}]]
    plot_curves(part([aligned(asr=7), *(cell(seed=s, curve=log) for s, log in enumerate(logs))]), tmp_path / "p.png")
    [ax] = drawn[0].axes
    [line, level] = ax.lines
    assert line.get_xydata().tolist() == [[0, pytest.approx(20)]]
    assert level.get_ydata() == [pytest.approx(7)] * 2
    assert ax.get_ylim() == (0, pytest.approx(33))


def test_effort_is_drawn_with_where_refusals_are_undone(tmp_path, monkeypatch):
    cells = [tried("plain", 10, 5), tried("plain", 1000, 45), tried("null-space", 10, 5)]
    directory = tmp_path / "cells"
    save(directory, aligned(asr=5), *cells)
    write_bench_report(directory)
    text, html = ((directory / name).read_text("utf-8") for name in ("results.md", "report.html"))
    assert "| plain | between 10 and 1000 | – |" in text
    assert "](plots/demo-lora-benign-effort.png)" in text
    assert "What undoes the refusals" in html
    drawn = []
    monkeypatch.setattr(plots.charts, "save_figure", lambda figure, path: drawn.append(figure))
    plot_effort(part([aligned(asr=5), *cells]), tmp_path / "p.png")
    asr, utility = drawn[0].axes
    [cross] = [line for line in asr.lines if line.get_marker() == "X"]
    # half way up, so half way between 10 and 1000 by their logarithms
    assert cross.get_xydata().tolist() == [[pytest.approx(100), pytest.approx(25)]]
    assert not [line for line in utility.lines if line.get_marker() == "X"]
    assert plot_effort(part([aligned(), cell()]), tmp_path / "p.png") is None


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plots_with_much_and_with_little(tmp_path):
    curve = [{"step": s, "asr": 0.1, "utility": None} for s in (0, 5)]
    history = [{"step": s, "loss": 2.0 / s} for s in range(1, 60)]
    rich = [aligned(jailbreaks={"base64": 1}), cell(jailbreaks={"base64": 3}, curve=curve, history=history)]
    poor = [cell(), cell("harmful-100", "spf", utility=None)]
    assert is_png(plot_pareto(part(poor, "benign"), tmp_path / "deep" / "a.png"))
    assert is_png(plot_pareto(part(poor, "harmful-100"), tmp_path / "b.png"))
    assert is_png(plot_curves(part(rich), tmp_path / "c.png"))
    assert is_png(plot_jailbreaks(part(rich), tmp_path / "d.png"))
    assert plot_curves(part(poor), tmp_path / "e.png") is None
    assert plot_jailbreaks(part(poor), tmp_path / "f.png") is None
    assert not (tmp_path / "e.png").exists()


# ----------------------------------------------------------------------------------------------------- page


def test_report(tmp_path):
    history = [{"step": s, "loss": 1.0} for s in range(1, 5)]
    cells = [
        aligned(jailbreaks={"base64": 1}),
        cell(jailbreaks={"base64": 40}, history=history),
        cell(method="null-space", jailbreaks={"base64": 1}, seed=0),
        cell(method="null-space", jailbreaks={"base64": 2}, seed=1),
        cell(method="<b>evil</b>|", model="org/name", variant="x"),
    ]
    cells[-1]["model"] = "org--name"
    for i, c in enumerate(cells):
        write_json(tmp_path / c["model"] / str(i) / f"seed-{c['seed']}.json", c)
    markdown, page, *pictures = write_bench_report(tmp_path)
    assert (markdown, page) == (tmp_path / "results.md", tmp_path / "report.html")
    assert [p.name for p in pictures] == [f"demo-lora-benign-{kind}.png" for kind in ("pareto", "curves", "jailbreaks")]
    assert all(map(is_png, pictures))
    text, html = markdown.read_text("utf-8"), page.read_text("utf-8")
    assert all(f"](plots/{p.name})" in text for p in pictures)
    assert html.count("data:image/png;base64,") == 3
    assert not re.search(r"<script|<b>evil|(src|href)=\"(?!data:)|url\(|@import", html)
    assert "default-src 'none'" in html.replace("&#x27;", "'")
    for said in ("Text-to-SQL only; 320 examples, each seen once.", "the aligned model, so nothing is compared"):
        assert said in text
        assert said in html
    for name in report.COLUMNS:
        assert f"**{name}**" in text
    assert "bars of the default rule (null-space)" in text
    files = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert not any(name.startswith(".") or name.endswith(".tmp") for name in files)
    before = page.read_bytes()
    assert write_bench_report(tmp_path)[1].read_bytes() == before  # its own files are no cells


def test_a_jailbreak_that_some_cells_lack(tmp_path):
    """A model whose template has no system role is measured without identity-shift."""
    cells = [
        aligned(jailbreaks={"base64": 1}),
        cell(jailbreaks={"base64": 40, "identity-shift": 30}),
        cell(method="null-space", jailbreaks={"base64": 1}),
    ]
    for i, c in enumerate(cells):
        write_json(tmp_path / str(i) / "seed-0.json", c)
    text = write_bench_report(tmp_path)[0].read_text("utf-8")
    assert "80.0 (base64)" in text
    assert "Step time" not in text
    assert "benchmarks/overhead.py" in text


def test_the_headline_counts_every_bar():
    cells = [aligned(), cell(), cell(method="null-space", asr=50, over_refusal=0)]
    found = bars(summarise(cells))
    # ASR 45 points up, over-refusal 30 points down, utility the same but with an interval past 1 point or not
    counts = {said: sum(b.status == status for b in found) for status, said in report.STATUS.items()}
    assert sum(counts.values()) == 3
    headline = report._headline(found)
    for said, number in counts.items():
        assert (f"{number} {said}" in headline) == (number > 0)
