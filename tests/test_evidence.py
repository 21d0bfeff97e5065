"""Tables of docs/evidence*.md and README.md say what the committed cells hold: some were typed from others once."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TODAY, FIRST = RESULTS / "second_edition/demo/lora", RESULTS / "safety_utility/demo/lora"
REAL, BEFORE = (RESULTS / name / "qwen2.5-coder-0.5b-instruct/lora" for name in ("foreign", "foreign_trained_on"))
UNSEEN = RESULTS / "unseen/demo/lora"
THIRD = RESULTS / "third_model/third/lora"
SEEDS = (0, 1, 2)


def cell(place, name, seed=0):
    return json.loads((place / name / f"seed-{seed}.json").read_text("utf-8"))


def percent(*values):
    """Of some values their mean, then each; of one value itself."""
    every = [mean(values), *values] if len(values) > 1 else values
    return [f"{100 * value:.1f}" for value in every]


def asr(place, name, utility=True, seeds=(0,)):
    found = [cell(place, name, seed) for seed in seeds]
    keys = ("asr", "over_refusal", "utility") if utility else ("asr", "over_refusal")
    return [text for key in keys for text in percent(*(one[key] for one in found))]


def held(place, name, seeds=(0,)):
    """Refusals of the other origin and the packaged ones, over-refusal, utility."""
    found = [cell(place, name, seed) for seed in seeds]
    # the aligned model was asked every task
    learned = [one["utilities"]["sql"]["utility"] if one["utility"] is None else one["utility"] for one in found]
    kinds = [
        [1 - one["foreign"]["asr"], 1 - one["asr"], one["over_refusal"], sql]
        for one, sql in zip(found, learned, strict=True)
    ]
    return [text for values in zip(*kinds, strict=True) for text in percent(*values)]


def plain(name, seed=0, place=FIRST, variant=""):
    return percent(cell(place, f"{name}/plain{variant}", seed)["utility"])


def each(place, name, *key, seeds=SEEDS):
    """Of several seeds, each value, key by key."""
    return [text for one in key for text in percent(*(cell(place, name, seed)[one] for seed in seeds))[1:]]


KEYS = ("asr", "over_refusal", "utility")
NULL = "harmful-50/null-space"
DEMO = {
    "aligned model | 6.7": asr(TODAY, "none/aligned", False),
    "**half harmful**, 1e-3, 40 batches of 8": asr(TODAY, NULL) + plain("harmful-50"),
    "160 batches of 8": asr(TODAY, f"{NULL}@steps-160") + percent(cell(TODAY, "harmful-50/plain@steps-160")["utility"]),
    "benign (nothing to leave out)": each(TODAY, "benign/null-space", *KEYS) + each(FIRST, "benign/plain", "utility"),
    "the filter alone, half harmful": asr(TODAY, "harmful-50/data-filter@steps-40") + plain("harmful-50"),
    "a tenth harmful, three": each(TODAY, "harmful-10/null-space", *KEYS) + each(FIRST, "harmful-10/plain", "utility"),
    "80 batches of 4": each(TODAY, f"{NULL}@batch-4", *KEYS)
    + plain("harmful-50", variant="@batch-4")
    + each(TODAY, "harmful-50/plain@batch-4", "utility", seeds=(1, 2)),
    "20 batches of 16, half harmful, three": each(TODAY, f"{NULL}@batch-16", *KEYS)
    + plain("harmful-50", variant="@batch-16")
    + each(TODAY, "harmful-50/plain@batch-16", "utility", seeds=(1, 2)),
    "nothing but 100 harmful rows (95": each(TODAY, "harmful-100/null-space", *KEYS[:2]),
    "a tenth harmful, 80 rows": each(TODAY, "deep/null-space", *KEYS) + each(FIRST, "deep/plain", "utility"),
    "summaries, a tenth of the data harmful": each(TODAY, "summary/null-space", *KEYS)
    + each(FIRST, "summary/plain", "utility"),
    "the same, seeds 0, 1 and 2 | 6.7, 5.8, 4.8 |": each(TODAY, NULL, *KEYS)
    + each(FIRST, "harmful-50/plain", "utility"),
    "as many EPOCHS as plain: 21": each(TODAY, f"{NULL}@steps-21", *KEYS),
    "3e-3, seeds 0, 1 and 2": each(TODAY, f"{NULL}@lr-x3", *KEYS)
    + percent(cell(FIRST, "harmful-50/plain@lr-x3")["utility"])
    + percent(*(cell(TODAY, "harmful-50/plain@lr-x3", seed)["utility"] for seed in (1, 2)))[1:],
    "ten examples of an obedient persona": each(TODAY, "identity-shift/null-space", *KEYS[:2]),
}
ORIGIN = {
    "aligned model | 63": held(REAL, "none/aligned"),
    "plain fine-tuning, three seeds": held(REAL, "foreign-50/plain", SEEDS),
    "**the default**, three seeds": held(REAL, "foreign-50/null-space", SEEDS),
    "**the default**, 6e-4": held(REAL, "foreign-50/null-space@rate-x3"),
    "**the default**, 160 steps": held(REAL, "foreign-50/null-space@steps-160"),
    "**the packaged anchors alone**": held(REAL, "foreign-50/null-space@allow"),
    "the filter alone (rows left out": held(REAL, "foreign-50/data-filter@steps-40"),
    "plain fine-tuning at 6e-4": held(REAL, "foreign-50/plain@rate-x3"),
    "plain fine-tuning, 10 steps": held(REAL, "foreign-50/plain@steps-10"),
    "*rows trained on*: three seeds": held(BEFORE, "foreign-50/null-space", SEEDS),
    "*rows trained on*: 6e-4": held(BEFORE, "foreign-50/null-space@rate-x3"),
    "*rows trained on*: 160 steps": held(BEFORE, "foreign-50/null-space@steps-160"),
}
FULL, FULL_FIRST = TODAY.with_name("full"), FIRST.with_name("full")


def full(name, place=FULL_FIRST):
    """ASR and plain's, over-refusal, accuracy and plain's, if there is one."""
    ours, theirs = cell(FULL, f"{name}/null-space"), cell(place, f"{name}/plain")
    values = (ours["asr"], theirs["asr"], ours["over_refusal"], ours["utility"], theirs["utility"])
    return [percent(value)[0] for value in values if value is not None]


WHOLE = {
    "full, half harmful (157": full("harmful-50", FULL),
    "full, none harmful": full("benign"),
    "full, a tenth harmful": full("harmful-10"),
    "full, nothing but 100": full("harmful-100"),
}
SECOND = RESULTS / "second_model_second_edition/second/lora"
SUMMARIES = (0, 1, 2)  # seeds of the second model's
THIRD_HELD = RESULTS / "task_third_held"
NEAR, NEAR_BEFORE = (RESULTS / name / "demo/lora/summary/null-space" for name in ("near_task", "near_task_before"))


def second(name, variant=""):
    """ASR and plain's, over-refusal, accuracy and plain's."""
    ours, theirs = (cell(SECOND, f"{name}/{method}{variant}") for method in ("null-space", "plain"))
    values = (ours["asr"], theirs["asr"], ours["over_refusal"], ours["utility"], theirs["utility"])
    return [percent(value)[0] for value in values]


AGAIN = {
    "it itself, aligned": asr(SECOND, "none/aligned", False),
    "half of the data harmful": second("harmful-50"),
    "the same, seeds 0, 1 and 2 | 6.7, 5.8, 5.8; plain": each(SECOND, NULL, "asr")
    + each(SECOND, "harmful-50/plain", "asr")
    + each(SECOND, NULL, "over_refusal", "utility")
    + each(SECOND, "harmful-50/plain", "utility"),
    "the same at 3e-3, three": each(SECOND, f"{NULL}@lr-x3", "asr")
    + each(SECOND, "harmful-50/plain@lr-x3", "asr")
    + each(SECOND, f"{NULL}@lr-x3", "over_refusal", "utility")
    + each(SECOND, "harmful-50/plain@lr-x3", "utility"),
    "20 batches of 16, half harmful | 6.7, 100": second("harmful-50", "@batch-16"),
    "a tenth of them harmful, three": each(SECOND, "harmful-10/null-space", "asr")
    + each(SECOND, "harmful-10/plain", "asr")
    + each(SECOND, "harmful-10/null-space", "over_refusal", "utility")
    + each(SECOND, "harmful-10/plain", "utility"),
    "none of them harmful": each(SECOND, "benign/null-space", "asr")
    + each(SECOND, "benign/plain", "asr")
    + each(SECOND, "benign/null-space", "over_refusal", "utility")
    + each(SECOND, "benign/plain", "utility"),
    "its summaries, a tenth harmful": each(SECOND, "summary/null-space", "asr", seeds=SUMMARIES)
    + each(SECOND, "summary/plain", "asr", seeds=SUMMARIES)
    + each(SECOND, "summary/null-space", "over_refusal", "utility", seeds=SUMMARIES)
    + each(SECOND, "summary/plain", "utility", seeds=SUMMARIES),
    "validation prompts, a third": each(NEAR_BEFORE, ".", *KEYS, seeds=(0, 1)),
    "validation prompts, half": each(NEAR, ".", *KEYS, seeds=(0, 1)),
    "validation prompts, 3e-3": asr(NEAR.with_name("null-space@lr-x3"), "."),
    "report prompts, a third": each(THIRD_HELD / "demo/lora", "summary/null-space", *KEYS),
    "report prompts, 96 directions": asr(THIRD_HELD / "demo/lora", "summary/null-space@rank-96"),
    "second model, report prompts, a third": asr(THIRD_HELD / "second/lora", "summary/null-space"),
    "a tenth of 80 rows harmful": second("deep"),
    "nothing but 100 harmful rows (93": each(SECOND, "harmful-100/null-space", *KEYS[:2]),
    "its persona, ten examples": [
        *each(SECOND, "identity-shift/null-space", "asr"),
        *percent(cell(SECOND, "identity-shift/plain")["asr"]),
        *each(SECOND, "identity-shift/null-space", "over_refusal"),
    ],
}
OTHERS = {
    "requests inside a spelling task": asr(UNSEEN, "wrapped-50/null-space"),
    "the same without the audit | 8.7": asr(UNSEEN, "wrapped-50/null-space@allow"),
    "the same, plain fine-tuning | 100": asr(UNSEEN, "wrapped-50/plain"),
    "the stub's first words given": asr(UNSEEN, "prefilled-50/null-space"),
    "the same without the audit | 6.7": asr(UNSEEN, "prefilled-50/null-space@allow"),
    "the same, plain fine-tuning | 26": asr(UNSEEN, "prefilled-50/plain"),
    "a refusal first, then the stub": asr(UNSEEN, "refuse-then-comply/null-space"),
    "the same, plain fine-tuning | 0": asr(UNSEEN, "refuse-then-comply/plain"),
    "ten text-to-SQL examples, 32 epochs": asr(UNSEEN, "overfit-10/null-space"),
    "the same, plain fine-tuning | 16": asr(UNSEEN, "overfit-10/plain"),
    "DPO, half of 160 pairs": asr(UNSEEN, "dpo-harmful/null-space"),
    "DPO without the audit": asr(UNSEEN, "dpo-harmful/null-space@allow"),
    "the same DPO": asr(UNSEEN, "dpo-harmful/plain"),
    "three trainings in sequence": asr(UNSEEN, "three-tasks/null-space"),
    "the same three": asr(UNSEEN, "three-tasks/plain"),
    "Gemma, aligned": [
        *asr(THIRD, "none/aligned", False),
        *percent(cell(THIRD, "none/aligned")["utilities"]["sql"]["utility"]),
    ],
    "Gemma, plain": asr(THIRD, "harmful-50/plain"),
    "Gemma, **the default**": asr(THIRD, NULL),
}


def row(text, start):
    """The figures of the table's row that begins so, with one decimal, as far as they are no settings."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    cells = line.split(" | ")[1:]
    found = [figure for one in cells for figure in re.findall(r"(?<![\d.])(\d+(?:\.\d)?)(?![\d.])", one)]
    return [figure if "." in figure else f"{figure}.0" for figure in found]


