"""Charts: one palette, one style of axes, points that a legend names, lines over seeds, and PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spf.files import replace_file

Grid = Literal["x", "y", "both"]
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
        order = 4 if self.main else 3
        return {"color": self.colour, "linewidth": width, "dashes": self.dashes or (None, None), "zorder": order}

    def point(self, hollow: bool = False) -> dict[str, Any]:
        """Hollow: the marker is not filled. The large points lie below the others."""
        size, order = (10, 4) if self.main else (7.5, 5)
        edge = {"markerfacecolor": PAPER, "markeredgewidth": 1.8} if hollow else {"markeredgewidth": 0.9}
        return {"color": self.colour, "marker": self.marker, "markersize": size, "zorder": order, **edge}


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
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def style_axes(ax: Axes, grid: Grid, title: str = "", note: str = "", x: str = "", y: str = "") -> None:
    """Give axes the reports' look: no box, a light grid (x, y or both), muted ticks, a title at the left."""
    ax.set_facecolor("none")
    for side, spine in ax.spines.items():
        spine.set(visible=(side == "bottom" and grid != "x") or (side == "left" and grid == "both"), color=MUTED)
    ax.grid(True, axis=grid, color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=MUTED, labelsize=8.5, length=0)
    ax.set_title(plain_text(title), loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=9)
    ax.set_title(note, loc="right", fontsize=9, color=MUTED, pad=9)
    ax.set_xlabel(x, fontsize=9, color=MUTED)
    ax.set_ylabel(y, fontsize=9, color=MUTED)


def legend(figure: Figure, columns: int, place: str = "lower center", handles: Sequence[Any] | None = None) -> None:
    """One legend outside the axes: the handles given, or every name that the axes have, once."""
    if handles is None:
        named = ((n, h) for ax in figure.axes for h, n in zip(*ax.get_legend_handles_labels(), strict=True))
        handles = list(dict(named).values())
    if handles:
        look: dict[str, Any] = {"fontsize": 8.5, "frameon": False, "labelcolor": INK, "handlelength": 2.6}
        figure.legend(handles=list(handles), loc=f"outside {place}", ncols=columns, **look)  # type: ignore[call-overload]


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
    drawn = {}
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
        drawn[name] = list(shown), mean, ends
    return drawn


Style = Callable[[str], Mapping[str, Any]]
"""How a line of this name is drawn, for matplotlib; whose label begins with _ is in no legend."""


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
    ax: Axes, rows: Sequence[Row], style: Style, label: Callable[[str], str] = str, band: str = "range", form: str = ""
) -> None:
    """Horizontal bars of means with lines between the ends: a bar a line in the group of each x, if it has one there.

    form: of the value beside a bar.
    """
    groups, bars = list(dict.fromkeys(row[3] for row in rows)), over_seeds(rows, band)
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


def draw_plane(
    ax: Axes, rows: Iterable[Row], style: Style, label: Callable[[str], str] = str, band: str = "range"
) -> None:
    """A point a line, in percent, with lines over the intervals of its x and value, which are estimates.

    A row without a line is the level that the others are compared with: dashed lines, where it is not NaN. The axes
    have some air, are 20 points wide at least (less would enlarge noise) and within the scale.
    """
    reaches: tuple[list[float], list[float]] = ([], [])
    for _, name, _, *place in rows:
        for reach, ends in zip(reaches, place, strict=True):
            reach += [end for end in ends if not math.isnan(end)]
        (x, low, high), (y, bottom, top) = place
        if not name:
            ax.axvline(x, **LEVEL)
            ax.axhline(y, **LEVEL)
            continue
        (point,) = ax.plot(x, y, linestyle="", label=plain_text(label(name)), **style(name))
        thin: dict[str, Any] = {
            "fmt": "none",
            "ecolor": point.get_color(),
            "elinewidth": 1.3,
            "alpha": 0.6,
            "zorder": 3,
        }
        ax.errorbar(x, y, np.maximum([[y - bottom], [top - y]], 0), np.maximum([[x - low], [high - x]], 0), **thin)
    for axis, ends in zip((ax.xaxis, ax.yaxis), reaches, strict=True):
        low, high = min(ends, default=0.0), max(ends, default=100.0)
        pad = max(0.08 * (high - low), (20 - (high - low)) / 2, 1.0)
        axis.set_view_interval(max(-3.0, low - pad), min(103.0, high + pad), ignore=True)
        axis.set_ticks([tick for tick in axis.get_ticklocs() if -1e-9 <= tick <= 100 + 1e-9])


