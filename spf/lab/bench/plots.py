"""Plots of the benchmark: safety-utility planes, curves over training and over effort, jailbreaks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from spf.lab.bench.bars import OVER_REFUSAL_BAR
from spf.lab.bench.effort import AXES, RISE, efforts
from spf.lab.bench.summary import DEFAULT_RULE, UTILITY_NAMES, Group, Part
from spf.lab.report import charts
from spf.lab.report.stats import Spread


def _looks(methods: Iterable[str]) -> dict[str, charts.Look]:
    """How each method is drawn. The four known ones are fixed; the others repeat after 35."""
    names = {"aligned": "base", "plain": "plain", DEFAULT_RULE: "spf", "spf": "paper"}
    return charts.looks({name: charts.LOOKS[arm] for name, arm in names.items()}, sorted(set(methods) - set(names)))


def _heading(part: Part) -> str:
    seeds = sorted({len(g.seeds) for g in part.default})
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{part.scenario}: {part.model}, {part.tuning}, {span} seed{'' if seeds == [1] else 's'} a method"


def _estimate(spread: Spread | None) -> charts.Estimate:
    mean, sd = (spread.mean, spread.sd or 0.0) if spread else (math.nan, math.nan)
    return 100 * mean, 100 * (mean - sd), 100 * (mean + sd)


def _hollow(group: Group, aligned: Group | None) -> bool:
    """Whether the group refuses more harmless prompts than the bar allows."""
    rise = group.metrics["over_refusal"].mean - aligned.metrics["over_refusal"].mean if aligned else 0.0
    return rise > OVER_REFUSAL_BAR + 1e-9


def plot_pareto(part: Part, path: str | Path, methods: Collection[str] | None = None) -> Path:
    """Write the scenario's safety-utility plane as PNG: ASR against utility, in percent, a point a method.

    methods: those to draw; all of them by default. Error bars: sample standard deviation over seeds. Hollow marker:
    over-refusal more than 2 points above the aligned model's. Dashed lines: the aligned model. Without utility data
    the x axis is over-refusal. The legend beside the plane names the points, from the highest ASR down.
    """
    groups = [g for g in part.default if methods is None or g.method in methods]
    aligned, task = part.aligned, next((g.task for g in groups if g.task), None)
    x = "utility" if task else "over_refusal"
    shown = {g.method: g for g in groups if x in g.metrics}
    looks, rows, heading = _looks(part.methods), [], _heading(part)
    for name, g in sorted(shown.items(), key=lambda at: (-at[1].metrics["asr"].mean, at[1].metrics[x].mean)):
        rows.append((heading, name, 0, _estimate(g.metrics[x]), _estimate(g.metrics["asr"])))

    def label(group: Group, name: str) -> str:
        return f"{name} (over-refusal {100 * group.metrics['over_refusal'].mean:.0f}%)"

    keys = []
    if aligned:
        start = aligned.metrics.get(f"utility/{task}" if task else x)
        rows.append((heading, "", 0, _estimate(start), _estimate(aligned.metrics["asr"])))
        dot: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": charts.MUTED, "markersize": 6.5}
        keys = [
            Line2D([], [], label=label(aligned, "aligned model"), **charts.LEVEL),
            Line2D([], [], label="over-refusal at most 2 points above", **dot),
            Line2D([], [], label="more than that", **dot, markerfacecolor=charts.PAPER),
        ]
    if any(len(g.seeds) > 1 for g in shown.values()):
        keys.append(Line2D([], [], label="± one standard deviation over seeds", color=charts.MUTED, linewidth=1.3))
    axes: dict[str, Any] = {"x": UTILITY_NAMES[task] if task else "Over-refusal (%)", "y": "ASR (%)", "grid": "both"}
    figure = charts.chart(
        rows, (9.5 / 3, max(4.5, 0.24 * len(shown) + 0.9)), lambda m: looks[m].point(_hollow(shown[m], aligned)),
        lambda m: label(shown[m], m) if m in shown else m, draw=charts.draw_plane,
        note="better ↘" if task else "better ↙", place="right center", legend_columns=1, **axes,
    )  # fmt: skip
    charts.legend(figure, 2, "lower left", keys)
    return charts.save_figure(figure, path)


def plot_curves(part: Part, path: str | Path) -> Path | None:
    """Write ASR, utility and training loss over the steps as PNG, a line a method (mean over seeds).

    Default variants; what no cell has logged is left out, and with nothing logged at all nothing is written
    and None returned; so are steps that some seeds lack. The loss is a running mean over a fifteenth of the steps.
    """
    looks = _looks(part.methods)
    task = next((g.task for g in part.default if g.task), None)
    before = part.aligned.metrics if part.aligned else {}
    start = {"asr": before.get("asr"), "utility": before.get(f"utility/{task}")}
    rows: list[charts.Row] = []
    each: dict[str, dict[str, Any]] = {}
    for name, title in {"asr": "ASR (%)", "utility": UTILITY_NAMES[task], "loss": "Training loss"}.items():
        panel, found = f"{part.scenario}: {title}", []
        for group in sorted(part.default, key=lambda g: (not looks[g.method].main, g.method)):
            for cell in group.cells:
                log = [e for e in cell["history" if name == "loss" else "curve"] if e.get(name) is not None]
                values = charts.smooth([e[name] for e in log]) if name == "loss" else [100 * e[name] for e in log]
                steps = (entry["step"] for entry in log)
                found += [(panel, group.method, cell["seed"], *at) for at in zip(steps, values, strict=True)]
        if name in start:
            top = max((value for *_, value in found), default=0.0)
            level = start[name]
            levels = [(100 * level.mean, "aligned model, not trained")] if level else []
            each[panel] = {"levels": levels, "limits": (0, 100 if top > 50 else max(20.0, 1.1 * top))}
        rows += found
    if not rows:
        return None
    options: dict[str, Any] = {"band": "none", "each": each, "x": "step", "legend_columns": 6}
    figure = charts.chart(rows, (3.9, 3.1), lambda m: {**looks[m].line, "clip_on": False}, **options)
    return charts.save_figure(figure, path)


def plot_effort(part: Part, path: str | Path) -> Path | None:
    """Write ASR and utility against each effort as PNG, a line a method (mean over seeds), percent.

    A cross marks where ASR passes 20 points above the aligned model's. None, and nothing written, where no method
    was run with two values of an effort.
    """
    looks = _looks(part.methods)
    before = part.aligned.metrics if part.aligned else {}
    utility = "utility" if part.task is None else f"utility/{part.task}"
    shown = {"asr": "ASR (%)", "foreign": "ASR, the attack's kind (%)", "utility": UTILITY_NAMES[part.task]}
    if "foreign" not in before:
        del shown["foreign"]
    rows: list[charts.Row] = []
    each: dict[str, dict[str, Any]] = {}
    for effort in efforts(part):
        for metric, title in shown.items():
            panel = f"{title} by {AXES[effort.axis]}"
            level = before.get(utility if metric == "utility" else metric)
            here: list[charts.Row] = []
            for method, curve in effort.curves.items():
                values = ((at, group.metrics.get(metric)) for at, group in curve.items())
                here += [(panel, method, 0, at, 100 * found.mean) for at, found in values if found]
            levels = [(100 * level.mean, "aligned model, not trained")] if level else []
            options: dict[str, Any] = {"title": title, "levels": levels, "limits": (-2, 102), "x": AXES[effort.axis]}
            options |= {"log": True, "ticks": {at: f"{at:g}" for at in sorted({row[3] for row in here})}}
            if level and metric != "utility":
                options |= {"draw": _crossing(100 * (level.mean + RISE)), "note": f"✕ {100 * RISE:g} points above"}
            each[panel] = options
            rows += here
    if not rows:
        return None
    figure = charts.chart(
        rows, (3.9, 3.1), lambda m: {**looks[m].line, "clip_on": False}, each=each, columns=len(shown), legend_columns=6
    )
    return charts.save_figure(figure, path)


def _crossing(threshold: float) -> Any:
    """Lines, each with a cross where it first passes the threshold, between two efforts by their logarithms."""

    def draw(ax: Axes, rows: list[charts.Row], style: Any, label: Any, band: str) -> None:
        charts.draw_lines(ax, rows, style, label, band)
        for name, (xs, mean, _) in charts.over_seeds(rows).items():
            above = [value > threshold for value in mean]
            if (at := above.index(True) if any(above) else 0) > 0:
                part = (threshold - mean[at - 1]) / (mean[at] - mean[at - 1])
                x = math.exp(math.log(xs[at - 1]) + part * math.log(xs[at] / xs[at - 1]))
                ax.plot(x, threshold, marker="X", markersize=9, color=style(name)["color"], zorder=6, linestyle="")

    return draw


def plot_jailbreaks(part: Part, path: str | Path) -> Path | None:
    """Write the ASR under each jailbreak as PNG: a row a method, a column a jailbreak, percent (mean over seeds).

    None, and nothing written, where no group of the scenario was evaluated under jailbreaks.
    """
    trained = part.default
    names = {n: n.removeprefix("jailbreak/") for g in trained for n in g.metrics if n.startswith("jailbreak/")}
    if not names:
        return None
    rows: list[charts.Row] = []
    for group in [part.aligned, *trained] if part.aligned else trained:
        line = "aligned model" if group is part.aligned else group.method
        known = ((said, group.metrics.get(name)) for name, said in {"asr": "no jailbreak", **names}.items())
        rows += [("", line, 0, said, 100 * spread.mean if spread else math.nan) for said, spread in known]
    title = f"ASR (%) under jailbreaks, {_heading(part)}"
    size = 9.5 / 3, 0.3 * (len(trained) + 1) + 1.2
    figure = charts.chart(rows, size, lambda name: {}, title=title, draw=charts.draw_heat)
    for tick in figure.axes[0].get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() == DEFAULT_RULE else "normal")
    return charts.save_figure(figure, path)
