"""Plots of the benchmark: safety-utility planes, curves over training, jailbreaks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spf.lab.bench.summary import (
    DEFAULT_RULE,
    OVER_REFUSAL_BAR,
    TASKS,
    UTILITY_NAMES,
    Group,
    of_scenario,
    scenario_task,
)
from spf.lab.report import charts
from spf.lab.report.stats import Spread


def _looks(methods: Iterable[str]) -> dict[str, charts.Look]:
    """How each method is drawn. The four known ones are fixed; the others repeat after 35."""
    names = {"aligned": "base", "plain": "plain", DEFAULT_RULE: "spf", "spf": "paper"}
    return charts.looks({name: charts.LOOKS[arm] for name, arm in names.items()}, sorted(set(methods) - set(names)))


def _heading(scenario: str, groups: Sequence[Group]) -> str:
    seeds = sorted({len(g.seeds) for g in groups})
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{scenario}: {groups[0].model}, {groups[0].tuning}, {span} seed{'' if seeds == [1] else 's'} a method"


def _estimate(spread: Spread) -> tuple[float, float, float]:
    sd = spread.sd or 0.0
    return 100 * spread.mean, 100 * (spread.mean - sd), 100 * (spread.mean + sd)


def _hollow(group: Group, aligned: Group | None) -> bool:
    """Whether the group refuses more harmless prompts than the bar allows."""
    rise = group.metrics["over_refusal"].mean - aligned.metrics["over_refusal"].mean if aligned else 0.0
    return rise > OVER_REFUSAL_BAR + 1e-9


def plot_pareto(
    summary: Sequence[Group], scenario: str, path: str | Path, methods: Collection[str] | None = None
) -> Path:
    """Write the scenario's safety-utility plane as PNG: ASR against utility, in percent, a point a method.

    methods: those to draw; all of them by default. Error bars: sample standard deviation over seeds. Hollow marker:
    over-refusal more than 2 points above the aligned model's. Dashed lines: the aligned model. Without utility data
    the x axis is over-refusal. The charts.legend beside the plane names the points, from the lowest ASR up.

    Raises:
        ValueError: no cell of this scenario, or several models or tunings.
    """
    aligned, groups = of_scenario(summary, scenario)
    groups = [g for g in groups if g.variant == "default" and (methods is None or g.method in methods)]
    task = scenario_task(groups)
    x_name = "utility" if task else "over_refusal"
    groups = [g for g in groups if x_name in g.metrics]
    if not groups:
        raise ValueError(f"no cell of the scenario {scenario!r} to draw")
    drawn = _looks(g.method for g in summary)
    points = {
        group.method: charts.Point(
            f"{group.method}  (over-refusal {100 * group.metrics['over_refusal'].mean:.0f}%)",
            drawn[group.method], _estimate(group.metrics[x_name]), _estimate(group.metrics["asr"]),
            _hollow(group, aligned),
        )
        for group in sorted(groups, key=lambda g: not drawn[g.method].main)  # the large points below the others
    }  # fmt: skip
    figure = charts.new_figure(10, max(5.2, 0.24 * len(groups) + 1.6))
    ax = figure.subplots()
    charts.style_axes(ax, "both", _heading(scenario, groups), "better ↘" if task else "better ↙")
    start = aligned.metrics.get(f"utility/{task}" if task else "over_refusal") if aligned else None
    level = (100 * start.mean if start else math.nan, 100 * aligned.metrics["asr"].mean if aligned else math.nan)
    marks = dict(zip(points, charts.draw_plane(ax, list(points.values()), level), strict=True))
    ax.set_xlabel(UTILITY_NAMES[task] if task else "Over-refusal (%)", fontsize=9.5, color=charts.INK)
    ax.set_ylabel("ASR (%)", fontsize=9.5, color=charts.INK)
    order = sorted(groups, key=lambda g: (-g.metrics["asr"].mean, g.metrics[x_name].mean))
    charts.legend(figure, 1, "right center", [marks[g.method] for g in order])
    keys = []
    if aligned:
        said = f"aligned model (over-refusal {100 * aligned.metrics['over_refusal'].mean:.0f}%)"
        dot = {"marker": "o", "linestyle": "none", "color": charts.MUTED, "markersize": 6.5}
        keys = [charts.key(said, **charts.LEVEL), charts.key("over-refusal at most 2 points above", **dot)]
        keys.append(charts.key("more than that", **dot, markerfacecolor=charts.PAPER))
    if any(len(g.seeds) > 1 for g in groups):
        keys.append(charts.key("± one standard deviation over seeds", color=charts.MUTED, linewidth=1.3))
    charts.legend(figure, 2, "lower left", keys)
    return charts.save_figure(figure, path)


def plot_curves(cells: Sequence[Mapping[str, Any]], scenario: str, path: str | Path) -> Path | None:
    """Write ASR, utility and training loss over the steps as PNG, a line a method (mean over seeds).

    Default variants; what no cell has logged is left out, and with nothing logged at all nothing is written
    and None returned; so are steps that some seeds lack. The loss is a running mean over a fifteenth of the steps.

    Raises:
        ValueError: several models or tunings among the scenario's cells.
    """
    mine = [c for c in cells if c["scenario"] == scenario and c["variant"] == "default"]
    if len({(c["model"], c["tuning"]) for c in mine}) > 1:
        raise ValueError(f"{scenario}: several models or tunings in one plot of curves")
    drawn = _looks(c["method"] for c in cells)
    task = next((TASKS[c["utility_metric"]] for c in mine if c["utility_metric"]), None)
    titles = {"asr": "ASR (%)", "utility": UTILITY_NAMES[task], "loss": "Training loss"}
    rows, each = [], {}
    for name, title in titles.items():
        for cell in sorted(mine, key=lambda c: (not drawn[c["method"]].main, c["method"])):
            log = [e for e in cell["history" if name == "loss" else "curve"] if e.get(name) is not None]
            values = charts.smooth([e[name] for e in log]) if name == "loss" else [100 * e[name] for e in log]
            at = f"{scenario}: {title}", cell["method"], cell["seed"]
            rows += [(*at, entry["step"], value) for entry, value in zip(log, values, strict=True)]
    aligned = next((c for c in cells if mine and c["scenario"] == "none" and c["model"] == mine[0]["model"]), None)
    known = aligned.get("utilities", {}).get(task, {}) if aligned else {}
    start = {"asr": aligned["asr"] if aligned else None, "utility": known.get("utility")}
    for name, level in start.items():
        title = f"{scenario}: {titles[name]}"
        top = max((value for panel, *_, value in rows if panel == title), default=0.0)
        levels = [] if level is None else [(100 * level, "aligned model, not trained")]
        each[title] = {"levels": levels, "limits": (0, 100 if top > 50 else max(20.0, 1.1 * top))}

    def style(method: str) -> dict[str, Any]:
        return {**drawn[method].line, "zorder": 4 if drawn[method].main else 3, "clip_on": False}

    if not rows:
        return None
    return charts.save_figure(
        charts.chart(rows, (3.9, 3.1), style, band="none", each=each, x="step", legend_columns=6), path
    )


def plot_jailbreaks(summary: Sequence[Group], scenario: str, path: str | Path) -> Path | None:
    """Write the ASR under each jailbreak as PNG: a row a method, a column a jailbreak, percent (mean over seeds).

    None, and nothing written, where no group of the scenario was evaluated under jailbreaks.

    Raises:
        ValueError: the summary holds several models or tunings.
    """
    aligned, groups = of_scenario(summary, scenario)
    groups = [*([aligned] if aligned else []), *(g for g in groups if g.variant == "default")]
    names = list(dict.fromkeys(n for g in groups if g is not aligned for n in g.metrics if n.startswith("jailbreak/")))
    if not names:
        return None
    columns = ["asr", *names]
    figure = charts.new_figure(10, 0.3 * len(groups) + 1.9)
    ax = figure.subplots()
    values = [[100 * g.metrics[c].mean if c in g.metrics else math.nan for c in columns] for g in groups]
    ax.pcolormesh(values, cmap="YlOrRd", vmin=0, vmax=100, edgecolors=charts.PAPER, linewidth=1.5)
    ax.invert_yaxis()
    ax.axvline(1, color=charts.PAPER, linewidth=5)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text = "–" if math.isnan(value) else f"{value:.0f}"
            ax.text(
                j + 0.5,
                i + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=8.5,
                color=charts.PAPER if value > 60 else charts.INK,
            )
    labels = ["no jailbreak", *(charts.plain_text(n.removeprefix("jailbreak/")) for n in names)]
    ax.set_xticks(np.arange(len(columns)) + 0.5, labels, rotation=28, ha="right", rotation_mode="anchor")
    ax.set_yticks(
        np.arange(len(groups)) + 0.5,
        [charts.plain_text(g.method if g is not aligned else "aligned model") for g in groups],
    )
    ax.tick_params(colors=charts.INK, labelsize=8.5, length=0)
    for tick, group in zip(ax.get_yticklabels(), groups, strict=True):
        tick.set_fontweight("bold" if group.method == DEFAULT_RULE else "normal")
    ax.spines[:].set_visible(False)
    trained = [g for g in groups if g is not aligned]
    title = "ASR (%) under jailbreaks, " + _heading(scenario, trained)
    ax.set_title(charts.plain_text(title), loc="left", fontsize=10.5, fontweight="bold", color=charts.INK, pad=9)
    return charts.save_figure(figure, path)