def draw_heat(
    ax: Axes, rows: Sequence[Row], style: Style, label: Callable[[str], str] = str, band: str = "range"
) -> None:
    """A row a line and a column an x, with the mean over the seeds as colour and number, in percent."""
    xs, lines = list(dict.fromkeys(row[3] for row in rows)), over_seeds(rows)
    means = [dict(zip(at, mean, strict=True)) for at, mean, _ in lines.values()]
    values = np.asarray([[of.get(x, math.nan) for x in xs] for of in means])
    ax.pcolormesh(values, cmap="YlOrRd", vmin=0, vmax=100, edgecolors=PAPER, linewidth=1.5)
    for (i, j), value in np.ndenumerate(values):
        text, ink = "–" if math.isnan(value) else f"{value:.0f}", PAPER if value > 60 else INK
        ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=8.5, color=ink)
    slanted: dict[str, Any] = {"rotation": 28, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(np.arange(len(xs)) + 0.5, [plain_text(str(x)) for x in xs], **slanted)
    ax.set_yticks(np.arange(len(lines)) + 0.5, [plain_text(label(name)) for name in lines])
    ax.set_ylim(len(lines), 0)
    ax.grid(False)
    ax.tick_params(colors=INK)
    ax.spines[:].set_visible(False)


@dataclass(frozen=True)
class Panel:
    """One set of axes. Levels and limits are those of the values, so of the x axis where the grid is "x"; ticks, at
    (dotted lines) and log (a logarithmic scale) are those of x."""

    title: str
    note: str = ""
    grid: Grid = "y"
    x: str = ""
    y: str = ""
    levels: Sequence[tuple[float, str]] = ()
    limits: tuple[float | None, float | None] = (None, None)
    ticks: Mapping[float, str] = field(default_factory=dict)
    at: Sequence[float] = ()
    log: bool = False
    draw: Callable[..., None] = draw_lines


def chart(
    rows: Iterable[Row], size: tuple[float, float], style: Style, label: Callable[[str], str] = str,
    band: str = "range", each: Mapping[str, Mapping[str, Any]] | None = None, columns: int = 4,
    legend_columns: int = 4, place: str = "lower center", sharey: bool = False, **common: Any,
) -> Figure:  # fmt: skip
    """Panels of this size, `columns` a row at most, with one legend at a place; panels and what is in them stand in
    the order of the rows. common, and `each` for one of them: a Panel's fields."""
    by: dict[str, list[Row]] = {}
    for row in rows:
        by.setdefault(row[0], []).append(row)
    columns = min(columns, len(by)) or 1
    down = math.ceil(len(by) / columns) or 1
    # Few panels are drawn wider, so that the legend below has room.
    figure = new_figure(size[0] * max(columns, 3) + 0.5, size[1] * down + 0.7)
    axes = figure.subplots(down, columns, squeeze=False, sharey=sharey)
    for ax in axes.flat[len(by) :]:
        ax.remove()
    panels = [Panel(**{"title": label(title), **common, **(each or {}).get(title, {})}) for title in by]
    shown = list(zip(figure.axes, panels, strict=True))  # what draws a panel may add axes, a colour bar's
    for i, ((ax, panel), mine) in enumerate(zip(shown, by.values(), strict=True)):
        y = "" if sharey and i % columns else panel.y
        style_axes(ax, panel.grid, panel.title, panel.note, panel.x, y)
        if panel.log:
            ax.set_xscale("log")
            ax.minorticks_off()
        panel.draw(ax, mine, style, label, band)
        for value, name in panel.levels:
            across = ax.axvline if panel.grid == "x" else ax.axhline
            across(value, **LEVEL, label=name or None)
        for value in panel.at:
            ax.axvline(value, color=MUTED, linewidth=0.8, linestyle=":")
        if panel.ticks:
            ax.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        elif panel.x in ("layer", "step"):
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    # Last: setting a limit ends autoscaling, of every panel where they share an axis.
    for ax, panel in shown:
        if panel.limits != (None, None):
            (ax.set_xlim if panel.grid == "x" else ax.set_ylim)(*panel.limits)
    legend(figure, legend_columns, place)
    return figure


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure as PNG, atomically, and return its path."""
    return replace_file(Path(path), png(figure, dpi))


def png(figure: Figure, dpi: int = 150) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()
