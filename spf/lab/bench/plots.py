"""Plots of the benchmark: safety-utility planes, curves over training, jailbreaks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf.lab.bench.summary import (
    DEFAULT_RULE,
    OVER_REFUSAL_BAR,
    TASKS,
    UTILITY_NAMES,
    Group,
    is_number,
    of_scenario,
    scenario_task,
)
from spf.lab.report.charts import (
    INK,
    LOOKS,
    MUTED,
    PAPER,
    Look,
    Panel,
    draw_panels,
    key,
    legend,
    looks,
    new_figure,
    plain_text,
    save_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ALIGNED: dict[str, Any] = {"color": MUTED, "linewidth": 1.1, "dashes": (4, 3)}
"""How the level of the aligned model is drawn."""


def _looks(methods: Iterable[str]) -> dict[str, Look]:
    """How each method is drawn. The four known ones are fixed; the others repeat after 35."""
    names = {"aligned": "base", "plain": "plain", DEFAULT_RULE: "spf", "spf": "paper"}
    return looks({name: LOOKS[arm] for name, arm in names.items()}, sorted(set(methods) - set(names)))


def _heading(scenario: str, groups: Sequence[Group]) -> str:
    seeds = sorted({len(g.seeds) for g in groups})
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{scenario}: {groups[0].model}, {groups[0].tuning}, {span} seed{'' if seeds == [1] else 's'} a method"


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits in percent: some air, at least 20 points wide (less would enlarge noise), within the scale."""
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), (20 - (high - low)) / 2, 1.0)
    return max(-3.0, low - pad), min(103.0, high + pad)


def plot_pareto(
    summary: Sequence[Group], scenario: str, path: str | Path, methods: Collection[str] | None = None
) -> Path:
    """Write the scenario's safety-utility plane as PNG: ASR against utility, in percent, a point a method.

    methods: those to draw; all of them by default. Error bars: sample standard deviation over seeds. Hollow marker:
    over-refusal more than 2 points above the aligned model's. Dashed lines: the aligned model. Without utility data
    the x axis is over-refusal. The legend beside the plane names the points, from the lowest ASR up.

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
    figure = new_figure(10, max(5.2, 0.24 * len(groups) + 1.6))
    ax = figure.subplots()
    style_axes(ax, "both", _heading(scenario, groups), "better ↘" if task else "better ↙")
    xs: list[float] = []
    ys: list[float] = []
    if aligned:
        reference = aligned.metrics.get(f"utility/{task}" if task else "over_refusal")
        for line, level, values in (
            (ax.axhline, aligned.metrics["asr"], ys), *([(ax.axvline, reference, xs)] if reference else []),
        ):  # fmt: skip
            line(100 * level.mean, zorder=2, **_ALIGNED)
            values.append(100 * level.mean)
    names: dict[str, Any] = {}
    for group in sorted(groups, key=lambda g: not drawn[g.method].main):  # the large points below the others
        look, x, y = drawn[group.method], group.metrics[x_name], group.metrics["asr"]
        at, bars = (100 * x.mean, 100 * y.mean), (100 * (x.sd or 0.0), 100 * (y.sd or 0.0))
        ax.errorbar(
            *at, xerr=bars[0], yerr=bars[1], fmt="none", ecolor=look.colour, elinewidth=1.3, alpha=0.6, zorder=3
        )
        marker = _marker(group, aligned, look)
        ax.plot(*at, look.marker, **marker, zorder=4 + len(names) / 100)
        text = f"{group.method}  (over-refusal {100 * group.metrics['over_refusal'].mean:.0f}%)"
        names[group.method] = key(
            text, marker=look.marker, linestyle="none", **marker | {"markersize": 10 if look.main else 7.5}
        )
        for value, reach, values in zip(at, bars, (xs, ys), strict=True):
            values += [value - reach, value + reach]
    ax.set_xlim(*_limits(xs))
    ax.set_ylim(*_limits(ys))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([tick for tick in axis.get_ticklocs() if -1e-9 <= tick <= 100 + 1e-9])
    ax.set_xlabel(UTILITY_NAMES[task] if task else "Over-refusal (%)", fontsize=9.5, color=INK)
    ax.set_ylabel("ASR (%)", fontsize=9.5, color=INK)
    order = sorted(groups, key=lambda g: (g.metrics["asr"].mean, -g.metrics[x_name].mean))
    legend(figure, 1, "right center", [names[g.method] for g in reversed(order)])
    keys = []
    if aligned:
        said = f"aligned model (over-refusal {100 * aligned.metrics['over_refusal'].mean:.0f}%)"
        dot = {"marker": "o", "linestyle": "none", "color": MUTED, "markersize": 6.5}
        keys = [key(said, **_ALIGNED), key("over-refusal at most 2 points above", **dot)]
        keys.append(key("more than that", **dot, markerfacecolor=PAPER))
    if any(len(g.seeds) > 1 for g in groups):
        keys.append(key("± one standard deviation over seeds", color=MUTED, linewidth=1.3))
    legend(figure, 2, "lower left", keys)
    return save_figure(figure, path)


def _marker(group: Group, aligned: Group | None, look: Look) -> dict[str, Any]:
    """The marker's keywords: hollow where the group refuses more harmless prompts than the bar allows."""
    rise = group.metrics["over_refusal"].mean - aligned.metrics["over_refusal"].mean if aligned else 0.0
    hollow = rise > OVER_REFUSAL_BAR + 1e-9
    return {
        "color": look.colour,
        "markersize": 11 if look.main else 8,
        "markerfacecolor": PAPER if hollow else look.colour,
        "markeredgecolor": look.colour,
        "markeredgewidth": 1.8 if hollow else 0.9,
    }


