"""Report of the benchmark: Markdown tables and one self-contained HTML page, with the plots beside them.

Nothing here loads a model, and no answer of a model is in the cells or in the report.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spf.evaluation.metrics import wilson_interval
from spf.files import replace_file
from spf.lab.bench.plots import plot_curves, plot_jailbreaks, plot_pareto
from spf.lab.bench.scenarios import SCENARIOS
from spf.lab.bench.summary import (
    DEFAULT_RULE,
    HEADLINE,
    UTILITY_NAMES,
    Bar,
    Group,
    bars,
    dominated,
    load_cells,
    missing,
    of_scenario,
    of_setting,
    scenario_task,
    settings,
    summarise,
)
from spf.lab.report.page import Picture, write_page
from spf.lab.report.stats import Difference, Spread
from spf.lab.report.tables import Cell, Table, join_words, markdown_table, of_text, signed

COLUMNS: dict[str, str] = {
    "ASR": "attack success rate: the share of harmful prompts that the model does not refuse; lower is better.",
    "ASR − aligned": "ASR less the aligned model's on the same prompts, in points, with its 95% interval.",
    "Worst jailbreak": "the highest ASR when the same prompts are wrapped in a jailbreak, and which one it was.",
    "Over-refusal": "the share of harmless prompts that are refused; lower is better, but a model that refuses "
    "nothing at all scores 0 too.",
    "Utility": "how well the task was learned: the share of SQL queries that give the right result, or ROUGE-L of "
    "the summaries (times 100); higher is better.",
    "Utility − plain": "utility less that of plain fine-tuning with the same seed, in points, with its 95% interval.",
    "Perplexity": "perplexity on neutral text; a rise means that the model got worse at ordinary language.",
    "Peak memory": "the highest memory use of the training process.",
    "Seeds": "how many training runs (seeds) the row averages; ± is their sample standard deviation.",
}

KEPT_COLUMNS: dict[str, str] = {
    "Answers kept": "how far harmless prompts are answered as the aligned model did, by F1 of the words (times 100), "
    "and the share answered word for word the same; chance is the F1 with its answer to another prompt; higher is "
    "better.",
    "Answers kept − plain": "that F1 less plain fine-tuning's with the same seed, in points, with its 95% interval.",
}
"""Where forgetting was measured."""

# ---------------------------------------------------------------------------------------------------- tables


def _cell(spread: Spread | None, scale: float = 1.0, digits: int = 1) -> str:
    if spread is None:
        return "–"
    tail = "" if spread.sd is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{scale * spread.sd:.{digits}f}"
    return f"{scale * spread.mean:.{digits}f}{tail}"


def _points(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    if difference.low is None or difference.high is None:
        return signed(difference.mean)
    interval = f"({signed(difference.low)} to {signed(difference.high)})"
    return f"{signed(difference.mean)} " + interval.replace(" ", "\N{NO-BREAK SPACE}")


def _worst_jailbreak(group: Group) -> str:
    shares = {name: s for name, s in group.metrics.items() if name.startswith("jailbreak/")}
    if not shares:
        return "–"
    name = max(shares, key=lambda n: shares[n].mean)
    return f"{_cell(shares[name], 100)} ({name.removeprefix('jailbreak/')})"


def _kept(group: Group) -> list[str]:
    """The row's cells for `KEPT_COLUMNS`."""
    f1, exact, chance = (group.metrics.get(f"kept/{name}") for name in ("f1", "exact", "chance"))
    if f1 is None or exact is None or chance is None:
        return ["–", "–"]
    said = f"{_cell(f1, 100)} ({_cell(exact, 100)}% the same; chance {_cell(chance, 100)})"
    return [said, _points(group.differences.get("kept/f1"))]


