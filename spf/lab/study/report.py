"""The study's report: PNG figures and one HTML page, from the JSON of a run, of several seeds, or of a measure."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from spf.files import replace_file
from spf.lab.page import (
    COLOURS,
    INK,
    MORE_COLOURS,
    MUTED,
    escape,
    html_image,
    html_page,
    html_pairs,
    html_section,
    html_table,
    new_figure,
    save_figure,
    style_axes,
    title_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = Mapping[str, Any]

LABELS = {
    "base": "before",
    "instruct-medium": "instructions only (baseline)",
    "ssft-medium": "SSFT, medium rate",
    "dpo-medium": "DPO, medium rate",
    "unlearning-medium": "unlearning, medium rate",
    "ssft-small": "SSFT, small rate",
    "dpo-small": "DPO, small rate",
    "unlearning-small": "unlearning, small rate",
    "safe": "safe",
    "unsafe": "unsafe",
    "jb_co_task": "JB-CO-Task",
    "jb_co_text": "JB-CO-Text",
    "jb_misgen_tokens": "JB-MisGen, tokens",
    "jb_misgen_text": "JB-MisGen, text",
    "jb_misgen_both": "JB-MisGen, both",
    "new_operators": "new operators",
}
"""What models and sets are called in figures and tables; others keep the names they have."""

PROTOCOLS = ("ssft", "dpo", "unlearning")
SET_COLOURS = {"safe": COLOURS["spf"][0], "unsafe": COLOURS["plain"][0]}
FEW_LAYERS = 6
"""Up to so many layers each gets its own histogram; of deeper models four evenly spaced ones do."""


def label(key: str) -> str:
    return LABELS.get(key, key)


def _set_colour(name: str, names: Sequence[str]) -> str:
    others = [n for n in names if n not in SET_COLOURS]
    return SET_COLOURS.get(name) or MORE_COLOURS[others.index(name) % len(MORE_COLOURS)][0]


def _model_colour(name: str, names: Sequence[str]) -> str:
    palette = [COLOURS["base"][0], COLOURS["paper"][0], *(pair[0] for pair in MORE_COLOURS), "#c23b22", "#111111"]
    return palette[list(names).index(name) % len(palette)]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _models(run: Run) -> list[str]:
    return list(run["models"])


def _sets(run: Run) -> list[str]:
    """Sets that every model was measured on (an attack's prompts are a model's own)."""
    return [n for n in run["models"]["base"]["tau"][0] if all(n in m["tau"][0] for m in run["models"].values())]


def _spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the sample standard deviation over seeds where there are several."""
    text = f"{_mean(values):.{digits}g}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.2g}"


# ------------------------------------------------------------------------------------------------- one figure a claim


def gap(run: Run, model: str, layer: int = -1) -> float:
    """Mean tau of safe less that of unsafe prompts."""
    found = run["models"][model]["tau"][layer]
    return float(found["safe"]["mean"] - found["unsafe"]["mean"])


def share(run: Run, update: str) -> tuple[float, float]:
    """Energy of an update outside W's column space, mean over the first MLP matrices; and chance."""
    found = [m for m in run["updates"][update]["matrices"] if m["kind"] not in ("down_proj", "c_proj")]
    if not found:
        return math.nan, math.nan
    return _mean([m["share"] for m in found]), _mean([m["chance_share"] for m in found])


def gain_ratio(run: Run, update: str) -> float:
    """How much more an update answers to unsafe than to safe inputs: ratio of mean ||dW a||/||a||, mean over layers."""
    ratios = [
        rows["sets"]["unsafe"]["gain"]["mean"] / rows["sets"]["safe"]["gain"]["mean"]
        for kinds in run["updates"][update]["rows"]
        for rows in kinds.values()
    ]
    return _mean(ratios) if ratios else math.nan


