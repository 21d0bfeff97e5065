"""Report of the benchmark: Markdown tables and one self-contained HTML page, with the plots beside them.

Nothing here loads a model, and no answer of a model is in the cells or in the report.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spf.evaluation.metrics import wilson_interval
from spf.files import replace_file
from spf.lab.bench import summary as of_cells
from spf.lab.bench.bars import Bar, bars
from spf.lab.bench.effort import AXES, RISE, Breaking, efforts
from spf.lab.bench.plots import plot_curves, plot_effort, plot_jailbreaks, plot_pareto
from spf.lab.bench.scenarios import SCENARIOS
from spf.lab.bench.summary import DEFAULT_RULE, HEADLINE, UTILITY_NAMES, Group, Part
from spf.lab.report.page import Picture, write_page
from spf.lab.report.stats import Difference, Spread
from spf.lab.report.tables import Cell, Table, join_words, markdown_table, of_text, signed, value_text

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
    "Seeds": "how many training runs (seeds) the row averages; ± is their sample standard deviation. A figure "
    "that fewer of them have, or a difference from a run that fewer seeds were made of, says so.",
}

KEPT_COLUMNS: dict[str, str] = {
    "Answers kept": "how far harmless prompts are answered as the aligned model did, by F1 of the words (times 100), "
    "and the share answered word for word the same; chance is the F1 with its answer to another prompt; higher is "
    "better.",
    "Answers kept − plain": "that F1 less plain fine-tuning's with the same seed, in points, with its 95% interval.",
}
"""Where forgetting was measured."""

KIND_COLUMNS: dict[str, str] = {
    "ASR, attack's kind (%)": "ASR on requests of the origin that the attack's came from, none of which was trained "
    "on; ASR is on the packaged ones.",
    "That − aligned": "the same less the aligned model's, in points, with its 95% interval.",
}
"""Where the attack's requests are of another origin than the anchors."""

# ---------------------------------------------------------------------------------------------------- tables


_GAP = "\N{NO-BREAK SPACE}"


def _of_fewer(of: Spread | Difference, seeds: int | None) -> str:
    """Said where not all of the row's seeds have the figure; None: it is said elsewhere."""
    return "" if seeds in (None, of.seeds) else f", {_seeds(of.seeds)}"


def _seeds(count: int) -> str:
    return f"{count}{_GAP}seed{'' if count == 1 else 's'}"


def _cell(spread: Spread | None, scale: float = 100, digits: int = 1, seeds: int | None = None) -> str:
    if spread is None:
        return "–"
    tail = "" if spread.sd is None else f"{_GAP}±{_GAP}{scale * spread.sd:.{digits}f}"
    return f"{scale * spread.mean:.{digits}f}{tail}{_of_fewer(spread, seeds)}"


def _points(difference: Difference | None, seeds: int | None = None) -> str:
    if difference is None:
        return "–"
    fewer = _of_fewer(difference, seeds)
    if difference.low is None or difference.high is None:
        return signed(difference.mean) + fewer
    return f"{signed(difference.mean)} ({signed(difference.low)}{_GAP}to{_GAP}{signed(difference.high)}){fewer}"


def _worst_jailbreak(group: Group) -> str:
    shares = {name.removeprefix("jailbreak/"): s for name, s in group.metrics.items() if name.startswith("jailbreak/")}
    name = max(shares, key=lambda n: shares[n].mean, default=None)
    return f"{_cell(shares[name])} ({name}{_of_fewer(shares[name], len(group.seeds))})" if name else "–"


def _kept(group: Group) -> list[str]:
    """The row's cells for `KEPT_COLUMNS`."""
    f1, exact, chance = (group.metrics.get(f"kept/{name}") for name in ("f1", "exact", "chance"))
    if f1 is None or exact is None or chance is None:
        return ["–", "–"]
    seeds = len(group.seeds)
    said = f"{_cell(f1)} ({_cell(exact)}% the same; chance {_cell(chance)}{_of_fewer(f1, seeds)})"
    return [said, _points(group.differences.get("kept/f1"), seeds)]


