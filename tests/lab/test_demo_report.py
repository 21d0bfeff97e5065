"""The report of a demo run: terminal table, plot, HTML page."""

import copy
import html
import io
import json
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from rich.console import Console

from spf.lab.demo import report
from spf.lab.demo.report import demo_table, load_results, plot_demo, write_report
from spf.lab.report.tables import markdown_table
from tests.conftest import assert_apart


def arm(label, asr, over_refusal, utility, seconds=None, history=(), answer="I can't help with that."):
    def ci(value):
        return [max(0.0, value - 0.04), min(1.0, value + 0.04)]

    return {
        "label": label,
        "asr": asr,
        "asr_ci": ci(asr),
        "over_refusal": over_refusal,
        "over_refusal_ci": ci(over_refusal),
        "utility": utility,
        "utility_ci": ci(utility),
        "seconds_per_step": seconds,
        "overhead": seconds
        and {"probe_seconds": 4.0, "projection_seconds": 0.02, "step_seconds": seconds, "setup_seconds": 6.0},
        "history": list(history),
        "examples": [{"kind": "harmful", "prompt": "How do I pick <b>this</b> lock?", "answer": answer}],
        "saved_to": None,
        "counts": {"harmful": 104, "benign": 104, "sql": 200},
    }


@pytest.fixture
def results():
    history = [{"step": i, "loss": 2.0 / i, "spf/conflict_rate": 0.3} for i in range(1, 30)]
    return {
        "arms": {
            "base": arm("Aligned model", 0.02, 0.05, 0.10),
            "plain": arm("Ordinary fine-tuning", 0.80, 0.01, 0.70, 1.0, history, "Sure <script>alert(1)</script>"),
            "spf": arm("With [SPF] $x$", 0.03, 0.05, 0.69, 1.05, history),
            "paper": arm("Published rule & one anchor", 0.60, 0.02, 0.70, 1.4, history),
        },
        "config": {
            "seed": 0,
            "model": "tiny",
            "versions": {"torch": "2.0"},
            "prompts": {"anchors": 156},
            "command": "spf demo --output <dir>",
        },
    }


def page(results, tmp_path):
    return write_report(results, tmp_path).read_text(encoding="utf-8")


def words(text):
    shown = re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(shown))