def summary_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of all models: one line each, mean and spread over the seeds."""
    head = [
        "Model", "τ gap, last layer", "right side", "Lipschitz, safe", "Lipschitz, unsafe", "outside W (chance)",
        "unsafe/safe gain", "|ΔW| / |W|",
    ]  # fmt: skip
    rows = []
    for name in _models(runs[0]):
        tuned = name != "base"
        models = [run["models"][name] for run in runs]
        shares = [share(run, name) for run in runs] if tuned else []
        rows.append(
            [
                label(name),
                _spread([gap(run, name) for run in runs]),
                _spread([100 * _mean([s["side_accuracy"] for s in m["separation"]]) for m in models]) + " %",
                *(_spread([m["lipschitz"][s]["mean"] for m in models]) for s in ("safe", "unsafe")),
                f"{_spread([s for s, _ in shares])} ({_mean([c for _, c in shares]):.3g})" if tuned else "",
                _spread([gain_ratio(run, name) for run in runs]) if tuned else "",
                _spread([run["updates"][name]["relative_size"] for run in runs]) if tuned else "",
            ]
        )
    return head, rows


COLUMNS = (
    ("τ gap", "mean τ of safe less that of unsafe prompts, at the last layer; 0 where there are no clusters"),
    ("right side", "share of prompts on their own side of τ = 0, mean over layers; 50 % is guessing"),
    ("Lipschitz", "how steep the top logit is in the prompt's embeddings"),
    (
        "outside W",
        "share of the update's energy outside the column space of W, first MLP matrices; in brackets, chance",
    ),
    ("unsafe/safe gain", "how much more the update answers to unsafe than to safe inputs; 1 is no difference"),
    ("|ΔW| / |W|", "size of the update of the MLPs"),
)


def measure_table(results: Run) -> Table:
    """The table of `spf study measure` for the terminal."""
    head, rows = summary_rows([results["measurements"]])
    table = Table(title=f"Before: {results['aligned']}")
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row[0], justify="right")
    for i, name in enumerate(head[1:], 1):
        table.add_row(name, *(row[i] for row in rows))
    return table


# -------------------------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """One claim of the paper in one run: what is claimed, what was measured, and whether it shows here."""

    topic: str
    text: str
    measured: str
    holds: bool


def claims(results: Run) -> list[Claim]:
    """The paper's claims held against one run of the synthetic world."""
    run = results["measurements"]
    mediums = [f"{p}-medium" for p in PROTOCOLS if f"{p}-medium" in run["models"]]
    found = _behaviour_claims(results.get("evaluation", {}), mediums)
    gaps = {name: gap(run, name) for name in run["models"]}
    base = run["models"]["base"]["lipschitz"]
    for name in mediums:
        text = f"{label(name)}: pulls safe and unsafe apart (τ gap, last layer)"
        found.append(_above("O1 clusters", text, gaps[name], gaps["base"]))
        if (small := name.replace("medium", "small")) in gaps:
            found.append(
                _above("O1 clusters", f"{label(name)}: larger τ gap than at the small rate", gaps[name], gaps[small])
            )
    if len(mediums) == len(PROTOCOLS):
        values = [gaps[name] for name in mediums]
        found.append(_ascending("O1 clusters", "τ gap: SSFT < DPO < unlearning", values))
    for name in mediums:
        tau = run["models"][name]["tau"][-1]
        for jailbreak in (s for s in tau if s.startswith("jb_")):
            values = [tau[s]["mean"] for s in ("unsafe", jailbreak, "safe")]
            found.append(_ascending("O5 jailbreaks", f"{label(name)}: τ of {label(jailbreak)} lies between", values))
    for name in mediums:
        steep = run["models"][name]["lipschitz"]
        before, after = base["safe"]["mean"], steep["safe"]["mean"]
        text = f"{label(name)}: rises for safe"
        found.append(Claim("O4 steepness", text, f"{before:.3g} to {after:.3g}", after > before))
        before, after = base["unsafe"]["mean"], steep["unsafe"]["mean"]
        text = f"{label(name)}: falls for unsafe"
        found.append(Claim("O4 steepness", text, f"{before:.3g} to {after:.3g}", after < before))
    for name in mediums:
        outside, chance = share(run, name)
        found.append(_above("O2 null space", f"{label(name)}: ΔW is outside span(W) more than chance", outside, chance))
        ratio = gain_ratio(run, name)
        found.append(_above("O3 row space", f"{label(name)}: ΔW answers more to unsafe inputs", ratio, 1.0))
        if "instruct-medium" in run["updates"]:
            text = f"{label(name)}: {{}} more than the instructions-only update's"
            other = share(run, "instruct-medium")[0]
            found.append(_above("O2 null space", text.format("ΔW is outside span(W)"), outside, other))
            other = gain_ratio(run, "instruct-medium")
            found.append(_above("O3 row space", text.format("the preference for unsafe inputs is"), ratio, other))
    return sorted(found, key=lambda claim: claim.topic)


def _behaviour_claims(evaluation: Run, mediums: Sequence[str]) -> list[Claim]:
    found = []
    for name in mediums:
        for key, kind, said in (
            ("safe", "instruct", "safe prompts are executed"),
            ("unsafe", "null", "unsafe ones refused"),
        ):
            if name in evaluation:
                rate = evaluation[name][key][kind]["free_running"]["value"]
                text = f"{label(name)}: {said}, at least 95 %"
                found.append(Claim("behaviour", text, f"{100 * rate:.1f} %", rate >= 0.95))
    dpo = evaluation.get("dpo-medium", {})
    if {"jb_co_text", "jb_co_task"} <= dpo.keys():
        text, task = (100 * dpo[s]["instruct"]["free_running"]["value"] for s in ("jb_co_text", "jb_co_task"))
        found.append(_above("behaviour", "DPO, medium rate: JB-CO-Text succeeds more than JB-CO-Task (%)", text, task))
    return found


def _above(topic: str, text: str, value: float, other: float) -> Claim:
    return Claim(
        topic, text, f"{value:.3g} > {other:.3g}" if value > other else f"{value:.3g} ≤ {other:.3g}", value > other
    )


def _ascending(topic: str, text: str, values: list[float]) -> Claim:
    return Claim(topic, text, ", ".join(f"{v:.3g}" for v in values), values == sorted(values))


def _claims_table(many: Sequence[Sequence[Claim]]) -> str:
    """Claims as HTML: one column a seed, and in how many it shows."""
    rows = []
    for per_seed in zip(*many, strict=True):
        held = sum(claim.holds for claim in per_seed)
        kind = "met" if held == len(per_seed) else "missed" if held == 0 else "unclear"
        sign = {"met": "✓", "missed": "✗", "unclear": "≈"}[kind]
        count = f'<span class="{kind}">{sign} {held} of {len(per_seed)}</span>'
        first = per_seed[0]
        rows.append((False, [escape(first.topic), escape(first.text), count, *(escape(c.measured) for c in per_seed)]))
    table = html_table(["", "Claim", "Shows in", *(f"run {i + 1}" for i in range(len(many)))], rows)
    return f'<div class="claims">{table}</div>'


# -------------------------------------------------------------------------------------------------------------- figures


def _axes(figure: Figure, rows: int, columns: int, **options: Any) -> np.ndarray:
    axes: np.ndarray = figure.subplots(rows, columns, squeeze=False, **options)
    return axes