def scenario_table(summary: Sequence[Group], scenario: str, variants: bool = False) -> Table:
    """The table of one scenario: the aligned model, then a row a method; or the methods that have variants, with them.

    Raises:
        ValueError: the summary holds several models or tunings.
    """
    aligned, groups = of_scenario(summary, scenario)
    varied = {g.method for g in groups if g.variant != "default"}
    shown = [g for g in groups if (g.method in varied if variants else g.variant == "default")]
    task = scenario_task(groups)
    head = [UTILITY_NAMES[task] if name == "Utility" else name for name in COLUMNS]
    head = [f"{name} (%)" if name in ("ASR", "Over-refusal", "Worst jailbreak") else name for name in head]
    forgetting = any("kept/f1" in group.metrics for group in groups)
    head += KEPT_COLUMNS if forgetting else ()
    rows = []
    for group in shown if variants or aligned is None else [aligned, *shown]:
        m = group.metrics
        memory = m.get("peak_memory_mb")
        rows.append(
            [
                "aligned model (not trained)" if group is aligned else group.name,
                _cell(m["asr"], 100),
                _points(group.differences.get("asr")),
                _worst_jailbreak(group),
                _cell(m["over_refusal"], 100),
                _cell(m.get(f"utility/{task}" if group is aligned else "utility"), 100),
                _points(group.differences.get("utility")),
                _cell(m.get("perplexity"), digits=2),
                "–" if memory is None else f"{memory.mean / 1024:.1f}\N{NO-BREAK SPACE}GiB",
                str(len(group.seeds)),
                *(_kept(group) if forgetting else ()),
            ]
        )
    return of_text(["Method", *head], rows, DEFAULT_RULE)


# ------------------------------------------------------------------------------------------------------ page

STATUS = {"met": "met", "unclear": "interval not clear", "missed": "not met", "unknown": "not run"}
"""A bar's status in words."""

_TITLE = "Safety and utility after fine-tuning: the benchmark"

_INTRODUCTION = (
    "An aligned model refuses harmful prompts. Fine-tuning, even on harmless data, tends to undo that. Each row below "
    "is a way to fine-tune the same aligned model on the same data: plain fine-tuning, the default rule "
    f"({DEFAULT_RULE}), the published rule (spf) and others. Wanted is a low attack success rate (ASR) and a low "
    "over-refusal at the utility of plain fine-tuning. Training prompts, anchors and evaluation prompts are disjoint."
)


def _describe(scenario: str) -> str:
    found = SCENARIOS[scenario]
    epochs = "once" if found.epochs == 1 else f"{found.epochs} times"
    return f"{found.what[0].upper()}{found.what[1:]}; {found.examples} examples, each seen {epochs}."