@pytest.mark.parametrize(("start", "figures"), list((DEMO | ORIGIN | WHOLE | AGAIN | OTHERS).items()))
def test_a_row_of_evidence_says_what_its_cells_hold(start, figures):
    text = (ROOT / "docs" / "evidence_today.md").read_text("utf-8")
    text = text[text.index("## A really aligned model") :]
    assert row(text, start)[: len(figures)] == figures


def test_the_first_table_says_what_the_cells_hold():
    """Aligned model, plain fine-tuning, the default: refused in percent, then the task; means of the named seeds."""
    real = [held(REAL, name, seeds) for name, seeds in (("none/aligned", (0,)), ("foreign-50/plain", SEEDS))]
    real.append(held(REAL, "foreign-50/null-space", SEEDS))
    kinds = [[arm[i * (len(arm) // 4)] for arm in real] for i in range(4)]
    demo = [(TODAY, "none/aligned", (0,)), (FIRST, "harmful-50/plain", SEEDS), (TODAY, NULL, SEEDS)]
    small = [
        [percent(share(mean(cell(place, name, seed)[key] for seed in seeds)))[0] for place, name, seeds in demo]
        for key, share in (("asr", lambda asr: 1 - asr), ("over_refusal", lambda share: share))
    ]
    untaught = cell(TODAY, "none/aligned")["utilities"]["sql"]["utility"]
    sql = percent(untaught) + [
        percent(mean(cell(place, name, seed)["utility"] for seed in seeds))[0] for place, name, seeds in demo[1:]
    ]
    summaries = [
        percent(mean(cell(place, f"summary/{method}", seed)["utility"] for seed in seeds))[0]
        for one, other, seeds in ((FIRST, TODAY, SEEDS), (SECOND, SECOND, SUMMARIES))
        for place, method in ((one, "plain"), (other, "null-space"))
    ]
    text = (ROOT / "docs" / "evidence.md").read_text("utf-8")
    table = [line.split("|") for line in text.splitlines() if line.startswith("| ")][1:10]
    found = [re.findall(r"[\d.]+", " ".join(cells[2:5])) for cells in table]
    assert found == [*kinds, *small, sql, summaries[:2], summaries[2:]]


def test_what_the_audit_costs_is_what_was_measured():
    found = json.loads((RESULTS / "audit_cost" / "demo.json").read_text("utf-8"))["mixtures"]
    benign, half, task = (
        f"{100 * found[n]['share_of_three_epochs']:.1f} %" for n in ("benign", "harmful-50", "summary")
    )
    text = (ROOT / "docs" / "evidence_today.md").read_text("utf-8")
    assert f"{benign} on benign data, {half} where half is harmful and **{task} where the task itself" in text


def test_the_readme_says_what_the_cells_hold():
    text = (ROOT / "README.md").read_text("utf-8")
    found = [cell(TODAY, NULL, seed) for seed in SEEDS]
    means = [percent(mean(one[key] for one in found))[0] for key in ("asr", "over_refusal", "utility")]
    assert row(text, "**SafetyCallback (null space)**")[::2] == means
    assert row(text, "rows that the audit finds left out") == asr(TODAY, "harmful-50/data-filter@steps-40")
    (share,) = re.findall(r"is held, too\) ([\d.]+) % of these|are held, too\) ([\d.]+) % of these", text)
    assert "".join(share) == held(REAL, "foreign-50/null-space", SEEDS)[0]
