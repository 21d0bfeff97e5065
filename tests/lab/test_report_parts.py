"""What the three reports share: charts, tables, pages."""

import io

import jinja2
import pytest
from rich.console import Console

from spf.lab.report.charts import Panel, draw_panels, draw_seeds
from spf.lab.report.page import Picture, write_page
from spf.lab.report.tables import Cell, Table, markdown_table, of_text, rich_table, transposed


@pytest.mark.parametrize("sharey", [False, True])
def test_panels_show_everything_that_is_drawn_in_them(sharey):
    """A limit set on the first panel would cut the others, which share its axis."""
    panels = [Panel(f"p{i}", lambda ax, i=i: draw_seeds(ax, [0, 1], [[0, 10.0**i]], "k", label="a")) for i in range(3)]
    figure = draw_panels(panels, 2, 2, sharey=sharey)
    for i, ax in enumerate(figure.axes):
        low, high = ax.get_ylim()
        assert low <= 0
        assert high >= 10**i
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a"]


def test_a_table_is_the_same_in_every_place(tmp_path):
    rows = [[Cell("a|<b>"), Cell("1.5", ("0.1–2.9",), "met")], [Cell("c"), Cell("2")]]
    table = Table(["name", "share"], rows, frozenset({0}))
    assert markdown_table(table).splitlines()[2] == "| a\\|<b> | 1.5 |"
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(rich_table(table))
    said = console.export_text()
    content = dict.fromkeys(("introduction", "headline", "tone", "bar_note", "subtitle", "title"), "<i>")
    page = write_page("bench", tmp_path / "p.html", bars=table, columns={}, notes=[], parts=[], lacking=[], **content)
    html = page.read_text("utf-8")
    for text in ("1.5", "0.1–2.9", "✓"):
        assert text in said
        assert text in html
    assert "a|&lt;b&gt;" in html
    assert "<i>" not in html
    assert transposed(of_text(["", "x", "y"], [["p", "1", "2"]])).rows[1] == [Cell("y"), Cell("2")]


def test_what_a_template_lacks_is_an_error_and_nothing_is_written(tmp_path):
    with pytest.raises(jinja2.UndefinedError):
        write_page("bench", tmp_path / "p.html", title="t", subtitle="")
    assert not list(tmp_path.iterdir())


def test_pictures_are_in_the_page_itself():
    assert Picture("said", b"\x89PNG").source == "data:image/png;base64,iVBORw=="
