"""Plots of the benchmark: safety-utility planes, curves over training, jailbreaks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from spf.lab.page import (
    COLOURS,
    INK,
    MORE_COLOURS,
    MUTED,
    PAPER,
    new_figure,
    plain_text,
    save_figure,
    style_axes,
    title_axes,
)


@dataclass(frozen=True)
class _Look:
    colour: str
    marker: str
    dashes: tuple[float, ...]
    main: bool


def _looks(methods: Iterable[str]) -> dict[str, _Look]:
    """How each method is drawn. The four known ones are fixed; the others repeat after 35."""
    fixed = {
        "aligned": _Look(COLOURS["base"][0], "s", (1, 2), False),
        "plain": _Look(COLOURS["plain"][0], "D", (5, 2), True),
        DEFAULT_RULE: _Look(COLOURS["spf"][0], "o", (), True),
        "spf": _Look(COLOURS["paper"][0], "^", (5, 2, 1, 2), False),
    }
    dashes = ((2, 2), (8, 2), (3, 1, 1, 1), (1, 1), (6, 1), ())
    looks = dict(fixed)
    for i, method in enumerate(sorted(set(methods) - set(fixed))):
        looks[method] = _Look(MORE_COLOURS[i % 5][0], "v*Xph<>"[i % 7], dashes[i % 6], False)
    return looks


def _heading(scenario: str, groups: Sequence[Group]) -> str:
    seeds = sorted({len(g.seeds) for g in groups})
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{scenario}: {groups[0].model}, {groups[0].tuning}, {span} seed{'' if seeds == [1] else 's'} a method"


def _spaced(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions in [0, 1] as near as simple passes bring them to the wanted ones, in order, ``gap`` apart."""
    places: list[float] = []
    for value in wanted:
        places.append(max(value, places[-1] + gap if places else gap / 2))
    limit = 1 - gap / 2
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits in percent: some air, at least 20 points wide (less would enlarge noise), within the scale."""
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), (20 - (high - low)) / 2, 1.0)
    return max(-3.0, low - pad), min(103.0, high + pad)


def plot_pareto(summary: Sequence[Group], scenario: str, path: str | Path) -> Path:
    """Write the scenario's safety-utility plane as PNG: ASR against utility, in percent, a point a method.

    Error bars: sample standard deviation over seeds. Hollow marker: over-refusal more than 2 points above the
    aligned model's. Dashed lines: the aligned model. Without utility data the x axis is over-refusal. The
    names stand in a column beside the plane, so they cannot collide however close the points are.

    Raises:
        ValueError: no cell of this scenario, or several models or tunings.
    """
    from matplotlib.lines import Line2D

    aligned, groups = of_scenario(summary, scenario)
    groups = [g for g in groups if g.variant == "default"]
    task = scenario_task(groups)
    x_key = "utility" if task else "over_refusal"
    groups = [g for g in groups if x_key in g.metrics]
    if not groups:
        raise ValueError(f"no cell of the scenario {scenario!r} to draw")
    looks = _looks(g.method for g in summary)
    figure = new_figure(10, max(5.2, 0.27 * len(groups) + 1.6))
    ax = figure.subplots()
    style_axes(ax, "both")
    title_axes(ax, _heading(scenario, groups), "better ↘" if task else "better ↙")
    reference = None
    if aligned:
        reference = aligned.metrics.get(f"utility/{task}") if task else aligned.metrics["over_refusal"]
        lines = [(ax.axhline, aligned.metrics["asr"])] + ([(ax.axvline, reference)] if reference else [])
        for line, value in lines:
            line(100 * value.mean, color=MUTED, linewidth=1.1, dashes=(4, 3), zorder=2)
    xs: list[float] = []
    ys: list[float] = []
    for group in sorted(groups, key=lambda g: not looks[g.method].main):  # the large points below the others
        look, x, y = looks[group.method], group.metrics[x_key], group.metrics["asr"]
        at = 100 * x.mean, 100 * y.mean
        bars_ = 100 * (x.sd or 0.0), 100 * (y.sd or 0.0)
        ax.errorbar(
            *at, xerr=bars_[0], yerr=bars_[1], fmt="none", ecolor=look.colour, elinewidth=1.3, alpha=0.6, zorder=3
        )
        ax.plot(*at, look.marker, **_marker(group, aligned, look), zorder=4 + len(xs) / 100)
        xs += [at[0] - bars_[0], at[0] + bars_[0]]
        ys += [at[1] - bars_[1], at[1] + bars_[1]]
    if aligned:
        ys.append(100 * aligned.metrics["asr"].mean)
        xs += [100 * reference.mean] if reference else []
    ax.set_xlim(*_limits(xs))
    ax.set_ylim(*_limits(ys))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([tick for tick in axis.get_ticklocs() if -1e-9 <= tick <= 100 + 1e-9])
    ax.set_xlabel(UTILITY_NAMES[task] if task else "Over-refusal (%)", fontsize=9.5, color=INK)
    ax.set_ylabel("ASR (%)", fontsize=9.5, color=INK)

    low, high = ax.get_ylim()
    order = sorted(groups, key=lambda g: (g.metrics["asr"].mean, -g.metrics[x_key].mean))
    gap = min(0.055, 1 / len(order))
    places = _spaced([(100 * g.metrics["asr"].mean - low) / (high - low) for g in order], gap)
    beside = ax.transAxes
    for group, place in zip(order, places, strict=True):
        look = looks[group.method]
        point = 100 * group.metrics[x_key].mean, 100 * group.metrics["asr"].mean
        ax.annotate(
            "", point, (1.035, place), textcoords=beside, annotation_clip=False, zorder=2.5,
            arrowprops={"arrowstyle": "-", "color": look.colour, "linewidth": 0.7, "alpha": 0.45, "shrinkB": 3},
        )  # fmt: skip
        marker = _marker(group, aligned, look) | {"markersize": 6.5}
        ax.plot(1.05, place, look.marker, transform=beside, clip_on=False, **marker)
        text = f"{group.method}  (over-refusal {100 * group.metrics['over_refusal'].mean:.0f}%)"
        weight = "bold" if look.main else "normal"
        ax.text(
            1.075, place, plain_text(text), transform=beside, va="center", fontsize=8.5, color=INK, fontweight=weight
        )
    keys = []
    if aligned:
        said = f"aligned model (over-refusal {100 * aligned.metrics['over_refusal'].mean:.0f}%)"
        keys.append(Line2D([], [], color=MUTED, linewidth=1.1, dashes=(4, 3), label=said))
        dot = {"marker": "o", "linestyle": "none", "color": MUTED, "markersize": 6.5}
        keys.append(Line2D([], [], **dot, label="over-refusal at most 2 points above"))  # type: ignore[arg-type]
        keys.append(Line2D([], [], **dot, markerfacecolor=PAPER, label="more than that"))  # type: ignore[arg-type]
    if any(len(g.seeds) > 1 for g in groups):
        keys.append(Line2D([], [], color=MUTED, linewidth=1.3, label="± one standard deviation over seeds"))
    if keys:
        figure.legend(handles=keys, loc="outside lower left", ncols=2, fontsize=8, frameon=False, labelcolor=INK)
    return save_figure(figure, path)


def _marker(group: Group, aligned: Group | None, look: _Look) -> dict[str, Any]:
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
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    mine = [c for c in cells if c["scenario"] == scenario and c["variant"] == "default"]
    if len({(c["model"], c["tuning"]) for c in mine}) > 1:
        raise ValueError(f"{scenario}: several models or tunings in one plot of curves")
    by: dict[str, list[Mapping[str, Any]]] = {}
    for cell in mine:
        by.setdefault(cell["method"], []).append(cell)
    looks = _looks(c["method"] for c in cells)
    order = sorted(by, key=lambda m: (not looks[m].main, m))
    task = next((TASKS[c["utility_metric"]] for c in mine if c["utility_metric"]), None)
    aligned = next((c for c in cells if mine and c["scenario"] == "none" and c["model"] == mine[0]["model"]), None)
    references: dict[str, float] = {}
    if aligned:
        references["asr"] = aligned["asr"]
        if task in aligned.get("utilities", {}):
            references["utility"] = aligned["utilities"][task]["utility"]
    panels = []
    for log, key, title in (
        ("curve", "asr", "ASR (%)"),
        ("curve", "utility", UTILITY_NAMES[task]),
        ("history", "loss", "Training loss"),
    ):
        drawn = {method: _mean_curve(by[method], log, key) for method in order}
        drawn = {method: curve for method, curve in drawn.items() if curve[0]}
        if drawn:
            panels.append((log, key, title, drawn))
    if not panels:
        return None
    shown = [m for m in order if any(m in drawn for *_, drawn in panels)]
    figure = new_figure(12, 3.6 + 0.2 * math.ceil((len(shown) + 1) / 6))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (log, key, title, drawn) in zip(axes, panels, strict=True):
        style_axes(ax, "y")
        title_axes(ax, f"{scenario}: {title}")
        share = log == "curve"
        for method, (steps, values) in drawn.items():
            look = looks[method]
            values = [100 * v for v in values] if share else _smooth(values)
            # A log of one entry would be an invisible line.
            marker = {"marker": look.marker, "markersize": 4.5} if share or len(steps) == 1 else {}
            ax.plot(
                steps, values, color=look.colour, linewidth=2.2 if look.main else 1.2,
                dashes=look.dashes or (None, None), zorder=4 if look.main else 3, clip_on=False, **marker,
            )  # fmt: skip
        if key in references:
            ax.axhline(100 * references[key], color=MUTED, linewidth=1.1, dashes=(4, 3), zorder=2)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel("step", fontsize=9, color=MUTED)
        ax.margins(x=0.02)
        if share:
            top = max(max(values) for _, values in drawn.values())
            ax.set_ylim(0, 100 if top > 0.5 else max(20.0, 110 * top))
    keys = [
        Line2D(
            [], [], color=looks[m].colour, marker=looks[m].marker, markersize=5, label=plain_text(m),
            linewidth=2.2 if looks[m].main else 1.2, dashes=looks[m].dashes or (None, None),
        )
        for m in shown
    ]  # fmt: skip
    if any(key in references for _, key, *_ in panels):
        keys.append(Line2D([], [], color=MUTED, linewidth=1.1, dashes=(4, 3), label="aligned model, not trained"))
    figure.legend(
        handles=keys,
        loc="outside lower center",
        ncols=6,
        fontsize=8.5,
        frameon=False,
        labelcolor=INK,
        handlelength=3.6,
    )
    return save_figure(figure, path)


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
    title_axes(ax, "ASR (%) under jailbreaks, " + _heading(scenario, trained))
    return save_figure(figure, path)