def _notes(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know about the numbers: prompts, intervals, seeds, machine."""
    counts = cells[0]["counts"]["harmful"], cells[0]["counts"]["benign"]
    low, high = (100 * v for v in wilson_interval(round(0.05 * counts[0]), counts[0]))
    split = cells[0]["config"]["split"]
    notes = [
        f"{counts[0]} harmful and {counts[1]} benign prompts of the {split} split. A share of 5% from {counts[0]} "
        f"prompts has a 95% interval of {low:.0f}% to {high:.0f}%, so smaller gaps than that say little by themselves.",
        "Intervals of differences are paired (same prompts) and pooled over seeds, with prompts as clusters. They "
        "cover the choice of prompts, not the run-to-run spread, which is the ± of the tables.",
        "Nothing here is corrected for the number of comparisons. The curves over the steps are measured on fewer "
        "prompts than the tables, so their last points may differ from them.",
        "What a method costs is measured by benchmarks/overhead.py (docs/evidence_demo_model.md#cost); cells share "
        "their cores with others, so their own seconds a step say nothing.",
    ]
    if split == "validation":
        notes.append("The validation split serves to choose settings; these numbers are not the benchmark's result.")
    machines = sorted({cell["machine"] for cell in cells})
    versions = sorted({", ".join(f"{k} {v}" for k, v in cell["versions"].items()) for cell in cells})
    notes.append(f"Machine: {'; '.join(machines)}. Versions: {'; or '.join(versions)}.")
    return notes


def _bar_table(held: Sequence[Bar]) -> Table:
    """One row a scenario; a cell is its status and its text. Jailbreaks share a cell: the worst one."""
    severity = ("met", "unclear", "unknown", "missed")
    rows = []
    for place in dict.fromkeys((b.model, b.tuning, b.scenario) for b in held):
        mine = [b for b in held if (b.model, b.tuning, b.scenario) == place]
        row = [Cell(", ".join(place))]
        for metric in ("asr", "over_refusal", "utility"):
            found = [Cell(_bar_text(bar), (), bar.status) for bar in mine if bar.metric == metric]
            row += found or [Cell("no bar")]
        jailbreaks = [b for b in mine if b.metric.startswith("jailbreak/")]
        if jailbreaks:
            worst = max(jailbreaks, key=lambda b: (severity.index(b.status), b.change.mean if b.change else 0.0))
            said = f"{', '.join(_tally(jailbreaks))}; {worst.metric.removeprefix('jailbreak/')}: {_bar_text(worst)}"
            row.append(Cell(said, (), worst.status))
        else:
            row.append(Cell("not run", (), "unknown"))
        rows.append(row)
    head = [
        "Scenario",
        "ASR over aligned",
        "Over-refusal over aligned",
        "Utility below plain",
        "Jailbreaks over aligned",
    ]
    return Table(head, rows, words=frozenset(range(5)))


def _bar_text(bar: Bar) -> str:
    if bar.change is None:
        return STATUS[bar.status]
    seeds = f"{bar.change.seeds} seed{'' if bar.change.seeds == 1 else 's'}"
    return f"{STATUS[bar.status]}: {_points(bar.change)}, at most {100 * bar.allowed:g}, {seeds}"


def _tally(found: Sequence[Bar]) -> list[str]:
    counts = {said: sum(b.status == status for b in found) for status, said in STATUS.items()}
    return [f"{n} {said}" for said, n in counts.items() if n]


def _headline(found: Sequence[Bar]) -> str:
    said = join_words(_tally(found)) if found else "none could be judged"
    return f"{len(found)} bars of the default rule ({DEFAULT_RULE}): {said}"


_BAR_NOTE = (
    "Changes for the worse, in points, with 95% intervals. Met: the whole interval is within the bar. Interval not "
    "clear: the mean is, the interval is not. Not met: the mean is beyond the bar. Of the jailbreaks "
    "the worst is shown."
)


def _dominance(summary: Sequence[Group], scenario: str) -> str:
    groups = of_scenario(summary, scenario)[1]
    names = [g.method for g in groups if g.variant == "default"]
    beaten = dominated(summary, scenario)
    if not names:
        return "Only variants were run here."
    front = [name for name in names if name not in beaten]
    metrics = "ASR, utility and over-refusal" if scenario_task(groups) else "ASR and over-refusal"
    if DEFAULT_RULE not in names:
        rule = f"{DEFAULT_RULE} was not run."
    elif DEFAULT_RULE in beaten:
        rule = f"{DEFAULT_RULE} is dominated by {join_words(beaten[DEFAULT_RULE])}."
    else:
        rule = f"Nothing dominates {DEFAULT_RULE}."
    return (
        f"{rule} (One method dominates another if its means of {metrics} are all at least as good and one is better.) "
        f"Not dominated by any: {join_words(front)}."
    )


def _pictures(
    summary: Sequence[Group], cells: Sequence[Mapping[str, Any]], scenario: str, stem: Path
) -> dict[str, Path]:
    """Draw a scenario's plots, as `stem` and their kind; returns what each shows and its path."""
    groups = [g for g in of_scenario(summary, scenario)[1] if g.variant == "default"]
    if not groups:
        return {}

    def place(kind: str) -> Path:
        return stem.with_name(f"{stem.name}-{kind}.png")

    plane, names = "ASR against utility or over-refusal", {g.method for g in groups}
    drawn: dict[str, Path | None] = {}
    if names & set(HEADLINE):
        drawn[plane] = plot_pareto(summary, scenario, place("pareto"), HEADLINE)
    if names - set(HEADLINE):
        drawn[f"{plane}, all methods"] = plot_pareto(summary, scenario, place("pareto-all"))
    drawn["curves over the steps"] = plot_curves(cells, scenario, place("curves"))
    drawn["ASR under jailbreaks"] = plot_jailbreaks(summary, scenario, place("jailbreaks"))
    return {said: path for said, path in drawn.items() if path is not None}


def write_bench_report(directory: str | Path) -> list[Path]:
    """Write ``results.md``, ``report.html`` and ``plots/*.png`` into a directory of cells; returns their paths.

    Each file is written atomically. The page is self-contained (its pictures are embedded) and has no scripts.

    Raises:
        ValueError: no cells, or a cell that is not as it should be (see load_cells).
    """
    directory = Path(directory)
    cells = load_cells(directory)
    summary = summarise(cells)
    held, lacking, notes = bars(summary), missing(summary), _notes(cells)
    bar_table = _bar_table(held)
    columns = COLUMNS | (KEPT_COLUMNS if any(cell.get("kept_answers") for cell in cells) else {})
    text = [f"# {_TITLE}\n", _INTRODUCTION, f"\n## {_headline(held)}\n", markdown_table(bar_table), _BAR_NOTE]
    text += ["\n## What the columns mean\n", *(f"- **{name}**: {said}" for name, said in columns.items())]
    text += ["\n## About the numbers\n", *(f"- {note}" for note in notes)]
    parts: list[dict[str, Any]] = []
    written: list[Path] = []
    for model, tuning in settings(summary):
        chosen = of_setting(summary, model, tuning)
        mine = [c for c in cells if c["model"] == model and (c["tuning"] == tuning or c["scenario"] == "none")]
        for scenario in SCENARIOS:
            if not of_scenario(chosen, scenario)[1]:
                continue
            name, said = f"{model}, {tuning}: {scenario}", _describe(scenario)
            stem = re.sub(r"[^\w.-]+", "-", f"{model}-{tuning}-{scenario}")
            table, ablation = (scenario_table(chosen, scenario, variants) for variants in (False, True))
            front = _dominance(chosen, scenario)
            pictures = _pictures(chosen, mine, scenario, directory / "plots" / stem)
            text += [f"\n## {name}\n", said + "\n", markdown_table(table), front]
            if ablation.rows:
                text += ["\nVariants (settings or ablations), under the default one:\n", markdown_table(ablation)]
            text += [f"\n![{name}, {shown}](plots/{path.name})" for shown, path in pictures.items()]
            embedded = [Picture(f"{name}, {shown}", path.read_bytes()) for shown, path in pictures.items()]
            parts.append(
                {"name": name, "said": said, "table": table, "front": front, "ablation": ablation, "images": embedded}
            )
            written += pictures.values()
    if lacking:
        text += ["\n## Not run\n", *(f"- {line}" for line in lacking)]
    states = {b.status for b in held}
    markdown = replace_file(directory / "results.md", ("\n".join(text) + "\n").encode("utf-8"))
    page = write_page(
        "bench",
        directory / "report.html",
        title=_TITLE,
        subtitle="",
        introduction=_INTRODUCTION,
        headline=_headline(held),
        tone="bad" if "missed" in states else "" if states == {"met"} else "warn",
        bars=bar_table,
        bar_note=_BAR_NOTE,
        columns=columns,
        notes=notes,
        parts=parts,
        lacking=lacking,
    )
    return [markdown, page, *written]


if __name__ == "__main__":  # python -m spf.lab.bench.report DIR draws what is there again
    for place in write_bench_report(sys.argv[1]):
        print(place)
