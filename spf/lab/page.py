"""What the reports share: colours and figures, pieces of an HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spf.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito (light page, dark page); the known arms of a report have fixed ones.
COLOURS = {
    "base": ("#6b7280", "#a3abb8"),
    "plain": ("#d55e00", "#ff8a3d"),
    "spf": ("#0072b2", "#4db2f0"),
    "paper": ("#b5568c", "#dd8fbd"),
}
MORE_COLOURS = (
    ("#00805c", "#2cc79a"),
    ("#a87b00", "#f0c24b"),
    ("#3f9bd1", "#8fd0f7"),
    ("#8a5a2b", "#cf9d6c"),
    ("#5b4bb5", "#a79bf0"),
)

# Inks of the figures; in the SVGs each is replaced by its CSS variable.
INK, MUTED, GRID, PAPER = "#1f2933", "#5f6b7a", "#e3e7ec", "#fefefe"

CSS = """
:root { color-scheme: light dark;
 --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
 --page: #f5f7f9; --card: #ffffff; --ink: #1f2933; --muted: #5f6b7a; --line: #e3e7ec; --soft: #eef6fb;
 --good: #00704f; --warn: #8a5a00; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #0f141a; --card: #171e26; --ink: #e6ebf0;
 --muted: #9aa7b5; --line: #2b3541; --soft: #14283a; --good: #3ecf9b; --warn: #efb84a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 0 0 .8rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .5rem; }
p { margin: 0 0 .8rem; } p:last-child { margin-bottom: 0; }
.sub, .note { color: var(--muted); font-size: .88rem; }
.sub { margin-bottom: 1.2rem; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.2rem;
 margin-bottom: 1rem; }
.verdict { border-left: 5px solid var(--good); } .verdict.warn { border-left-color: var(--warn); }
.verdict.bad { border-left-color: var(--bad); }
.verdict h2 { font-size: 1.25rem; margin-bottom: .4rem; }
.bars { list-style: none; margin: 1rem 0 0; padding: 0; display: grid; gap: .5rem;
 grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
.bars li { border: 1px solid var(--line); border-radius: 8px; padding: .55rem .7rem; font-size: .85rem;
 line-height: 1.4; }
.bars b { display: block; font-size: .92rem; } .bars span { color: var(--muted); }
.met { color: var(--good); } .unclear { color: var(--warn); } .missed { color: var(--bad); }
.unknown { color: var(--muted); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 1rem; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(290px, 100%), 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; display: block; } .loss { max-width: 660px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
 white-space: nowrap; }
th { color: var(--muted); font-weight: 600; font-size: .82rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
tr:last-child td { border-bottom: 0; } tr.main td { background: var(--soft); font-weight: 600; }
td small { display: block; color: var(--muted); font-weight: 400; font-size: .78rem; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin-bottom: .8rem; font-size: .85rem; }
.legend svg { display: inline-block; width: 30px; height: 10px; margin-right: .4rem; vertical-align: middle; }
.example { border-top: 1px solid var(--line); padding: .8rem 0; } .example > p { font-weight: 600; }
.example p, .answer { overflow-wrap: anywhere; white-space: pre-wrap; font-size: .9rem;
 margin-bottom: .5rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr));
 gap: .6rem; }
.answers > div { border: 1px solid var(--line); border-radius: 8px; padding: .55rem .7rem; }
.answers > div.main { background: var(--soft); }
.who { color: var(--muted); font-size: .78rem; font-weight: 600; margin-bottom: .2rem; }
.answer { margin: 0; }
summary { cursor: pointer; font-weight: 600; font-size: .95rem; padding: .3rem 0; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 8px; padding: .7rem;
 margin: 0 0 1rem; overflow-x: auto; font-size: .85rem; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .25rem 1rem; margin: 0;
 font-size: .88rem; } dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def join_words(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {value_text(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def plain_text(text: str) -> str:
    """Return text that matplotlib draws as it is (no math mode)."""
    return text.replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def style_axes(ax: Axes, grid: str) -> None:
    """Give axes the page's look: no box, a light grid, muted ticks."""
    ax.set_facecolor("none")
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(side in ("left", "bottom") and grid == "both")
        ax.spines[side].set_color(MUTED)
        ax.spines[side].set_linewidth(0.8)
    if grid == "y":
        ax.spines["bottom"].set_visible(True)
    ax.grid(True, axis="both" if grid == "both" else "x" if grid == "x" else "y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=MUTED, labelsize=8.5, length=0)


def title_axes(ax: Axes, text: str, note: str = "") -> None:
    ax.set_title(plain_text(text), loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=9)
    if note:
        ax.set_title(note, loc="right", fontsize=9, color=MUTED, pad=9)


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def html_section(title: str, body: str, note: str = "") -> str:
    if not body:
        return ""
    tail = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{body}{tail}</section>"


def html_table(head: Iterable[str], rows: Iterable[tuple[bool, Sequence[str]]]) -> str:
    """Return a table; ``head`` is text, the cells of ``rows`` are HTML, and True marks the emphasised row."""
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    lines = [
        f"<tr class='{'main' if main else ''}'>{''.join(f'<td>{c}</td>' for c in cells)}</tr>" for main, cells in rows
    ]
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def html_pairs(items: Mapping[str, Any]) -> str:
    """Return a list of names, their underscores as spaces, and values."""
    cells = "".join(
        f"<dt>{escape(str(k).replace('_', ' '))}</dt><dd>{escape(value_text(v))}</dd>" for k, v in items.items()
    )
    return f"<dl>{cells}</dl>"


def html_image(path: Path, said: str) -> str:
    """Return a figure that holds the PNG file itself; ``said`` is its text for who cannot see it."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<figure><img alt="{escape(said)}" src="data:image/png;base64,{data}"></figure>'


def html_page(title: str, body: str, css: str = "") -> str:
    """Return a whole page without scripts; its Content-Security-Policy lets nothing be loaded from elsewhere."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f"<style>{CSS}{css}</style></head><body><main>{body}</main></body></html>\n"
    )


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure as PNG, atomically, and return its path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return replace_file(Path(path), buffer.getvalue())
