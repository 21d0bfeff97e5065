"""Charts: one palette, one style of axes, points that a legend names, lines over seeds, and PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spf.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1f2933", "#5f6b7a", "#e3e7ec", "#fefefe"
# After Okabe and Ito; the known arms of a report have fixed ones.
COLOURS = {"base": "#6b7280", "plain": "#d55e00", "spf": "#0072b2", "paper": "#b5568c"}
MORE_COLOURS = ("#00805c", "#a87b00", "#3f9bd1", "#8a5a2b", "#5b4bb5")


@dataclass(frozen=True)
class Look:
    """How an arm or a method is drawn, in every chart of a report."""

    colour: str
    marker: str
    dashes: tuple[float, ...]
    main: bool = False

    @property
    def line(self) -> dict[str, Any]:
        width = 2.2 if self.main else 1.3
        return {"color": self.colour, "linewidth": width, "dashes": self.dashes or (None, None)}


LEVEL: dict[str, Any] = {"color": MUTED, "linewidth": 1.1, "dashes": (4, 3)}
"""How the level is drawn that everything is compared with."""

LOOKS = {
    "base": Look(COLOURS["base"], "s", (1, 2)),
    "plain": Look(COLOURS["plain"], "D", (5, 2), True),
    "spf": Look(COLOURS["spf"], "o", (), True),
    "paper": Look(COLOURS["paper"], "^", (5, 2, 1, 2)),
}


def looks(fixed: Mapping[str, Look], others: Iterable[str]) -> dict[str, Look]:
    """The fixed looks and one for each other name, which repeat after 35."""
    dashes = ((2, 2), (8, 2), (3, 1, 1, 1), (1, 1), (6, 1), ())
    more = {n: Look(MORE_COLOURS[i % 5], "v*Xph<>"[i % 7], dashes[i % 6]) for i, n in enumerate(others)}
    return more | dict(fixed)


def plain_text(text: str) -> str:
    """Text that matplotlib draws as it is (no math mode)."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that touches no global backend or list of figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def style_axes(ax: Axes, grid: str, title: str = "", note: str = "") -> None:
    """Give axes the reports' look: no box, a light grid (x, y or both), muted ticks, a title at the left."""
    ax.set_facecolor("none")
    for side, spine in ax.spines.items():
        spine.set_visible((side == "bottom" and grid != "x") or (side == "left" and grid == "both"))
        spine.set(color=MUTED, linewidth=0.8)
    ax.grid(True, axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.tick_params(colors=MUTED, labelsize=8.5, length=0)
    ax.set_title(plain_text(title), loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=9)
    ax.set_title(note, loc="right", fontsize=9, color=MUTED, pad=9)


def key(label: str, **options: Any) -> Any:
    """An entry of a legend that stands for no single line or point."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=plain_text(label), **options)


def legend(figure: Figure, columns: int, place: str = "lower center", handles: Sequence[Any] | None = None) -> None:
    """One legend outside the axes: the handles given, or every name that the axes have, once."""
    if handles is None:
        named = ((n, h) for ax in figure.axes for h, n in zip(*ax.get_legend_handles_labels(), strict=True))
        handles = list(dict(named).values())
    if handles:
        figure.legend(  # type: ignore[call-overload]
            handles=list(handles), loc=f"outside {place}", ncols=columns, fontsize=8.5, frameon=False, labelcolor=INK,
            handlelength=2.6,
        )  # fmt: skip


Estimate = tuple[float, float, float]
"""A value and the ends of its interval, or of its range over seeds."""

Row = tuple[str, str, Any, Any, float | Estimate]
"""What is drawn and where: panel, line, which seed or run it is of, x, value."""


def smooth(values: Sequence[float]) -> list[float]:
    """The running mean over a fifteenth of the values."""
    half = len(values) // 30
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def over_seeds(rows: Iterable[Row], band: str = "range") -> dict[str, tuple[list[Any], Any, Any]]:
    """Each line's x, its mean over the seeds where all of them have a value, and the ends around it: (2, N) or None.

    band: the ends are the seeds' range, one standard deviation ("sd"), or None ("none"); of one seed they are the
    intervals of its values, where it has them.
    """
    lines: dict[str, dict[Any, dict[Any, float | Estimate]]] = {}
    for _, name, seed, x, value in rows:
        lines.setdefault(name, {}).setdefault(x, {})[seed] = value
    found = {}
    for name, points in lines.items():
        seeds = max(map(len, points.values()))
        shown = {x: list(values.values()) for x, values in points.items() if len(values) == seeds}
        values = np.asarray(list(shown.values()), dtype=float)
        ends: Any = values[:, 0, 1:].T if values.ndim == 3 and seeds == 1 else None
        values = values[..., 0] if values.ndim == 3 else values
        mean = values.mean(1)
        if seeds > 1 and band != "none":
            sd = values.std(1, ddof=1)
            ends = np.stack((values.min(1), values.max(1)) if band == "range" else (mean - sd, mean + sd))
        found[name] = list(shown), mean, ends
    return found


Style = Callable[[str], Mapping[str, Any]]
"""How a line of this name is drawn, for matplotlib."""


def draw_lines(
    ax: Axes, rows: Iterable[Row], style: Style, label: Callable[[str], str] = str, band: str = "range"
) -> None:
    """Lines of means, with the ends around them as bands."""
    for name, (xs, mean, ends) in over_seeds(rows, band).items():
        # a line of one point would be invisible, many points would hide their line
        marks = {"marker": "" if len(xs) > 20 else "o", "markersize": 6 if len(xs) == 1 else 3}
        options = {"linewidth": 1.6, **marks, "label": plain_text(label(name)) or None, **style(name)}
        (line,) = ax.plot(xs, mean, **options)
        if ends is not None:
            ax.fill_between(xs, *ends, color=line.get_color(), alpha=0.16, linewidth=0)


def draw_bars(
    ax: Axes, rows: Sequence[Row], style: Style, label: Callable[[str], str] = str, band: str = "range",
    groups: Sequence[str] = (), form: str = "",
) -> None:  # fmt: skip
    """Horizontal bars of means with lines between the ends: a bar a line in the group of each x, if it has one there.

    groups: by default every x there is. form: of the value beside a bar.
    """
    groups, bars = groups or list(dict.fromkeys(row[3] for row in rows)), over_seeds(rows, band)
    height = 0.8 / max(1, len(bars))
    for i, (name, (xs, mean, ends)) in enumerate(bars.items()):
        places = [groups.index(x) + height * (i + 0.5) - 0.4 for x in xs]
        reach = None if ends is None else np.maximum([mean - ends[0], ends[1] - mean], 0.0)
        options = {"xerr": reach, "error_kw": {"ecolor": INK, "elinewidth": 1.1}, "color": style(name)["color"]}
        drawn = ax.barh(places, mean, 0.88 * height, label=plain_text(label(name)) or None, **options)
        if form:
            ax.bar_label(drawn, fmt=form, padding=3, fontsize=8.5, color=INK)
    ax.set_yticks(range(len(groups)), [plain_text(group) for group in groups])
    ax.set_ylim(len(groups) - 0.5, -0.5)


@dataclass(frozen=True)
class Panel:
    """One set of axes: `draw` puts the content into it; limits, names of the axes and levels come after.

    Levels and limits are those of the values, so of the x axis where the grid is "x".
    """

    title: str
    draw: Callable[[Axes], Any]
    note: str = ""
    grid: str = "y"
    x: str = ""
    y: str = ""
    levels: Sequence[tuple[float, str]] = ()
    limits: tuple[float | None, float | None] = (None, None)
    ticks: Mapping[float, str] = field(default_factory=dict)


def chart(
    rows: Iterable[Row], size: tuple[float, float], style: Style, label: Callable[[str], str] = str,
    band: str = "range", draw: Callable[..., Any] = draw_lines, each: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Figure:  # fmt: skip
    """Lines or bars in panels, both in the order of the rows; options: a Panel's, the same for all but what `each` says
    of one, and those of draw_panels."""
    by: dict[str, list[Row]] = {}
    for row in rows:
        by.setdefault(row[0], []).append(row)
    common = {name: options.pop(name) for name in Panel.__dataclass_fields__ if name in options}
    panels = [
        Panel(
            **{"title": label(title), **common, **(each or {}).get(title, {})},
            draw=partial(draw, rows=found, style=style, label=label, band=band),
        )
        for title, found in by.items()
    ]
    return draw_panels(panels, *size, **options)


def draw_panels(
    panels: Sequence[Panel], width: float, height: float, columns: int = 4, legend_columns: int = 4, **options: Any
) -> Figure:
    """Panels in rows, `columns` a row at most, with one legend below; options: for Figure.subplots."""
    from matplotlib.ticker import MaxNLocator

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    # Few panels are drawn wider, so that the legend below has room.
    figure = new_figure(width * max(columns, 3) + 0.5, height * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    pairs = list(zip(figure.axes, panels, strict=True))
    for i, (ax, panel) in enumerate(pairs):
        style_axes(ax, panel.grid, panel.title, panel.note)
        panel.draw(ax)
        for value, name in panel.levels:
            across = ax.axvline if panel.grid == "x" else ax.axhline
            across(value, **LEVEL, label=name or None)
        if panel.ticks:
            ax.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        elif panel.x in ("layer", "step"):
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.set_xlabel(panel.x, fontsize=8.5, color=MUTED)
        if i % columns == 0 or not options.get("sharey"):
            ax.set_ylabel(panel.y, fontsize=8.5, color=MUTED)
    # Last: setting a limit ends autoscaling, of every panel where they share an axis.
    for ax, panel in pairs:
        if panel.limits != (None, None):
            (ax.set_xlim if panel.grid == "x" else ax.set_ylim)(*panel.limits)
    legend(figure, legend_columns)
    return figure


@dataclass(frozen=True)
class Point:
    """A point of a plane, in percent; hollow: its marker is not filled."""

    name: str
    look: Look
    x: Estimate
    y: Estimate
    hollow: bool = False


def draw_plane(ax: Axes, points: Sequence[Point], level: tuple[float, float] = (math.nan, math.nan)) -> list[Any]:
    """Points with lines over their intervals, the later ones on top; returns their markers, for a legend.

    level: x and y, NaN where not known, of what the points are compared with: dashed lines. The axes have some air, are
    20 points wide at least (less would enlarge noise) and within the scale.
    """
    ax.axvline(level[0], zorder=2, **LEVEL)
    ax.axhline(level[1], zorder=2, **LEVEL)
    markers = []
    for i, point in enumerate(points):
        look, place = point.look, (point.x[0], point.y[0])
        reach = [[[max(0.0, v - low)], [max(0.0, high - v)]] for v, low, high in (point.x, point.y)]
        options: dict[str, Any] = {"fmt": "none", "ecolor": look.colour, "elinewidth": 1.3, "alpha": 0.6, "zorder": 3}
        ax.errorbar(*place, xerr=reach[0], yerr=reach[1], **options)
        markers += ax.plot(
            *place, look.marker, color=look.colour, markersize=10 if look.main else 7.5, zorder=4 + i / 100,
            markerfacecolor=PAPER if point.hollow else look.colour, markeredgewidth=1.8 if point.hollow else 0.9,
            label=plain_text(point.name),
        )  # fmt: skip
    for axis, at, estimates in (
        (ax.xaxis, level[0], [p.x for p in points]),
        (ax.yaxis, level[1], [p.y for p in points]),
    ):
        ends = [end for end in (at, *sum(estimates, ())) if not math.isnan(end)]
        low, high = min(ends, default=0.0), max(ends, default=100.0)
        pad = max(0.08 * (high - low), (20 - (high - low)) / 2, 1.0)
        axis.set_view_interval(max(-3.0, low - pad), min(103.0, high + pad), ignore=True)
        axis.set_ticks([tick for tick in axis.get_ticklocs() if -1e-9 <= tick <= 100 + 1e-9])
    return markers


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure as PNG, atomically, and return its path."""
    return replace_file(Path(path), png(figure, dpi))


def png(figure: Figure, dpi: int = 150) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()