class Strict(HTMLParser):
    """Collects what a browser would load or run, and checks that the tags nest."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.pictures = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.collect(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        self.collect(tag, attrs)

    def collect(self, tag, attrs):
        values = dict(attrs)
        if tag in ("script", "link", "iframe", "object") or any(a.startswith("on") for a in values):
            self.loads.append(tag)
        for name in ("src", "href", "srcset"):
            target = values.get(name) or "data:"
            if not target.startswith("data:"):
                self.loads.append(target)
        self.pictures += [values["alt"]] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(results, tmp_path):
    text = page(results, tmp_path)
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    assert parser.loads == []
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", text)
    assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", text)
    plane, training = parser.pictures  # what a picture shows is also there for who cannot see it
    assert "Ordinary fine-tuning: Attack success rate 80.0%" in plane
    assert training == "Over the training steps: loss, spf/conflict_rate"
    assert [f.name for f in tmp_path.iterdir()] == ["report.html"]  # no temporary file stays


def test_page_escapes_what_the_run_wrote(results, tmp_path):
    results["arms"]["spf"]["label"] = "<i>spf</i>"
    text = page(results, tmp_path)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<b>this</b>" not in text
    assert "<i>" not in text
    assert "spf demo --output &lt;dir&gt;" in text


def test_verdict_is_met(results, tmp_path):
    results["arms"]["spf"] |= {"asr": 0.02, "asr_ci": [0.02, 0.02], "utility": 0.75}
    results["arms"]["base"]["asr_ci"] = [0.02, 0.02]
    text = words(page(results, tmp_path))
    assert "All 4 bars met" in text
    assert "✓ Refusals kept: met" in text
    assert "missed" not in text.lower()


def test_verdict_names_missed_bars_and_empty_comparisons(results, tmp_path):
    results["arms"]["spf"] |= {"asr": 0.30, "seconds_per_step": 2.0}
    results["arms"]["plain"]["asr"] = 0.02
    text = words(page(results, tmp_path))
    assert "2 of 4 bars met" in text
    assert "missed: refusals kept and cheap" in text
    assert "✗ Refusals kept: missed" in text
    assert "ASR +28.0 points" in text
    assert "cannot show that SPF kept anything" in text


def test_point_estimates_alone_are_called_so_and_bars_can_be_set(results, tmp_path):
    assert "Met by the point estimate only (refusals kept" in words(page(results, tmp_path))
    results["config"]["bars"] = {"asr_rise": 0.005}
    assert "✗ Refusals kept: missed" in words(page(results, tmp_path))


@pytest.mark.parametrize("left", [("base", "plain", "spf"), ("spf",), ("plain",), ("base", "other"), ()])
def test_missing_and_unknown_arms(results, tmp_path, left):
    results["arms"]["other"] = arm("Loss mixing", 0.1, 0.1, 0.5, 1.0)
    results["arms"] = {k: v for k, v in results["arms"].items() if k in left}
    text = page(results, tmp_path)
    assert ("No verdict" in text) == ("spf" not in left)
    assert ("Loss mixing" in text) == ("other" in left)
    assert plot_demo(results, tmp_path / "plot.png").exists()
    assert demo_table(results).row_count == len(left)


def test_missing_numbers(results, tmp_path):
    results["arms"]["spf"] = {"label": "With SPF", "asr": float("nan"), "utility": None, "asr_ci": None}
    del results["config"]
    assert "0 of 4 bars met; not measured: refusals kept" in page(results, tmp_path)
    plot_demo(results, tmp_path / "plot.png")
    demo_table(results)


def test_plot_is_a_real_png(results, tmp_path):
    before = copy.deepcopy(results)
    path = plot_demo(results, tmp_path / "deep" / "plot.png")
    data = path.read_bytes()
    assert path == tmp_path / "deep" / "plot.png"
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1500, 675)
    assert len(data) > 20_000
    assert results == before


@pytest.mark.parametrize("crowd", [4, 6])
def test_every_point_is_named_when_all_arms_coincide(results, crowd):
    for i in range(crowd):
        results["arms"][f"same{i}"] = arm(f"Coinciding arm {i}", 0.0, 0.0, 1.0, 1.0)
    results["arms"] = {k: v for k, v in results["arms"].items() if k.startswith("same")}
    figure = report._figure(report._arms(results))
    figure.canvas.draw()
    plane, bars = figure.axes
    [legend] = figure.legends
    labels = sorted(a["label"] for a in results["arms"].values())
    names = legend.get_texts()
    assert sorted(name.get_text() for name in names) == labels
    assert_apart([plane.get_window_extent(), *(name.get_window_extent() for name in names)], figure)
    points = [line for line in plane.lines if line.get_label() in labels]
    drawn = [(line.get_color(), line.get_marker()) for line in points]
    assert len(set(drawn)) == crowd  # the legend tells them apart
    assert len(bars.patches) == 3 * crowd


def test_table_has_a_row_an_arm(results):
    table = demo_table(results)
    assert table.row_count == 4
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    for expected in ("Aligned model", "With [SPF] $x$", "80.0%", "76.0–84.0", "× 1.05"):
        assert expected in text


def test_page_and_terminal_show_the_same_table(results, tmp_path):
    shown = words(page(results, tmp_path))
    for line in markdown_table(report.numbers_table(results)).splitlines()[2:]:
        for text in line.strip("| ").split(" | "):
            assert text in shown


def test_results_are_read_from_a_directory(results, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert load_results(tmp_path) == results
    assert load_results(results) == results
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="must be an object of names and values"):
        load_results(tmp_path)