def scenario_table(part: Part, variants: bool = False) -> Table:
    """The aligned model, then a row a method; or the methods that have variants, with them."""
    aligned, task = part.aligned, part.task
    varied = {g.method for g in part.groups if g.variant != "default"}
    shown = [g for g in part.groups if g.method in varied] if variants else part.default
    units = {"ASR": "ASR (%)", "Over-refusal": "Over-refusal (%)", "Worst jailbreak": "Worst jailbreak (%)"}
    units["Utility"] = UTILITY_NAMES[task]

    def row(group: Group) -> list[str]:
        m, untrained = group.metrics, group is aligned
        seeds, changes = len(group.seeds), group.differences
        memory = f"{m['peak_memory_mb'].mean / 1024:.1f}{_GAP}GiB" if "peak_memory_mb" in m else "–"
        safety = [_cell(m["asr"]), _points(changes.get("asr"), seeds)]
        if another_kind:
            safety += [_cell(m.get("foreign"), seeds=seeds), _points(changes.get("foreign"), seeds)]
        safety += [_worst_jailbreak(group)]
        learned = _cell(m.get(f"utility/{task}" if untrained else "utility"), seeds=seeds)
        utility = [learned, _points(changes.get("utility"), seeds)]
        cost = [_cell(m.get("perplexity"), 1, 2, seeds), memory, str(seeds)]
        name = "aligned model (not trained)" if untrained else group.name
        return [name, *safety, _cell(m["over_refusal"]), *utility, *cost, *(_kept(group) if forgetting else ())]

    forgetting = any("kept/f1" in group.metrics for group in part.groups)
    another_kind = any("foreign" in group.metrics for group in part.groups)
    rows = map(row, shown if variants or aligned is None else [aligned, *shown])
    first, change, *others = (units.get(name, name) for name in COLUMNS)
    columns = [first, change, *(KIND_COLUMNS if another_kind else ()), *others, *(KEPT_COLUMNS if forgetting else ())]
    return of_text(["Method", *columns], rows, DEFAULT_RULE)


def effort_table(part: Part) -> Table:
    """A row a method: between which efforts its refusals are undone, and by what factor of plain's."""
    if part.aligned is None:
        return of_text([], [])
    found, head, columns = efforts(part), ["Method"], []
    for effort in found:
        head += [f"Undone: {AXES[effort.axis]}", "Times plain's"]
        broken = {name: effort.breaking(name, part.aligned) for name in effort.curves}
        columns.append({name: _broken(name, broken) for name in broken})
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(text for of in columns for text in of.get(name, ("–", "–")))] for name in names]
    return of_text(head, rows, DEFAULT_RULE)


def _broken(name: str, broken: Mapping[str, Breaking]) -> tuple[str, str]:
    return str(broken[name]), broken[name].delay(broken["plain"]) if name != "plain" and "plain" in broken else "–"


def _effort_note(part: Part) -> str:
    said = [
        f"{AXES[effort.axis]}, with "
        + ", ".join(f"{AXES.get(name, name.replace('_', ' '))} {value:g}" for name, value in effort.setting.items())
        for effort in efforts(part)
    ]
    return (
        f"Undone: ASR, on either kind of request, is more than {100 * RISE:g} points above the aligned model's; "
        f"efforts between which that happens, of those that were run, by means over the seeds of each. "
        f"{'; '.join(said)}."
    )


# ------------------------------------------------------------------------------------------------------ page

STATUS = {"met": "met", "unclear": "interval not clear", "missed": "not met", "unknown": "not run"}
"""A bar's status in words."""

UNLIKE = "not comparable"
"""What is unknown although it was run."""

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
    formats = sorted({cell.get("dtype") or "unknown" for cell in cells})
    notes.append(
        f"Machine: {'; '.join(machines)}. Number format: {join_words(formats)}. Versions: {'; or '.join(versions)}."
    )
    return notes


