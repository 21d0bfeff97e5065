"""Tables as data, and one function for each place where they are shown: terminal, Markdown; pages have a template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.text import Text

SIGNS = {"met": "✓", "unclear": "≈", "missed": "✗", "unknown": "–"}
"""How a status is marked; the page's style sheet has a colour for each."""


@dataclass(frozen=True)
class Cell:
    """A cell: its text, small print below it, a status of SIGNS (or ""), the colour of a dot before it (or "")."""

    text: str
    notes: tuple[str, ...] = ()
    status: str = ""
    dot: str = ""

    @property
    def line(self) -> str:
        """The text in one line, with the sign of its status."""
        return f"{SIGNS[self.status]} {self.text}" if self.status else self.text


@dataclass(frozen=True)
class Table:
    """Head and rows; `main` are the rows that are emphasised, `words` the columns that hold text, not numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    main: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset({0})


def of_text(head: Sequence[str], rows: Iterable[Sequence[str]], emphasised: str | None = None) -> Table:
    """A table of plain text; the rows whose first cell is `emphasised` are."""
    made = [[Cell(text) for text in row] for row in rows]
    return Table(head, made, frozenset(i for i, row in enumerate(made) if row[0].text == emphasised))


def transposed(table: Table) -> Table:
    head = ["", *(row[0].text for row in table.rows)]
    return Table(head, [[Cell(name), *(row[i] for row in table.rows)] for i, name in enumerate(table.head) if i])


def markdown_table(table: Table) -> str:
    """The table in Markdown, without small print; "" where it has no rows."""
    if not table.rows:
        return ""
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *([c.text for c in row] for row in table.rows)]
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)


def rich_table(table: Table, title: str = "", caption: str = "") -> rich.table.Table:
    """The table for the terminal, small print in further lines of a cell."""
    shown = rich.table.Table(title=title or None, caption=caption or None)
    for i, name in enumerate(table.head):
        shown.add_column(
            name, justify="left" if i in table.words else "right", min_width=None if i else 12, overflow="fold"
        )
    for i, row in enumerate(table.rows):
        texts = [Text(cell.line, style="bold" if i in table.main else "") for cell in row]
        for text, cell in zip(texts, row, strict=True):
            for note in cell.notes:
                text.append(f"\n{note}", style="not bold dim")
        shown.add_row(*texts)
    return shown


def signed(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "−")


def join_words(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def value_text(value: Any, digits: int = 6) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {value_text(v, digits)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(v, digits) for v in value)
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
