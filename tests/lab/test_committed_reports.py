"""The committed results, reported again: the same figures, on pages that fit a telephone and a desk.

python -m tests.lab.test_committed_reports writes the figures of demo and study as they are now.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from spf.lab.bench import report as bench
from spf.lab.demo import report as demo
from spf.lab.study import report as study
from tests.lab import browser

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STUDIES = {"matched": [f"matched-{i}.json" for i in range(3)], "parity": [f"parity-{i}.json" for i in range(3)]}
MEASURES = ("alignment", "baseline", "finetuning")


def read(path):
    return json.loads((RESULTS / path).read_text("utf-8"))


def lines(title, table):
    """A table as text, small print included."""
    rows = [" | ".join(cell.line + "".join(f" ({n})" for n in cell.notes) for cell in row) for row in table.rows]
    return [f"## {title}", "", " | ".join(table.head), *rows, ""]


def demo_figures():
    results = read("demo/results.json")
    checks = [f"{c.name}: {c.status}, {c.measured}, asked: {c.asked}" for c in demo._checks(results)]
    tables = lines("Numbers", demo.numbers_table(results)) + lines("Overhead", demo.overhead_table(results))
    return "\n".join([*tables, "## Bars", "", *checks, ""])


def study_figures():
    text = []
    for name, paths in STUDIES.items():
        many = [read(f"study/{path}") for path in paths]
        text += lines(f"{name}: claims", study.claims_table([study.claims(r) for r in many]))
        text += lines(f"{name}: models", study.summary_table([r["measurements"] for r in many]))
        for reading in study.READINGS:
            text += lines(f"{name}: {reading}", study.success_table(many, reading))
        text += lines(f"{name}: data", study.data_table(many))
    for name in MEASURES:
        run = read(f"study/demo_model/{name}/results.json")["measurements"]
        text += lines(f"{name}: models", study.summary_table([run]))
        text += lines(f"{name}: gradients", study.gradient_table([run])) if run.get("gradients") else []
    return "\n".join(text)


FIGURES = {"demo": demo_figures, "study": study_figures}


@pytest.mark.parametrize("name", FIGURES)
def test_demo_and_study_show_the_figures_that_are_committed(name):
    assert FIGURES[name]() == (RESULTS / name / "figures.txt").read_text("utf-8")


@pytest.mark.parametrize("name", ["safety_utility", "second_model"])
def test_the_benchmarks_tables_are_those_that_are_committed(name, tmp_path, monkeypatch):
    shutil.copytree(RESULTS / name, tmp_path / name)
    for plot in ("plot_pareto", "plot_curves", "plot_jailbreaks"):  # the slow part; what is committed stands for it
        monkeypatch.setattr(bench, plot, lambda part, path, *methods: path if path.is_file() else None)
    markdown, *_ = bench.write_bench_report(tmp_path / name)
    # what was not run grows with every new scenario and is no figure
    for file in (markdown.name, "report.html"):
        now, then = (words((path / file).read_text("utf-8")) for path in (tmp_path / name, RESULTS / name))
        assert "Not run" in now
        assert now.split("Not run")[0] == then.split("Not run")[0]


def words(page):
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


NO_BROWSER = "no chromium or google-chrome here: the width of the pages is not measured"
in_browser = pytest.mark.skipif(not browser.CHROMIUM, reason=NO_BROWSER)
PAGES = {
    "demo": lambda directory: demo.write_report(read("demo/results.json"), directory),
    "bench": lambda directory: bench.write_bench_report(shutil.copytree(RESULTS / "second_model", directory))[1],
    "study": lambda directory: study.write_report([read(f"study/{p}") for p in STUDIES["matched"]], directory),
}


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_their_window(name, tmp_path):
    page = PAGES[name](tmp_path / name)
    assert {width: browser.needed_width(page, width) for width in browser.WIDTHS} == {w: w for w in browser.WIDTHS}


@in_browser
def test_a_page_that_does_not_fit_is_noticed(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<!doctype html><meta charset="utf-8"><div style="width:700px">"wide"</div>', "utf-8")
    assert [browser.needed_width(page, width) for width in browser.WIDTHS] == [708, 1280]


if __name__ == "__main__":
    for name, figures in FIGURES.items():
        (RESULTS / name / "figures.txt").write_text(figures(), "utf-8")