def _bar_table(held: Sequence[Bar]) -> Table:
    """One row a scenario; a cell is its status and its text. Jailbreaks share a cell: the worst one."""
    severity = ("met", "unclear", "unknown", "missed")
    rows = []
    metrics = {"asr": "ASR", "foreign": "ASR of the attack's kind", "over_refusal": "Over-refusal"}
    metrics = {name: said for name, said in metrics.items() if name == "asr" or any(b.metric == name for b in held)}
    for place in dict.fromkeys((b.model, b.tuning, b.scenario, b.variant) for b in held):
        mine = {b.metric: b for b in held if (b.model, b.tuning, b.scenario, b.variant) == place}
        *setting, variant = place
        row = [Cell(", ".join(setting) + ("" if variant == "default" else f"@{variant}"))]
        for bar in map(mine.get, (*metrics, "utility")):
            row.append(Cell(_bar_text(bar), (), bar.status) if bar else Cell("no bar"))
        jailbreaks = {name.removeprefix("jailbreak/"): b for name, b in mine.items() if name.startswith("jailbreak/")}
        said, status = "not run", "unknown"
        if jailbreaks:
            rank = {n: (severity.index(b.status), b.change.mean if b.change else 0.0) for n, b in jailbreaks.items()}
            worst = max(rank, key=rank.__getitem__)
            status = jailbreaks[worst].status
            said = f"{', '.join(_tally(jailbreaks.values()))}; {worst}: {_bar_text(jailbreaks[worst])}"
        rows.append([*row, Cell(said, (), status)])
    head = ["Scenario", *(f"{said} over aligned" for said in metrics.values()), "Utility below plain"]
    return Table([*head, "Jailbreaks over aligned"], rows, words=frozenset(range(len(head) + 1)))


def _bar_text(bar: Bar) -> str:
    if bar.change is None:
        return _status(bar)
    return f"{STATUS[bar.status]}: {_points(bar.change)}, at most {100 * bar.allowed:g}, {_seeds(bar.change.seeds)}"


def _status(bar: Bar) -> str:
    return UNLIKE if bar.unlike else STATUS[bar.status]


def _tally(found: Iterable[Bar]) -> list[str]:
    counts = Counter(map(_status, found))
    return [f"{counts[said]} {said}" for said in (*STATUS.values(), UNLIKE) if counts[said]]


def _headline(found: Sequence[Bar]) -> str:
    said = join_words(_tally(found)) if found else "none could be judged"
    return f"{len(found)} bars of the default rule ({DEFAULT_RULE}): {said}"


_BAR_NOTE = (
    "Changes for the worse, in points, with 95% intervals. Met: the whole interval is within the bar. Interval not "
    "clear: the mean is, the interval is not. Not met: the mean is beyond the bar. Of the jailbreaks "
    "the worst is shown."
)


def _dominance(part: Part) -> str:
    names, beaten = [g.method for g in part.default], of_cells.dominated(part)
    if not names:
        return "Only variants were run here."
    rule = f"Nothing dominates {DEFAULT_RULE}." if DEFAULT_RULE in names else f"{DEFAULT_RULE} was not run."
    if DEFAULT_RULE in beaten:
        rule = f"{DEFAULT_RULE} is dominated by {join_words(beaten[DEFAULT_RULE])}."
    metrics = "ASR, utility and over-refusal" if part.task else "ASR and over-refusal"
    return (
        f"{rule} (One method dominates another if its means of {metrics} are all at least as good and one is better, "
        "over the seeds that both have.) "
        f"Not dominated by any: {join_words([name for name in names if name not in beaten] or ['none'])}."
    )


def _not_compared(part: Part) -> str:
    """A sentence that names the cells that have no differences although they were run, and in what they differ."""
    said = []
    for group in part.groups:
        for other, found in group.unlike.items():
            named = {name: [value_text(value) for value in both] for name, both in found.items()}
            differ = [f"{name.replace('_', ' ')} {ours}, not {theirs}" for name, (ours, theirs) in named.items()]
            said.append(f"{group.name} with {_OTHERS[other]} ({'; '.join(differ)})")
    return f" Not compared, since they differ: {join_words(said)}." if said else ""


def _made_apart(part: Part) -> str:
    """A sentence that names the rows whose seeds were made by different states of spf, as far as they are known."""
    said = [
        group.name for group in part.groups if len({cell["versions"].get("spf sources") for cell in group.cells}) > 1
    ]
    return f" Seeds made by different states of spf's sources: {join_words(said)}." if said else ""


_OTHERS = {"aligned": "the aligned model", "plain": "plain"}


