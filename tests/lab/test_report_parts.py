"""What the three reports share: charts, tables, pages."""

import io
import math

import jinja2
import pytest
from rich.console import Console

from spf.lab.report.charts import chart, draw_bars, draw_heat, draw_plane, new_figure, smooth
from spf.lab.report.page import Picture, write_page
from spf.lab.report.tables import Cell, Table, markdown_table, of_text, rich_table, transposed


@pytest.mark.parametrize("sharey", [False, True])
def test_panels_show_everything_that_is_drawn_in_them(sharey):
    """A limit set on the first panel would cut the others, which share its axis."""
    rows = [(f"p{i}", "a", 0, x, x * 10.0**i) for i in range(3) for x in (0, 1)]
    figure = chart(rows, (2, 2), lambda name: {"color": "k"}, sharey=sharey)
    for i, ax in enumerate(figure.axes):
        low, high = ax.get_ylim()
        assert low <= 0
        assert high >= 10**i
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a"]


def band(ax):
    """The ends of the band at each x."""
    [shape] = ax.collections
    places = shape.get_paths()[0].vertices.round(6)
    return {x: (min(ys), max(ys)) for x in places[:, 0] if (ys := places[places[:, 0] == x, 1]).size}


@pytest.mark.parametrize(("kind", "ends"), [("range", (2, 4)), ("sd", (1.585786, 4.414214)), ("none", None)])
def test_a_line_is_the_mean_of_its_seeds_where_all_have_a_value(kind, ends):
    seeds = ((1, 2), (5, 4, 9))
    rows = [("p", "a", seed, x, value) for seed, values in enumerate(seeds) for x, value in enumerate(values)]
    [ax] = chart([*rows, ("p", "b", 0, 0, 7.0)], (2, 2), lambda name: {}, band=kind).axes
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[0, 3], [1, 3]], [[0, 7]]]
    assert (band(ax)[1.0] if ax.collections else None) == ends


def test_of_one_seed_the_band_is_the_interval():
    [ax] = chart([("p", "a", 0, x, (2.0, 1.0, 4.0)) for x in (0, 1)], (2, 2), lambda name: {}).axes
    assert band(ax)[1.0] == (1.0, 4.0)


def test_a_running_mean_keeps_the_mean_of_a_line_and_its_length():
    assert smooth([1.0, 5.0]) == [1.0, 5.0]
    assert smooth([float(i) for i in range(60)])[2:-2] == [float(i) for i in range(2, 58)]


def test_bars_stand_beside_each_other_in_their_group():
    ax = new_figure(3, 3).subplots()
    rows = [("", "a", 0, "x", (1.0, 0.5, 2.0)), ("", "b", 0, "y", 2.0), ("", "b", 1, "y", 4.0)]
    draw_bars(ax, rows, lambda name: {"color": "k"}, form="%.1f")
    places = {bar.get_width(): bar.get_y() + bar.get_height() / 2 for bar in ax.patches}
    assert places == {1.0: pytest.approx(-0.2), 3.0: pytest.approx(1.2)}
    ends = [line.vertices[:, 0].tolist() for lines in ax.collections for line in lines.get_paths()]
    assert ends == [[0.5, 2.0], [2.0, 4.0]]  # an interval, and the range of seeds
    assert [text.get_text() for text in ax.texts] == ["1.0", "3.0"]


def test_a_plane_holds_every_point_and_its_interval():
    ax = new_figure(3, 3).subplots()
    rows = [("", n, 0, (x, x - 9, x + 9), (5.0, 0.0, 9.0)) for n, x in (("a", 50.0), ("b", 91.0))]
    level = ("", "", 0, (10.0, 10.0, 10.0), (math.nan, math.nan, math.nan))
    draw_plane(ax, [*rows, level], lambda name: {"color": "k", "marker": "o"})
    assert ax.get_legend_handles_labels()[1] == ["a", "b"]
    ends = [line.vertices.tolist() for lines in ax.collections for line in lines.get_paths()]
    assert ends[:2] == [[[41, 5], [59, 5]], [[50, 0], [50, 9]]]
    assert ax.get_xlim()[0] < 10
    assert 100 <= ax.get_xlim()[1] <= 103
    assert ax.get_ylim()[1] - ax.get_ylim()[0] >= 18  # 20 points, less what is below the scale
    assert all(0 <= tick <= 100 for tick in (*ax.get_xticks(), *ax.get_yticks()))


def test_heat_has_a_number_for_every_line_and_x_and_a_dash_where_nothing_is_known():
    ax = new_figure(3, 3).subplots()
    rows = [("", "a", seed, "x", value) for seed, value in enumerate((2.0, 4.0))] + [("", "b", 0, "first", 90.0)]
    draw_heat(ax, rows, lambda name: {})
    said = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    assert said == {(0.5, 0.5): "3", (1.5, 0.5): "–", (0.5, 1.5): "–", (1.5, 1.5): "90"}
    assert [tick.get_text() for tick in (*ax.get_xticklabels(), *ax.get_yticklabels())] == ["x", "first", "a", "b"]
    assert ax.get_ylim() == (2, 0)


def test_what_draws_a_panel_may_add_axes():
    def draw(ax, *content):
        ax.figure.add_axes([0, 0, 0.1, 0.1])

    figure = chart([("p", "a", 0, 0, 1.0)], (2, 2), lambda name: {}, draw=draw, limits=(0, 7))
    assert [ax.get_ylim() for ax in figure.axes] == [(0, 7), (0, 1)]


def test_a_chart_of_nothing_is_empty():
    assert chart([], (2, 2), lambda name: {}).axes == []


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
