"""Charts: one palette, one style of axes, points that a legend names, lines over seeds, and PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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


def count_steps(ax: Axes, name: str) -> None:
    """Whole numbers on the x axis, and what they count."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel(name, fontsize=8.5, color=MUTED)


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


def draw_seeds(ax: Axes, xs: Sequence[float], many: Sequence[Sequence[float]], colour: str, **options: Any) -> None:
    """The mean over seeds as a line, their range as a band."""
    values = np.asarray(many, dtype=float)
    ax.plot(xs, values.mean(0), color=colour, **{"linewidth": 1.6, "marker": "o", "markersize": 3, **options})
    if len(values) > 1:
        ax.fill_between(xs, values.min(0), values.max(0), color=colour, alpha=0.16, linewidth=0)


@dataclass
class Panel:
    """One set of axes: `draw` puts the content into it; limits, names of the axes and levels come after."""

    title: str
    draw: Callable[[Axes], Any]
    note: str = ""
    grid: str = "y"
    x: str = ""
    y: str = ""
    levels: Sequence[tuple[float, str]] = ()
    limits: tuple[float | None, float | None] = (None, None)
    ticks: Mapping[float, str] = field(default_factory=dict)


def draw_panels(
    panels: Sequence[Panel], width: float, height: float, columns: int = 4, legend_columns: int = 4, **options: Any
) -> Figure:
    """Panels in rows, `columns` a row at most, with one legend below; what is left over of the last row is hidden."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    # Few panels are drawn wider, so that the legend below has room.
    figure = new_figure(width * max(columns, 3) + 0.5, height * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for i, ax in enumerate(axes.flat):
        if i >= len(panels):
            ax.remove()
            continue
        panel = panels[i]
        style_axes(ax, panel.grid, panel.title, panel.note)
        panel.draw(ax)
        for level, name in panel.levels:
            ax.axhline(level, color=INK if name else MUTED, linewidth=1.1, dashes=(4, 3), label=name or None)
        if panel.ticks:
            ax.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        if panel.x in ("layer", "step"):
            count_steps(ax, panel.x)
        ax.set_xlabel(panel.x, fontsize=8.5, color=MUTED)
        if i % columns == 0 or not options.get("sharey"):
            ax.set_ylabel(panel.y, fontsize=8.5, color=MUTED)
    # Last: setting a limit ends autoscaling, of every panel where they share an axis.
    for ax, panel in zip(figure.axes, panels, strict=True):
        if panel.limits != (None, None):
            ax.set_ylim(*panel.limits)
    legend(figure, legend_columns)
    return figure


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure as PNG, atomically, and return its path."""
    return replace_file(Path(path), png(figure, dpi))


def png(figure: Figure, dpi: int = 150) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()