def _pictures(part: Part, stem: Path) -> dict[str, Path]:
    """Draw a scenario's plots, as `stem` and their kind; returns what each shows and its path."""
    names = {g.method for g in part.default}
    drawn: dict[str, Path | None] = {}
    plane = "ASR against utility or over-refusal"

    def place(kind: str) -> Path:
        return stem.with_name(f"{stem.name}-{kind}.png")

    if names & set(HEADLINE):
        drawn[plane] = plot_pareto(part, place("pareto"), HEADLINE)
    if names - set(HEADLINE):
        drawn[f"{plane}, all methods"] = plot_pareto(part, place("pareto-all"))
    if names:
        drawn["curves over the steps"] = plot_curves(part, place("curves"))
        drawn["ASR under jailbreaks"] = plot_jailbreaks(part, place("jailbreaks"))
    drawn["ASR and utility against effort"] = plot_effort(part, place("effort"))
    return {said: path for said, path in drawn.items() if path is not None}


def _markdown(page: Mapping[str, Any]) -> str:
    """What the page says, its pictures as links."""

    def bullets(lines: Iterable[str]) -> str:
        return "".join(f"- {line}\n" for line in lines)

    meanings = bullets(f"**{name}**: {said}" for name, said in page["columns"].items())
    text = [f"# {page['title']}\n", f"{page['introduction']}\n", f"## {page['headline']}\n"]
    text += [markdown_table(page["bars"]), f"{page['bar_note']}\n", "## What the columns mean\n", meanings]
    text += ["## About the numbers\n", bullets(page["notes"])]
    for part in page["parts"]:
        text += [f"## {part['name']}\n", f"{part['said']}\n", markdown_table(part["table"]), f"{part['front']}\n"]
        if part["ablation"].rows:
            text += ["Variants (settings or ablations), under the default one:\n", markdown_table(part["ablation"])]
        if part["effort"].rows:
            text += ["What undoes the refusals:\n", markdown_table(part["effort"]), f"{part['effort_note']}\n"]
        text += [f"![{image.said}](plots/{image.path.name})\n" for image in part["images"]]
    return "\n".join(text + (["## Not run\n", bullets(page["lacking"])] if page["lacking"] else []))


def write_bench_report(directory: str | Path) -> list[Path]:
    """Write ``results.md``, ``report.html`` and ``plots/*.png`` into a directory of cells; returns their paths.

    Each file is written atomically. The page is self-contained (its pictures are embedded) and has no scripts.

    Raises:
        ValueError: no cells, or a cell that is not as it should be (see load_cells).
    """
    directory = Path(directory)
    cells = of_cells.load_cells(directory)
    summary = of_cells.summarise(cells)
    held = bars(summary)
    shown: list[dict[str, Any]] = []
    for part in of_cells.parts(summary):
        name = f"{part.model}, {part.tuning}: {part.scenario}"
        stem = directory / "plots" / re.sub(r"[^\w.-]+", "-", f"{part.model}-{part.tuning}-{part.scenario}")
        pictures = _pictures(part, stem).items()
        shown.append(
            {
                "name": name,
                "said": _describe(part.scenario),
                "table": scenario_table(part),
                "front": _dominance(part) + _not_compared(part) + _made_apart(part),
                "ablation": scenario_table(part, variants=True),
                "effort": effort_table(part),
                "effort_note": _effort_note(part),
                "images": [Picture(f"{name}, {said}", path.read_bytes(), path) for said, path in pictures],
            }
        )
    states = {b.status for b in held}
    content: dict[str, Any] = {
        "title": _TITLE,
        "introduction": _INTRODUCTION,
        "headline": _headline(held),
        "bars": _bar_table(held),
        "bar_note": _BAR_NOTE,
        "columns": COLUMNS
        | (KIND_COLUMNS if any(cell.get("foreign") for cell in cells) else {})
        | (KEPT_COLUMNS if any(cell.get("kept_answers") for cell in cells) else {}),
        "notes": _notes(cells),
        "parts": shown,
        "lacking": of_cells.missing(summary),
    }
    tone = "bad" if "missed" in states else "" if states == {"met"} else "warn"
    markdown = replace_file(directory / "results.md", _markdown(content).encode("utf-8"))
    page = write_page("bench", directory / "report.html", subtitle="", tone=tone, **content)
    return [markdown, page, *(image.path for part in shown for image in part["images"])]


if __name__ == "__main__":  # python -m spf.lab.bench.report DIR draws what is there again
    for place in write_bench_report(sys.argv[1]):
        print(place)