def _mean_curve(cells: Sequence[Mapping[str, Any]], log: str, key: str) -> tuple[list[float], list[float]]:
    """Steps and the mean over cells of one logged quantity; steps that not every cell logged are left out."""
    values: dict[float, list[float]] = {}
    for cell in cells:
        for entry in cell[log]:
            if is_number(entry.get(key)):
                values.setdefault(entry["step"], []).append(entry[key])
    most = max(map(len, values.values()), default=0)
    steps = sorted(step for step, found in values.items() if len(found) == most)
    return steps, [statistics.fmean(values[step]) for step in steps]


def _smooth(values: Sequence[float]) -> list[float]:
    half = len(values) // 30
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def plot_curves(cells: Sequence[Mapping[str, Any]], scenario: str, path: str | Path) -> Path | None:
    """Write ASR, utility and training loss over the steps as PNG, a line a method (mean over seeds).

    Default variants; what no cell has logged is left out, and with nothing logged at all nothing is written
    and None returned. The loss is a running mean over a fifteenth of the steps.

    Raises:
        ValueError: several models or tunings among the scenario's cells.
    """
    mine = [c for c in cells if c["scenario"] == scenario and c["variant"] == "default"]
    if len({(c["model"], c["tuning"]) for c in mine}) > 1:
        raise ValueError(f"{scenario}: several models or tunings in one plot of curves")
    by: dict[str, list[Mapping[str, Any]]] = {}
    for cell in mine:
        by.setdefault(cell["method"], []).append(cell)
    drawn = _looks(c["method"] for c in cells)
    order = sorted(by, key=lambda m: (not drawn[m].main, m))
    task = next((TASKS[c["utility_metric"]] for c in mine if c["utility_metric"]), None)
    aligned = next((c for c in cells if mine and c["scenario"] == "none" and c["model"] == mine[0]["model"]), None)
    start: dict[str, float] = {}
    if aligned:
        start["asr"] = aligned["asr"]
        if task in aligned.get("utilities", {}):
            start["utility"] = aligned["utilities"][task]["utility"]

    def draw(ax: Axes, log: str, name: str) -> None:
        top = 0.0
        for method in order:
            steps, values = _mean_curve(by[method], log, name)
            if not steps:
                continue
            top = max(top, *values)
            look, share = drawn[method], log == "curve"
            # A log of one entry would be an invisible line.
            marker = {"marker": look.marker, "markersize": 4.5} if share or len(steps) == 1 else {}
            values = [100 * v for v in values] if share else _smooth(values)
            options = {**look.line, **marker, "zorder": 4 if look.main else 3, "clip_on": False}
            ax.plot(steps, values, label=plain_text(method), **options)
        if name in start:
            ax.axhline(100 * start[name], label="aligned model, not trained", zorder=2, **_ALIGNED)
        if log == "curve":
            ax.set_ylim(0, 100 if top > 0.5 else max(20.0, 110 * top))
        ax.margins(x=0.02)

    wanted = (
        ("curve", "asr", "ASR (%)"),
        ("curve", "utility", UTILITY_NAMES[task]),
        ("history", "loss", "Training loss"),
    )
    panels = [
        Panel(f"{scenario}: {title}", lambda ax, log=log, name=name: draw(ax, log, name), x="step")  # type: ignore[misc]
        for log, name, title in wanted
        if any(_mean_curve(by[m], log, name)[0] for m in order)
    ]
    return save_figure(draw_panels(panels, 3.9, 3.1, legend_columns=6), path) if panels else None


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
    figure = new_figure(10, 0.3 * len(groups) + 1.9)
    ax = figure.subplots()
    values = [[100 * g.metrics[c].mean if c in g.metrics else math.nan for c in columns] for g in groups]
    ax.imshow(values, cmap="YlOrRd", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text = "–" if math.isnan(value) else f"{value:.0f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=8.5, color=PAPER if value > 60 else INK)
    labels = ["no jailbreak", *(plain_text(n.removeprefix("jailbreak/")) for n in names)]
    ax.set_xticks(range(len(columns)), labels, rotation=28, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(groups)), [plain_text(g.method if g is not aligned else "aligned model") for g in groups])
    ax.tick_params(colors=INK, labelsize=8.5, length=0)
    for tick, group in zip(ax.get_yticklabels(), groups, strict=True):
        tick.set_fontweight("bold" if group.method == DEFAULT_RULE else "normal")
    for side in ax.spines.values():
        side.set_visible(False)
    for edge in range(1, len(groups)):
        ax.axhline(edge - 0.5, color=PAPER, linewidth=1.5)
    for edge in range(1, len(columns)):
        ax.axvline(edge - 0.5, color=PAPER, linewidth=5 if edge == 1 else 1.5)
    trained = [g for g in groups if g is not aligned]
    title = "ASR (%) under jailbreaks, " + _heading(scenario, trained)
    ax.set_title(plain_text(title), loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=9)
    return save_figure(figure, path)