def _panels(count: int, width: float, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of at most four panels a row; the panels that are left over are hidden."""
    columns = min(4, count)
    rows = math.ceil(count / columns)
    # a single panel is drawn wider, so that the legend below has room
    figure = new_figure(width * max(columns, 3) + 0.5, height * rows + 0.7)
    axes = _axes(figure, rows, columns, **options)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, axes


def _outline(ax: Axes, dist: Mapping[str, Any], colour: str, name: str, *, filled: bool) -> None:
    """One histogram as a density, from its stored counts."""
    counts = np.asarray(dist["counts"], dtype=float)
    if len(counts) < 2:
        ax.axvline(dist["low"], color=colour, linewidth=1.4, label=name)
        return
    edges = np.linspace(dist["low"], dist["high"], len(counts) + 1)
    density = counts / counts.sum() / (edges[1] - edges[0])
    ax.stairs(density, edges, color=colour, linewidth=1.3, label=name, fill=False)
    if filled:
        ax.stairs(density, edges, color=colour, alpha=0.22, fill=True)


def _legend(figure: Figure, axes: np.ndarray, columns: int) -> None:
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        found, names = ax.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5
    )


def _layer_axis(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer", fontsize=8.5, color=MUTED)


def _shown_layers(count: int) -> list[int]:
    return list(range(count)) if count <= FEW_LAYERS else [round(i * (count - 1) / 3) for i in range(4)]


def plot_tau(runs: Sequence[Run]) -> Figure:
    """Histograms of tau: a row a model, a column a layer (first seed)."""
    run = runs[0]
    models, sets = _models(run), _sets(run)
    layers = _shown_layers(len(run["models"]["base"]["tau"]))
    figure = new_figure(2.6 * max(len(layers), 3) + 0.8, 1.55 * len(models) + 0.7)
    axes = _axes(figure, len(models), len(layers))
    for row, model in enumerate(models):
        for column, layer in enumerate(layers):
            ax = axes[row, column]
            style_axes(ax, "y")
            for name in sets:
                dist = run["models"][model]["tau"][layer][name]
                _outline(ax, dist, _set_colour(name, sets), label(name), filled=name in SET_COLOURS)
            ax.axvline(0, color=MUTED, linewidth=0.8, linestyle=":")
            ax.set_yticks([])
            ax.locator_params(axis="x", nbins=4)
            if row == 0:
                title_axes(ax, f"layer {layer}")
            if column == 0:
                ax.set_ylabel(label(model).replace(", ", ",\n").replace(" (", "\n("), fontsize=8.5, color=INK)
    for ax in axes[-1]:
        ax.set_xlabel("τ  (unsafe side < 0 < safe side)", fontsize=8, color=MUTED)
    _legend(figure, axes, min(len(sets), 5))
    return figure


def _lines(
    ax: Axes, xs: Sequence[float], many: Sequence[Sequence[float]], colour: str, name: str, **options: Any
) -> None:
    """The mean over seeds as a line, their range as a band."""
    values = np.asarray(many, dtype=float)
    ax.plot(
        xs, values.mean(0), color=colour, label=name, **{"linewidth": 1.6, "marker": "o", "markersize": 3, **options}
    )
    if len(values) > 1:
        ax.fill_between(xs, values.min(0), values.max(0), color=colour, alpha=0.16, linewidth=0)


def plot_tau_layers(runs: Sequence[Run]) -> Figure:
    """Mean tau of every set by layer, one panel a model; in units of the activations' norm, so that layers compare."""
    models, sets = _models(runs[0]), _sets(runs[0])
    figure, axes = _panels(len(models), 2.9, 2.3, sharey=True)
    layers = range(len(runs[0]["models"]["base"]["tau"]))
    for ax, model in zip(axes.flat, models, strict=False):
        style_axes(ax, "y")
        title_axes(ax, label(model))
        ax.axhline(0, color=MUTED, linewidth=0.8)
        for name in sets:
            many = [
                [m["tau"][i][name]["mean"] / m["separation"][i]["norm"] for i in layers]
                for m in (run["models"][model] for run in runs)
            ]
            _lines(ax, layers, many, _set_colour(name, sets), label(name))
        _layer_axis(ax)
    for ax in axes[:, 0]:
        ax.set_ylabel("mean τ / mean norm", fontsize=8.5, color=MUTED)
    _legend(figure, axes, min(len(sets), 5))
    return figure


def plot_separation(runs: Sequence[Run]) -> Figure:
    """How separate safe and unsafe are by layer: side accuracy, 2-means, Fisher ratio, concentration."""
    panels: tuple[tuple[str, Callable[[Mapping[str, float]], float]], ...] = (
        ("right side of τ = 0 (%)", lambda s: 100 * s["side_accuracy"]),
        ("2-means without labels (%)", lambda s: 100 * s["two_means_accuracy"]),
        ("Fisher ratio", lambda s: s["fisher_ratio"]),
        ("σ₁ / Σσ of cov, unsafe less safe", lambda s: s["concentration_unsafe"] - s["concentration_safe"]),
    )
    models = _models(runs[0])
    figure = new_figure(12, 3.1)
    axes = _axes(figure, 1, len(panels))
    for ax, (title, measure) in zip(axes[0], panels, strict=True):
        style_axes(ax, "y")
        title_axes(ax, title)
        for model in models:
            many = [[measure(s) for s in run["models"][model]["separation"]] for run in runs]
            _lines(ax, range(len(many[0])), many, _model_colour(model, models), label(model))
        if title.endswith("(%)"):
            ax.axhline(50, color=MUTED, linewidth=1, linestyle="--")
        _layer_axis(ax)
    _legend(figure, axes, 4)
    return figure


def _kinds(run: Run) -> list[str]:
    return list(dict.fromkeys(m["kind"] for u in run["updates"].values() for m in u["matrices"]))


def plot_angles(runs: Sequence[Run]) -> Figure:
    """Sorted sines of the update's directions against W's column space in the last two layers, with chance."""
    run = runs[0]
    kinds, models = _kinds(run), _models(run)
    last = max(m["layer"] for u in run["updates"].values() for m in u["matrices"])
    layers = [layer for layer in (last - 1, last) if layer >= 0]
    figure = new_figure(3.3 * len(kinds) + 0.6, 2.6 * len(layers) + 0.7)
    axes = _axes(figure, len(layers), len(kinds), sharey=True)
    for row, layer in enumerate(layers):
        for column, kind in enumerate(kinds):
            ax = axes[row, column]
            style_axes(ax, "both")
            title_axes(ax, f"{kind}, layer {layer}")
            chance = None
            for update, found in run["updates"].items():
                for matrix in found["matrices"]:
                    if (matrix["layer"], matrix["kind"]) != (layer, kind):
                        continue
                    chance = matrix["chance"]
                    sines = matrix["sines"]
                    xs = np.linspace(0, 1, len(sines)) if len(sines) > 1 else [0.5]
                    ax.plot(xs, sines, color=_model_colour(update, models), label=label(update), linewidth=1.6)
            if chance is not None:
                ax.axhline(chance, color=INK, linewidth=1.2, linestyle="--", label="chance: a random direction")
            ax.set_ylim(0, 1.03)
            ax.set_xticks([0, 0.5, 1], ["lowest", "median", "highest"])
    for ax in axes[:, 0]:
        ax.set_ylabel("sine of the angle to span(W)", fontsize=8.5, color=MUTED)
    _legend(figure, axes, 4)
    return figure


def plot_shares(runs: Sequence[Run]) -> Figure:
    """Share of the update's energy outside W's column space by layer and kind, with chance."""
    kinds, models = _kinds(runs[0]), _models(runs[0])
    figure = new_figure(3.6 * len(kinds) + 0.6, 3.2)
    axes = _axes(figure, 1, len(kinds), sharey=True)
    for ax, kind in zip(axes[0], kinds, strict=True):
        style_axes(ax, "y")
        title_axes(ax, kind)
        drawn = False
        for update in runs[0]["updates"]:
            found = [[m for m in run["updates"][update]["matrices"] if m["kind"] == kind] for run in runs]
            if not found[0] or len({tuple(m["layer"] for m in f) for f in found}) > 1:
                continue
            layers = [m["layer"] for m in found[0]]
            _lines(ax, layers, [[m["share"] for m in f] for f in found], _model_colour(update, models), label(update))
            if not drawn:
                chance = [[m["chance_share"] for m in f] for f in found]
                _lines(ax, layers, chance, INK, "chance: a random update", linestyle="--", marker="")
                drawn = True
        ax.set_ylim(0, 1.03)
        _layer_axis(ax)
    axes[0, 0].set_ylabel("energy of ΔW outside span(W)", fontsize=8.5, color=MUTED)
    _legend(figure, axes, 4)
    return figure


def plot_rows(runs: Sequence[Run]) -> Figure:
    """|c_i| of the update's leading right singular vectors in the last layer, by set; one panel an update."""
    run = runs[0]
    updates = [u for u, found in run["updates"].items() if any(found["rows"])]
    sets = list(next(iter(_last_rows(run, updates[0]).values()))["sets"])
    figure, axes = _panels(len(updates), 3.1, 2.5)
    for ax, update in zip(axes.flat, updates, strict=False):
        kind, rows = next(iter(_last_rows(run, update).items()))
        style_axes(ax, "y")
        title_axes(ax, label(update), kind)
        for name in sets:
            many = [next(iter(_last_rows(r, update).values()))["sets"][name]["coefficients"] for r in runs]
            size = min(map(len, many))
            _lines(ax, range(1, size + 1), [m[:size] for m in many], _set_colour(name, sets), label(name))
        chance = rows["chance"]
        ax.plot(
            range(1, len(chance) + 1), chance, color=INK, linestyle="--", linewidth=1.2, label="chance: a random input"
        )
        ax.set_ylim(bottom=0)
        ax.set_xlabel("direction i of ΔW", fontsize=8.5, color=MUTED)
    for ax in axes[:, 0]:
        ax.set_ylabel("mean |cᵢ|", fontsize=8.5, color=MUTED)
    _legend(figure, axes, 5)
    return figure


def _last_rows(run: Run, update: str) -> Mapping[str, Any]:
    """Row-space figures of the last layer whose first MLP matrices changed."""
    found: Mapping[str, Any] = [kinds for kinds in run["updates"][update]["rows"] if kinds][-1]
    return found


def plot_gains(runs: Sequence[Run]) -> Figure:
    """||dW a||/||a|| by layer and set over the chance level, one panel an update."""
    updates = [u for u, found in runs[0]["updates"].items() if any(found["rows"])]
    sets = list(next(iter(_last_rows(runs[0], updates[0]).values()))["sets"])
    figure, axes = _panels(len(updates), 3.1, 2.5)
    for ax, update in zip(axes.flat, updates, strict=False):
        layers = [i for i, kinds in enumerate(runs[0]["updates"][update]["rows"]) if kinds]
        style_axes(ax, "y")
        title_axes(ax, label(update))
        for name in sets:
            many = []
            for run in runs:
                first = [next(iter(run["updates"][update]["rows"][i].values())) for i in layers]
                many.append([rows["sets"][name]["gain"]["mean"] / rows["chance_gain"] for rows in first])
            _lines(ax, layers, many, _set_colour(name, sets), label(name))
        ax.axhline(1, color=INK, linestyle="--", linewidth=1.2, label="chance: a random input")
        ax.set_ylim(bottom=0)
        _layer_axis(ax)
    for ax in axes[:, 0]:
        ax.set_ylabel("‖ΔW a‖ over chance", fontsize=8.5, color=MUTED)
    _legend(figure, axes, 5)
    return figure


def plot_lipschitz(runs: Sequence[Run]) -> Figure:
    """Histograms of local Lipschitzness, a panel a model (first seed)."""
    run = runs[0]
    models = _models(run)
    sets = list(run["models"]["base"]["lipschitz"])
    figure, axes = _panels(len(models), 2.9, 2.1)
    for ax, model in zip(axes.flat, models, strict=False):
        style_axes(ax, "y")
        title_axes(ax, label(model))
        for name in sets:
            dist = run["models"][model]["lipschitz"][name]
            _outline(ax, dist, _set_colour(name, sets), label(name), filled=name in SET_COLOURS)
        ax.set_yticks([])
        ax.set_xlabel("local Lipschitzness", fontsize=8.5, color=MUTED)
    _legend(figure, axes, 5)
    return figure


def plot_lipschitz_means(runs: Sequence[Run]) -> Figure:
    """Mean local Lipschitzness of every model and set, with its 95 % interval; a dot a seed where there are several."""
    models, sets = _models(runs[0]), list(runs[0]["models"]["base"]["lipschitz"])
    figure = new_figure(9.5, 0.13 * len(models) * max(3, len(sets)) + 1.2)
    axes = _axes(figure, 1, 1)
    ax = axes[0, 0]
    style_axes(ax, "x")
    for row, model in enumerate(models):
        for i, name in enumerate(sets):
            y = row + 0.8 * (i + 0.5) / len(sets) - 0.4
            found = [run["models"][model]["lipschitz"][name] for run in runs]
            colour = _set_colour(name, sets)
            if len(found) == 1:
                margin = 1.96 * found[0]["std"] / math.sqrt(found[0]["count"])
                ax.errorbar(
                    found[0]["mean"], y, xerr=margin, color=colour, marker="o", markersize=4.5, label=label(name)
                )
            else:
                ax.plot([f["mean"] for f in found], [y] * len(found), "o", color=colour, markersize=4, alpha=0.55)
                ax.plot(
                    _mean([f["mean"] for f in found]),
                    y,
                    "|",
                    color=colour,
                    markersize=12,
                    markeredgewidth=2,
                    label=label(name),
                )
    ax.set_yticks(range(len(models)), [label(m) for m in models])
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("mean local Lipschitzness", fontsize=8.5, color=MUTED)
    _legend(figure, axes, 5)
    return figure


def plot_spans(runs: Sequence[Run]) -> Figure:
    """Mean sine of the principal angles between the spans of activations before and after, by layer (App. C.1)."""
    updates = list(runs[0]["updates"])
    sets = list(runs[0]["updates"][updates[0]]["angles"])
    figure, axes = _panels(len(updates), 2.9, 2.2, sharey=True)
    for ax, update in zip(axes.flat, updates, strict=False):
        style_axes(ax, "y")
        title_axes(ax, label(update))
        for name in sets:
            many = [[a["mean"] for a in run["updates"][update]["angles"][name]] for run in runs]
            _lines(ax, range(len(many[0])), many, _set_colour(name, sets), label(name))
        ax.set_ylim(0, 1)
        _layer_axis(ax)
    for ax in axes[:, 0]:
        ax.set_ylabel("mean sine", fontsize=8.5, color=MUTED)
    _legend(figure, axes, 5)
    return figure


def _rate(value: Any) -> float:
    return float(value["value"] if isinstance(value, Mapping) else value)


def plot_alpha(runs: Sequence[Run]) -> Figure:
    """What becomes of the rates when the update is scaled: a row a scaled part, a column an update."""
    updates = list(runs[0]["alpha"])
    parts = list(runs[0]["alpha"][updates[0]])
    keys = [key for key in runs[0]["alpha"][updates[0]][parts[0]][0] if key != "alpha"]
    colours = {"safe_instruct": SET_COLOURS["safe"], "unsafe_null": SET_COLOURS["unsafe"]}
    colours |= {"safe_refused": SET_COLOURS["safe"], "unsafe_refused": SET_COLOURS["unsafe"]}
    said = {"safe_instruct": "safe: executed", "unsafe_null": "unsafe: refused"}
    said |= {"safe_refused": "safe: refused", "unsafe_refused": "unsafe: refused"}
    others = [key for key in keys if key not in colours]
    figure = new_figure(3.1 * max(len(updates), 2) + 0.5, 2.5 * len(parts) + 0.7)
    axes = _axes(figure, len(parts), len(updates), sharey=True)
    for row, part in enumerate(parts):
        for column, update in enumerate(updates):
            ax = axes[row, column]
            style_axes(ax, "both")
            title_axes(ax, label(update), {"mlp": "MLPs only", "all": "all weights"}[part])
            for key in keys:
                curves = [run["alpha"][update][part] for run in runs]
                colour = colours.get(key) or MORE_COLOURS[others.index(key) % len(MORE_COLOURS)][0]
                name = said.get(key, f"{label(key.removesuffix('_instruct'))}: executed")
                xs = [point["alpha"] for point in curves[0]]
                _lines(ax, xs, [[100 * _rate(p[key]) for p in curve] for curve in curves], colour, name)
                if len(curves) == 1 and isinstance(curves[0][0][key], Mapping):
                    low, high = zip(*(p[key]["interval"] for p in curves[0]), strict=True)
                    ax.fill_between(
                        xs, 100 * np.asarray(low), 100 * np.asarray(high), color=colour, alpha=0.14, linewidth=0
                    )
            ax.axvline(1, color=MUTED, linewidth=0.8, linestyle=":")
            ax.set_ylim(-3, 103)
            ax.set_xlabel("α in W + α ΔW", fontsize=8.5, color=MUTED)
    for ax in axes[:, 0]:
        ax.set_ylabel("%", fontsize=8.5, color=MUTED)
    _legend(figure, axes, 4)
    return figure


def plot_attack(many: Sequence[Run]) -> Figure:
    """Soft-token attack: success and tau of attacked prompts by the attack's size."""
    attacks = [r["attack"] for r in many]
    models = [m for m in attacks[0] if attacks[0][m]]
    sizes = list(attacks[0][models[0]])
    figure = new_figure(9.5, 3.3)
    axes = _axes(figure, 1, 2)
    style_axes(axes[0, 0], "both")
    style_axes(axes[0, 1], "both")
    title_axes(axes[0, 0], "success of the attack")
    title_axes(axes[0, 1], "mean τ of attacked prompts, last layer")
    names = _models(many[0]["measurements"])
    for model in models:
        colour = _model_colour(model, names)
        success = [[100 * _rate(a[model][size]["success"]) for size in sizes] for a in attacks]
        _lines(axes[0, 0], range(len(sizes)), success, colour, label(model))
        taus = [r["measurements"]["models"][model]["tau"][-1] for r in many]
        keys = [size if size.startswith("m=") else f"m={size}" for size in sizes]
        if all(key in tau for tau in taus for key in keys):
            _lines(
                axes[0, 1], range(len(sizes)), [[t[key]["mean"] for key in keys] for t in taus], colour, label(model)
            )
            axes[0, 1].axhline(_mean([t["unsafe"]["mean"] for t in taus]), color=colour, linestyle=":", linewidth=1)
    for ax in axes[0]:
        ax.set_xticks(range(len(sizes)), sizes)
        ax.set_xlabel("soft tokens", fontsize=8.5, color=MUTED)
    axes[0, 0].set_ylabel("%", fontsize=8.5, color=MUTED)
    axes[0, 0].set_ylim(-3, 103)
    _legend(figure, axes, 4)
    return figure


def plot_training(many: Sequence[Run]) -> Figure:
    """Loss of every training stage (first seed)."""
    stages = {name: found for name, found in many[0]["training"].items() if found.get("loss")}
    figure, axes = _panels(len(stages), 2.9, 2.0)
    for ax, (name, found) in zip(axes.flat, stages.items(), strict=False):
        style_axes(ax, "both")
        title_axes(ax, label(name), f"{found['seconds']:.0f} s")
        ax.plot(*zip(*found["loss"], strict=True), color=COLOURS["spf"][0], linewidth=1.2)
        ax.set_xlabel("step", fontsize=8.5, color=MUTED)
    return figure


def plot_bridge(many: Sequence[Run]) -> Figure:
    """New operators learned with and without the null-space rule: clusters, update, steepness and behaviour."""
    runs = [r["bridge"]["measurements"] for r in many]
    evaluations = [r["bridge"].get("evaluation", {}) for r in many]
    arms = _models(runs[0])
    names = ["before" if arm == "base" else arm for arm in arms]
    panels: list[tuple[str, str, dict[str, list[list[float]]]]] = []

    def rates(key: str, kind: str) -> list[list[float]]:
        return [[100 * e[n][key][kind]["free_running"]["value"] for e in evaluations] for n in names]

    if all(n in e for e in evaluations for n in names):
        sets = evaluations[0][names[0]]
        shown = {"unsafe: refused": rates("unsafe", "null"), "safe: executed": rates("safe", "instruct")}
        extra = [s for s in sets if s not in ("safe", "unsafe") and not s.startswith("jb_")]
        shown |= {f"{label(s)}: executed": rates(s, "instruct") for s in extra}
        panels.append(("behaviour", "%", shown))
    panels.append(("O1: τ gap, last layer", "", {"safe less unsafe": [[gap(r, a) for r in runs] for a in arms]}))
    steep = {s: [[r["models"][a]["lipschitz"][s]["mean"] for r in runs] for a in arms] for s in ("safe", "unsafe")}
    panels.append(("O4: Lipschitzness", "", steep))
    tuned = [a for a in arms if a != "base"]
    outside = {"share": [[share(r, a)[0] for r in runs] if a in tuned else [] for a in arms]}
    panels.append(("O2: ΔW outside span(W)", "", outside))
    panels.append(
        (
            "O3: gain, unsafe / safe",
            "",
            {"ratio": [[gain_ratio(r, a) for r in runs] if a in tuned else [] for a in arms]},
        )
    )
    figure = new_figure(2.9 * len(panels) + 0.4, 3.6)
    axes = _axes(figure, 1, len(panels))
    for ax, (title, unit, series) in zip(axes[0], panels, strict=True):
        style_axes(ax, "y")
        title_axes(ax, title, unit)
        for i, (name, per_arm) in enumerate(series.items()):
            colour = SET_COLOURS.get(name.split(":")[0]) or MORE_COLOURS[i % len(MORE_COLOURS)][0]
            for x, values in enumerate(per_arm):
                place = x + 0.7 * (i + 0.5) / len(series) - 0.35
                if values:
                    ax.bar(place, _mean(values), width=0.6 / len(series), color=colour, alpha=0.75, label=name)
                    ax.plot([place] * len(values), values, "o", color=INK, markersize=2.5)
        if title.startswith("O2"):
            ax.axhline(share(runs[0], tuned[0])[1], color=INK, linestyle="--", linewidth=1.2, label="chance")
        if title.startswith("O3"):
            ax.axhline(1, color=INK, linestyle="--", linewidth=1.2)
        if unit == "%":
            ax.set_ylim(0, 103)
            ax.set_yticks(range(0, 101, 20))
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
        if len(ax.get_legend_handles_labels()[1]):
            unique = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
            if len(unique) > 1:
                # room above the bars, which fill the panel
                ax.set_ylim(0, ax.get_ylim()[1] * (1 + 0.1 * len(unique)))
                ax.legend(unique.values(), unique.keys(), fontsize=7.5, frameon=False, loc="upper left")
    return figure


# ----------------------------------------------------------------------------------------------------------------- page

_EXTRA_CSS = """
main { max-width: 1240px; } figure { margin: 1rem 0 0; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto;
 border-radius: 6px; border: 1px solid var(--line); background: #fff; }
th, td { padding: .35rem .5rem; font-size: .82rem; white-space: normal; } ul { margin: .6rem 0; padding-left: 1.2rem;
 font-size: .9rem; } .claims td:nth-child(2), .claims th:nth-child(2) { text-align: left; }
"""

_GLOSSARY = (
    "Safe: an operator that is allowed on this kind of text, to be executed. Unsafe: one that is not, to be answered "
    "with the null token. Protocols: SSFT (supervised safety fine-tuning), DPO and unlearning, at a medium and a small "
    "learning rate; the baseline was tuned further on instructions only. Jailbreaks are unsafe in new ways: JB-CO-Task "
    "mixes a safe and an unsafe operator, JB-CO-Text mixes the two kinds of text, JB-MisGen uses synonyms of operators "
    "or texts that were not seen in safety tuning."
)

_WORDS = {
    "tau": "O1. Clusters. â is a prompt's activation after the first MLP layer, averaged over the positions named "
    "below; τ = ‖â − mean unsafe‖ − ‖â − mean safe‖ is positive where it lies on the safe side. The means come from "
    "the other half of the prompts. If safety fine-tuning works by telling the two apart, the blue hill and the orange "
    "one move away from each other, and a jailbreak works by looking safe: its hill lies between. Scales differ. Noise "
    "in the means pushes the two halves apart, so where prompts are few and clusters weak a set may show two hills.",
    "angles": "O2. Where the update writes. The columns of W span what a layer could write before. Each direction that "
    "the update ΔW writes to has an angle to that span: sine 1 is outside (its null space), 0 inside. The dashed line "
    "is where a random direction lies: only what is above it says something about safety.",
    "rows": "O3. What the update listens to. cᵢ is how strongly the input of a prompt drives the i-th direction of ΔW; "
    "the claim is that unsafe inputs drive it more than safe ones. Dashed: a random input. Below, the whole update's "
    "answer ‖ΔW a‖/‖a‖ by layer, divided by its chance level.",
    "lipschitz": "O4. Steepness: the norm of the gradient of the top logit with respect to the prompt's embeddings. "
    "The claim: safety fine-tuning makes the model flatter on unsafe prompts and steeper on safe ones.",
    "spans": "App. C.1. How far the span of the activations of each set has turned through fine-tuning: 0 is the same "
    "span, 1 orthogonal.",
    "attack": "Soft tokens behind an unsafe prompt are optimised, within a norm bound, until the model executes it. "
    "Dotted: unattacked unsafe prompts.",
    "bridge": "The safety-tuned model is fine-tuned on operators it has not seen: plainly, with SafetyCallback, and "
    "with SafetyLock on top. Does keeping the refusals keep what the study sees inside? Bars are means, dots seeds.",
    "gradients": "The SPF paper (arXiv 2601.10141) rests on three observations: the gradient of the refusal loss on "
    "unsafe prompts has low rank, points against the utility gradient, and its subspace is stable. Here the utility "
    "gradient is that of harmless prompts with answers. Overlap is of the leading directions before and after; the "
    "update's share is that of its energy in the safety gradient's leading directions; in brackets, chance.",
    "alpha": "Interventions. The update is scaled: α = 0 is the model before, 1 the model after, more exaggerates it.",
}


def _rate_text(rates: Sequence[Mapping[str, Any]]) -> str:
    """One rate with its Wilson interval, or over several seeds the mean and their range."""
    if len(rates) == 1:
        low, high = rates[0]["interval"]
        return f"{100 * rates[0]['value']:.1f} <small>{100 * low:.1f}–{100 * high:.1f}</small>"
    values = [100 * rate["value"] for rate in rates]
    return f"{_mean(values):.1f} <small>{min(values):.1f}–{max(values):.1f}</small>"


def _success_tables(many: Sequence[Run]) -> str:
    body = ""
    evaluations = [r["evaluation"] for r in many]
    models, sets = list(evaluations[0]), list(next(iter(evaluations[0].values())))
    for reading, title in (
        ("free_running", "Free running: the model's own greedy answer"),
        ("teacher_forced", "Teacher-forced tokens (the paper's accuracy)"),
        ("first_token", "First token"),
    ):
        head = ["Model", *(f"{label(s)}: {'refused' if s == 'unsafe' else 'executed'}" for s in sets)]
        rows = []
        for model in models:
            cells = [
                _rate_text([e[model][s]["null" if s == "unsafe" else "instruct"][reading] for e in evaluations])
                for s in sets
            ]
            rows.append((False, [escape(label(model)), *cells]))
        table = html_table(head, rows)
        body += (
            f"<h3>{escape(title)} (%)</h3>{table}"
            if reading == "free_running"
            else f"<details><summary>{escape(title)} (%)</summary>{table}</details>"
        )
    return body


def _data_section(many: Sequence[Run]) -> str:
    def flat(name: str, content: Any) -> dict[str, Any]:
        if not isinstance(content, Mapping):
            return {name: content}
        return {k: v for key, value in content.items() for k, v in flat(f"{name} {key}".strip(), value).items()}

    columns = [flat("", r["data"]) for r in many]
    rows = [(False, [escape(name), *(escape(_short(column.get(name))) for column in columns)]) for name in columns[0]]
    table = html_table(["", *(f"seed {i + 1}" for i in range(len(many)))], rows)
    said = "Texts: lengths, and how well n-grams alone tell safe from unsafe text"
    return f"<details><summary>{said}</summary>{table}</details>"


def _gradient_table(runs: Sequence[Run]) -> str:
    k = runs[0]["gradients"]["k"]
    head = ["Model", "effective rank, safety", "utility", f"CER({k}), safety", "utility", "cosine of the two"]
    head += [f"{what}, {side}" for what in ("overlap with before", "update's share") for side in ("left", "right")]
    rows = []
    for name in _models(runs[0]):
        many = [run["gradients"]["models"][name] for run in runs]
        keys = ["effective_rank_safety", "effective_rank_utility", "cer_safety", "cer_utility", "cosine"]
        cells = [label(name), *(_spread([m[key] for m in many]) for key in keys)]
        for what in ("overlap", "update"):
            for side in ("left", "right"):
                if name == "base" or many[0][f"{what}_{side}"] is None:
                    cells.append("")
                else:
                    chance = _mean([m[f"chance_{side}"] for m in many])
                    cells.append(f"{_spread([m[f'{what}_{side}'] for m in many])} ({chance:.2g})")
        rows.append((False, [escape(cell) for cell in cells]))
    return html_table(head, rows)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_short(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass
class SeedsArguments:
    """One report from the results of several runs of the synthetic world, or of one run again."""

    runs: list[str] = field(metadata={"help": "directories of runs, each with results.json"})
    output: str = field(metadata={"help": "directory for report.html and plots"})


def report_runs(args: SeedsArguments) -> Path:
    """`spf study report`: read the runs and write their report.

    Raises:
        FileNotFoundError: a directory holds no results.json.
        ValueError: runs of different presets or grammars, or of other models.
    """
    found = []
    for run in args.runs:
        path = Path(run) / "results.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; name the directory of a run")
        found.append(json.loads(path.read_text("utf-8")))
    kinds = {(r.get("kind"), r.get("preset"), r.get("grammar")) for r in found}
    if len(kinds) > 1:
        raise ValueError(f"spf study report: the runs differ in preset or grammar: {sorted(map(str, kinds))}")
    return write_report(found, Path(args.output))


def write_report(results: Run | Sequence[Run], directory: Path) -> Path:
    """Write ``report.html`` and ``plots/*.png`` from the results of a run, of several seeds, or of `spf study measure`.

    Of several seeds, lines are means and bands the range over the seeds; histograms show the first one. The page is
    self-contained and has no scripts. Returns its path.

    Raises:
        ValueError: no results, or seeds that did not measure the same models.
    """
    many = [results] if isinstance(results, Mapping) else list(results)
    if not many:
        raise ValueError("write_report: no results")
    runs = [r["measurements"] for r in many]
    if len({(tuple(_models(run)), tuple(_sets(run))) for run in runs}) > 1:
        raise ValueError("write_report: the seeds did not measure the same models and prompts")
    plots = Path(directory) / "plots"
    study = many[0].get("kind") != "measure"

    def picture(name: str, draw: Callable[[Any], Figure], of: Any = None) -> str:
        path = save_figure(draw(runs if of is None else of), plots / f"{name}.png", dpi=130)
        return html_image(path, (draw.__doc__ or "").split("\n")[0])

    first, config = many[0], runs[0]["config"]
    title = "What safety fine-tuning does inside a model" if study else "Inside a model before and after fine-tuning"
    seeds = f"{len(many)} seeds" if len(many) > 1 else "one run"
    body = f'<h1>{escape(title)}</h1><p class="sub">{escape(_subtitle(first, seeds))}</p>'
    said = (
        "A small language model learns to apply operators to texts, then to refuse some operators on some texts. This "
        "page redraws the figures of Jain et al. (arXiv 2407.10264) for it, with chance levels and baselines."
        if study
        else "The same measurements as in the study of the synthetic world (Jain et al., arXiv 2407.10264), on real "
        "checkpoints. Nothing here is a verdict on a model's safety: behaviour is what spf eval measures."
    )
    intro = f"<p>{escape(said)}</p>"
    if study:
        intro += f"<p>{escape(_GLOSSARY)}</p>"
        found = [claims(r) for r in many]
        held = sum(all(c.holds for c in per_seed) for per_seed in zip(*found, strict=True))
        body += html_section(
            f"Claims: {held} of {len(found[0])} show in every seed",
            intro + _claims_table(found),
            "✓ in every run, ≈ in some, ✗ in none. A claim shows if the means say so; small differences may be noise.",
        )
        intro = ""
    meanings = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}.</li>" for name, text in COLUMNS)
    head, rows = summary_rows(runs)
    note = " ± is the standard deviation over the seeds." if len(many) > 1 else ""
    body += html_section(
        "All models at a glance",
        intro + html_table(head, [(False, [escape(c) for c in row]) for row in rows]) + f"<ul>{meanings}</ul>",
        note.strip(),
    )
    if first.get("evaluation"):
        interval = "95 % Wilson interval" if len(many) == 1 else "range over the seeds"
        body += html_section(
            "Behaviour", _success_tables(many), f"Small print: {interval}. A jailbreak that is executed has succeeded."
        )
    taus = picture("tau", plot_tau) + picture("tau-layers", plot_tau_layers) + picture("separation", plot_separation)
    body += html_section(
        "Do safe and unsafe prompts form clusters?", f"<p>{escape(_WORDS['tau'])}</p>{taus}", _positions(config)
    )
    if _kinds(runs[0]):
        angles = picture("angles", plot_angles) + picture("null-space", plot_shares)
        body += html_section("Where does the update write?", f"<p>{escape(_WORDS['angles'])}</p>{angles}")
    if any(any(u["rows"]) for u in runs[0]["updates"].values()):
        body += html_section(
            "What does the update listen to?",
            f"<p>{escape(_WORDS['rows'])}</p>" + picture("rows", plot_rows) + picture("gains", plot_gains),
        )
    body += html_section(
        "How steep is the model?",
        f"<p>{escape(_WORDS['lipschitz'])}</p>"
        + picture("lipschitz-means", plot_lipschitz_means)
        + picture("lipschitz", plot_lipschitz),
    )
    body += html_section(
        "Did the activations turn?", f"<p>{escape(_WORDS['spans'])}</p>" + picture("spans", plot_spans)
    )
    if runs[0].get("gradients"):
        body += html_section("The safety gradient", f"<p>{escape(_WORDS['gradients'])}</p>" + _gradient_table(runs))
    if runs[0]["alpha"]:
        body += html_section(
            "What if the update is scaled?", f"<p>{escape(_WORDS['alpha'])}</p>" + picture("alpha", plot_alpha)
        )
    if first.get("attack"):
        body += html_section(
            "Adversarial attack", f"<p>{escape(_WORDS['attack'])}</p>" + picture("attack", plot_attack, many)
        )
    if first.get("bridge"):
        body += html_section(
            "The bridge: fine-tuning with and without the null-space rule",
            f"<p>{escape(_WORDS['bridge'])}</p>" + picture("bridge", plot_bridge, many),
        )
    if first.get("training"):
        body += html_section("Training", picture("training", plot_training, many))
    if first.get("data"):
        body += html_section("Data", _data_section(many))
    body += _reproduction(first, config)
    page = html_page(title, body, _EXTRA_CSS)
    return replace_file(Path(directory) / "report.html", page.encode("utf-8"))


def _subtitle(first: Run, seeds: str) -> str:
    if first.get("kind") == "measure":
        return f"before: {first['aligned']} · after: {', '.join(f'{n} ({d})' for n, d in first['tuned'].items())}"
    facts = [f"preset {first['preset']}"] if first.get("preset") else []
    facts += [f"grammar {first['grammar']}"] if first.get("grammar") else []
    return " · ".join([*facts, seeds])


def _positions(config: Run) -> str:
    counts = ", ".join(f"{label(name)} {count}" for name, count in config["counts"].items())
    tokens = config["positions"] - config["generated"]
    where = "the last prompt token" if tokens == 1 else f"the last {tokens} prompt tokens"
    if config["generated"]:
        where += f" and the first {config['generated']} of the model's own answer"
    return f"Activations are averaged over {where}. Prompts: {counts}."


def _reproduction(first: Run, config: Run) -> str:
    body = f"<pre><code>{escape(first['command'])}</code></pre>" if first.get("command") else ""
    items = {**first.get("versions", {}), **{k: v for k, v in config.items() if not isinstance(v, Mapping)}}
    items |= {k: first[k] for k in ("machine", "seconds", "safe", "unsafe", "seed") if k in first}
    return html_section("Reproduce", body + html_pairs(items))
