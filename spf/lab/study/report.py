"""The study's report: PNG figures and one HTML page, from the JSON of a run, of several seeds, or of a measure."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.table

from spf.lab.report.charts import (
    COLOURS,
    INK,
    MORE_COLOURS,
    MUTED,
    Panel,
    draw_panels,
    draw_seeds,
    legend,
    new_figure,
    save_figure,
    style_axes,
)
from spf.lab.report.page import Picture, write_page
from spf.lab.report.stats import normal_margin, spread
from spf.lab.report.tables import Cell, Table, of_text, rich_table, transposed

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
SET_COLOURS = {"safe": COLOURS["spf"], "unsafe": COLOURS["plain"]}
FEW_LAYERS = 6
"""Up to so many layers each gets its own histogram; of deeper models four evenly spaced ones do."""


def label(key: str) -> str:
    return LABELS.get(key, key)


def _set_colour(name: str, names: Sequence[str]) -> str:
    others = [n for n in names if n not in SET_COLOURS]
    return SET_COLOURS.get(name) or MORE_COLOURS[others.index(name) % len(MORE_COLOURS)]


def _model_colour(name: str, names: Sequence[str]) -> str:
    palette = [COLOURS["base"], COLOURS["paper"], *MORE_COLOURS, "#c23b22", "#111111"]
    return palette[list(names).index(name) % len(palette)]


_mean = statistics.fmean


def _models(run: Run) -> list[str]:
    return list(run["models"])


def _sets(run: Run) -> list[str]:
    """Sets that every model was measured on (an attack's prompts are a model's own)."""
    return [n for n in run["models"]["base"]["tau"][0] if all(n in m["tau"][0] for m in run["models"].values())]


def _spread_text(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the sample standard deviation over seeds where there are several."""
    over = spread(values)
    if over is None:
        return "nan"
    text = f"{over.mean:.{digits}g}"
    return text if over.sd is None else f"{text} ± {over.sd:.2g}"


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


def summary_table(runs: Sequence[Run]) -> Table:
    """The table of all models: one line each, mean and spread over the seeds."""
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
                _spread_text([gap(run, name) for run in runs]),
                _spread_text([100 * _mean([s["side_accuracy"] for s in m["separation"]]) for m in models]) + " %",
                *(_spread_text([m["lipschitz"][s]["mean"] for m in models]) for s in ("safe", "unsafe")),
                f"{_spread_text([s for s, _ in shares])} ({_mean([c for _, c in shares]):.3g})" if tuned else "",
                _spread_text([gain_ratio(run, name) for run in runs]) if tuned else "",
                _spread_text([run["updates"][name]["relative_size"] for run in runs]) if tuned else "",
            ]
        )
    return of_text(head, rows)


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


def measure_table(results: Run) -> rich.table.Table:
    """The table of `spf study measure` for the terminal."""
    return rich_table(transposed(summary_table([results["measurements"]])), f"Before: {results['aligned']}")


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


def claims_table(many: Sequence[Sequence[Claim]]) -> Table:
    """One row a claim: in how many seeds it shows, and what each seed measured."""
    rows = []
    for per_seed in zip(*many, strict=True):
        held = sum(claim.holds for claim in per_seed)
        status = "met" if held == len(per_seed) else "missed" if held == 0 else "unclear"
        count = Cell(f"{held} of {len(per_seed)}", (), status)
        rows.append([Cell(per_seed[0].topic), Cell(per_seed[0].text), count, *(Cell(c.measured) for c in per_seed)])
    head = ["", "Claim", "Shows in", *(f"run {i + 1}" for i in range(len(many)))]
    return Table(head, rows, words=frozenset({0, 1}))


# -------------------------------------------------------------------------------------------------------------- figures


def _outline(ax: Axes, dist: Mapping[str, Any], colour: str, name: str, *, filled: bool) -> None:
    """One histogram as a density, from its stored counts."""
    ax.set_yticks([])
    counts = np.asarray(dist["counts"], dtype=float)
    if len(counts) < 2:
        ax.axvline(dist["low"], color=colour, linewidth=1.4, label=name)
        return
    edges = np.linspace(dist["low"], dist["high"], len(counts) + 1)
    density = counts / counts.sum() / (edges[1] - edges[0])
    ax.stairs(density, edges, color=colour, linewidth=1.3, label=name, fill=False)
    if filled:
        ax.stairs(density, edges, color=colour, alpha=0.22, fill=True)


def _outlines(ax: Axes, dists: Mapping[str, Mapping[str, Any]], sets: Sequence[str]) -> None:
    for name in sets:
        _outline(ax, dists[name], _set_colour(name, sets), label(name), filled=name in SET_COLOURS)


_Series = Sequence[tuple[str, str, Sequence[Sequence[float]]]]
"""What is drawn in one panel: name, colour, and a list of values for each seed."""


def _draw(series: _Series, xs: Sequence[float] | None, ax: Axes) -> None:
    for name, colour, many in series:
        size = min(map(len, many))
        draw_seeds(ax, range(size) if xs is None else xs, [m[:size] for m in many], colour, label=name)


def _by_set(sets: Sequence[str], values: Callable[[str], Sequence[Sequence[float]]]) -> _Series:
    return [(label(name), _set_colour(name, sets), values(name)) for name in sets]


def _shown_layers(count: int) -> list[int]:
    return list(range(count)) if count <= FEW_LAYERS else [round(i * (count - 1) / 3) for i in range(4)]


def plot_tau(runs: Sequence[Run]) -> Figure:
    """Histograms of tau: a row a model, a column a layer (first seed)."""
    run, sets = runs[0], _sets(runs[0])
    layers = _shown_layers(len(run["models"]["base"]["tau"]))
    panels = []
    for model in _models(run):
        for layer in layers:
            # The model's name stands once a row, the layer once a column, what the axis is below the last row.
            title = f"layer {layer}" if model == _models(run)[0] else ""
            name = label(model).replace(", ", ",\n").replace(" (", "\n(") if layer == layers[0] else ""
            x = "τ  (unsafe side < 0 < safe side)" if model == _models(run)[-1] else ""

            def draw(ax: Axes, dists: Mapping[str, Any] = run["models"][model]["tau"][layer]) -> None:
                _outlines(ax, dists, sets)
                ax.axvline(0, color=MUTED, linewidth=0.8, linestyle=":")
                ax.locator_params(axis="x", nbins=4)

            panels.append(Panel(title, draw, x=x, y=name))
    return draw_panels(panels, 2.6, 1.55, columns=len(layers), legend_columns=5)


def plot_tau_layers(runs: Sequence[Run]) -> Figure:
    """Mean tau of every set by layer, one panel a model; in units of the activations' norm, so that layers compare."""
    sets, panels = _sets(runs[0]), []
    for model in _models(runs[0]):
        many = [run["models"][model] for run in runs]
        per_set = {
            name: [[t[name]["mean"] / s["norm"] for t, s in zip(m["tau"], m["separation"], strict=True)] for m in many]
            for name in sets
        }
        draw = partial(_draw, _by_set(sets, per_set.__getitem__), None)
        panels.append(Panel(label(model), draw, x="layer", y="mean τ / mean norm", levels=[(0, "")]))
    return draw_panels(panels, 2.9, 2.3, legend_columns=5, sharey=True)


def plot_separation(runs: Sequence[Run]) -> Figure:
    """How separate safe and unsafe are by layer: side accuracy, 2-means, Fisher ratio, concentration."""
    measures: dict[str, Callable[[Mapping[str, float]], float]] = {
        "right side of τ = 0 (%)": lambda s: 100 * s["side_accuracy"],
        "2-means without labels (%)": lambda s: 100 * s["two_means_accuracy"],
        "Fisher ratio": lambda s: s["fisher_ratio"],
        "σ₁ / Σσ of cov, unsafe less safe": lambda s: s["concentration_unsafe"] - s["concentration_safe"],
    }
    models, panels = _models(runs[0]), []
    for title, measure in measures.items():
        series = [
            (label(m), _model_colour(m, models), [[measure(s) for s in r["models"][m]["separation"]] for r in runs])
            for m in models
        ]
        levels = [(50.0, "")] if title.endswith("(%)") else []
        panels.append(Panel(title, partial(_draw, series, None), x="layer", levels=levels))
    return draw_panels(panels, 2.9, 2.4)


def _kinds(run: Run) -> list[str]:
    return list(dict.fromkeys(m["kind"] for u in run["updates"].values() for m in u["matrices"]))


def plot_angles(runs: Sequence[Run]) -> Figure:
    """Sorted sines of the update's directions against W's column space in the last two layers, with chance."""
    run = runs[0]
    kinds, models = _kinds(run), _models(run)
    last = max(m["layer"] for u in run["updates"].values() for m in u["matrices"])
    panels = []
    for layer in (layer for layer in (last - 1, last) if layer >= 0):
        for kind in kinds:
            by = {
                update: matrix
                for update, of in run["updates"].items()
                for matrix in of["matrices"]
                if (matrix["layer"], matrix["kind"]) == (layer, kind)
            }

            def draw(ax: Axes, by: Mapping[str, Any] = by) -> None:
                for update, matrix in by.items():
                    sines = matrix["sines"]
                    xs = np.linspace(0, 1, len(sines)) if len(sines) > 1 else [0.5]
                    ax.plot(xs, sines, color=_model_colour(update, models), label=label(update), linewidth=1.6)

            levels = [(m["chance"], "chance: a random direction") for m in list(by.values())[-1:]]
            ticks = {0.0: "lowest", 0.5: "median", 1.0: "highest"}
            y = "sine of the angle to span(W)"
            panels.append(Panel(f"{kind}, layer {layer}", draw, "", "both", "", y, levels, (0, 1.03), ticks))
    return draw_panels(panels, 3.3, 2.6, columns=len(kinds), sharey=True)


def plot_null_space(runs: Sequence[Run]) -> Figure:
    """Share of the update's energy outside W's column space by layer and kind, with chance."""
    models, panels = _models(runs[0]), []
    for kind in _kinds(runs[0]):

        def draw(ax: Axes, kind: str = kind) -> None:
            chance = None
            for update in runs[0]["updates"]:
                many = [[m for m in run["updates"][update]["matrices"] if m["kind"] == kind] for run in runs]
                if not many[0] or len({tuple(m["layer"] for m in f) for f in many}) > 1:
                    continue
                layers = [m["layer"] for m in many[0]]
                shares = [[m["share"] for m in f] for f in many]
                draw_seeds(ax, layers, shares, _model_colour(update, models), label=label(update))
                chance = chance or (layers, [[m["chance_share"] for m in f] for f in many])
            if chance:
                draw_seeds(ax, *chance, INK, label="chance: a random update", linestyle="--", marker="")

        panels.append(Panel(kind, draw, x="layer", y="energy of ΔW outside span(W)", limits=(0, 1.03)))
    return draw_panels(panels, 3.6, 2.5, sharey=True)


def _last_rows(run: Run, update: str) -> tuple[str, Mapping[str, Any]]:
    """Row-space figures of the last layer whose first MLP matrices changed, and which matrix they are of."""
    kinds: Mapping[str, Any] = [kinds for kinds in run["updates"][update]["rows"] if kinds][-1]
    return next(iter(kinds.items()))


def _row_updates(run: Run) -> tuple[list[str], list[str]]:
    """The updates that have row-space figures, and the sets these are of."""
    updates = [u for u, of in run["updates"].items() if any(of["rows"])]
    return updates, list(_last_rows(run, updates[0])[1]["sets"])


def plot_rows(runs: Sequence[Run]) -> Figure:
    """|c_i| of the update's leading right singular vectors in the last layer, by set; one panel an update."""
    updates, sets = _row_updates(runs[0])
    panels = []
    for update in updates:
        kind, rows = _last_rows(runs[0], update)
        many = {s: [_last_rows(r, update)[1]["sets"][s]["coefficients"] for r in runs] for s in sets}

        def draw(ax: Axes, many: Mapping[str, Any] = many, chance: Sequence[float] = rows["chance"]) -> None:
            for name, colour, values in _by_set(sets, many.__getitem__):
                size = min(map(len, values))
                draw_seeds(ax, range(1, size + 1), [m[:size] for m in values], colour, label=name)
            xs = range(1, len(chance) + 1)
            ax.plot(xs, chance, color=INK, linestyle="--", linewidth=1.2, label="chance: a random input")

        panels.append(Panel(label(update), draw, kind, x="direction i of ΔW", y="mean |cᵢ|", limits=(0, None)))
    return draw_panels(panels, 3.6, 2.5, legend_columns=5)


def plot_gains(runs: Sequence[Run]) -> Figure:
    """||dW a||/||a|| by layer and set over the chance level, one panel an update."""
    updates, sets = _row_updates(runs[0])
    panels = []
    for update in updates:
        layers = [i for i, kinds in enumerate(runs[0]["updates"][update]["rows"]) if kinds]
        many = [[next(iter(run["updates"][update]["rows"][i].values())) for i in layers] for run in runs]
        per_set = {
            s: [[rows["sets"][s]["gain"]["mean"] / rows["chance_gain"] for rows in m] for m in many] for s in sets
        }
        draw, y = partial(_draw, _by_set(sets, per_set.__getitem__), layers), "‖ΔW a‖ over chance"
        levels = [(1.0, "chance: a random input")]
        panels.append(Panel(label(update), draw, x="layer", y=y, levels=levels, limits=(0, None)))
    return draw_panels(panels, 3.1, 2.5, legend_columns=5)


def plot_lipschitz(runs: Sequence[Run]) -> Figure:
    """Histograms of local Lipschitzness, a panel a model (first seed)."""
    sets = list(runs[0]["models"]["base"]["lipschitz"])
    panels = [
        Panel(label(name), partial(_outlines, dists=model["lipschitz"], sets=sets), x="local Lipschitzness")
        for name, model in runs[0]["models"].items()
    ]
    return draw_panels(panels, 2.9, 2.1, legend_columns=5)


def plot_lipschitz_means(runs: Sequence[Run]) -> Figure:
    """Mean local Lipschitzness of every model and set, with its 95 % interval; a dot a seed where there are several."""
    models, sets = _models(runs[0]), list(runs[0]["models"]["base"]["lipschitz"])
    figure = new_figure(9.5, 0.13 * len(models) * max(3, len(sets)) + 1.2)
    ax = figure.subplots()
    style_axes(ax, "x")
    for row, model in enumerate(models):
        for i, name in enumerate(sets):
            y = row + 0.8 * (i + 0.5) / len(sets) - 0.4
            dists = [run["models"][model]["lipschitz"][name] for run in runs]
            means = [d["mean"] for d in dists]
            options: dict[str, Any] = {"color": _set_colour(name, sets)}
            if len(dists) == 1:
                margin = normal_margin(dists[0]["std"], dists[0]["count"])
                ax.errorbar(means[0], y, xerr=margin, fmt="o", markersize=4.5, label=label(name), **options)
            else:
                ax.plot(means, [y] * len(means), "o", markersize=4, alpha=0.55, **options)
                ax.plot(_mean(means), y, "|", markersize=12, markeredgewidth=2, label=label(name), **options)
    ax.set_yticks(range(len(models)), [label(m) for m in models])
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("mean local Lipschitzness", fontsize=8.5, color=MUTED)
    legend(figure, 5)
    return figure


def plot_spans(runs: Sequence[Run]) -> Figure:
    """Mean sine of the principal angles between the spans of activations before and after, by layer (App. C.1)."""
    panels = []
    for update, angles in runs[0]["updates"].items():
        sets = list(angles["angles"])
        many = {s: [[a["mean"] for a in run["updates"][update]["angles"][s]] for run in runs] for s in sets}
        draw = partial(_draw, _by_set(sets, many.__getitem__), None)
        panels.append(Panel(label(update), draw, x="layer", y="mean sine", limits=(0, 1)))
    return draw_panels(panels, 2.9, 2.2, legend_columns=5, sharey=True)


def _rate(value: Any) -> float:
    return float(value["value"] if isinstance(value, Mapping) else value)


def plot_alpha(runs: Sequence[Run]) -> Figure:
    """What becomes of the rates when the update is scaled: a row a scaled part, a column an update."""
    updates = list(runs[0]["alpha"])
    parts = list(runs[0]["alpha"][updates[0]])
    keys = [key for key in runs[0]["alpha"][updates[0]][parts[0]][0] if key != "alpha"]
    colours = {f"{s}_{end}": SET_COLOURS[s] for s in SET_COLOURS for end in ("instruct", "null", "refused")}
    said = {"safe_instruct": "safe: executed", "unsafe_null": "unsafe: refused"}
    said |= {"safe_refused": "safe: refused", "unsafe_refused": "unsafe: refused"}
    others = [key for key in keys if key not in said]

    def draw(update: str, part: str, ax: Axes) -> None:
        curves = [run["alpha"][update][part] for run in runs]
        xs = [point["alpha"] for point in curves[0]]
        for key in keys:
            colour = colours[key] if key in said else MORE_COLOURS[others.index(key) % len(MORE_COLOURS)]
            name = said.get(key, f"{label(key.removesuffix('_instruct'))}: executed")
            draw_seeds(ax, xs, [[100 * _rate(p[key]) for p in curve] for curve in curves], colour, label=name)
            if len(curves) == 1 and isinstance(curves[0][0][key], Mapping):
                low, high = 100 * np.asarray([p[key]["interval"] for p in curves[0]]).T
                ax.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
        ax.axvline(1, color=MUTED, linewidth=0.8, linestyle=":")

    notes = {"mlp": "MLPs only", "all": "all weights"}
    panels = [
        Panel(label(u), partial(draw, u, part), notes[part], "both", "α in W + α ΔW", "%", limits=(-3, 103))
        for part in parts
        for u in updates
    ]
    return draw_panels(panels, 3.1, 2.5, columns=len(updates), sharey=True)


def plot_attack(many: Sequence[Run]) -> Figure:
    """Soft-token attack: success and tau of attacked prompts by the attack's size."""
    attacks = [r["attack"] for r in many]
    models = [m for m in attacks[0] if attacks[0][m]]
    sizes, names = list(attacks[0][models[0]]), _models(many[0]["measurements"])
    keys = [size if size.startswith("m=") else f"m={size}" for size in sizes]
    taus = {m: [r["measurements"]["models"][m]["tau"][-1] for r in many] for m in models}
    shown = [m for m in models if all(key in tau for tau in taus[m] for key in keys)]

    def draw_success(ax: Axes) -> None:
        rates = {m: [[100 * _rate(a[m][size]["success"]) for size in sizes] for a in attacks] for m in models}
        _draw([(label(m), _model_colour(m, names), rates[m]) for m in models], None, ax)

    def draw_tau(ax: Axes) -> None:
        for m in shown:
            colour = _model_colour(m, names)
            _draw([(label(m), colour, [[t[key]["mean"] for key in keys] for t in taus[m]])], None, ax)
            ax.axhline(_mean([t["unsafe"]["mean"] for t in taus[m]]), color=colour, linestyle=":", linewidth=1)

    ticks: dict[float, str] = dict(enumerate(sizes))
    success = Panel("success of the attack", draw_success, "", "both", "soft tokens", "%", limits=(-3, 103))
    inside = Panel("mean τ of attacked prompts, last layer", draw_tau, "", "both", "soft tokens")
    success.ticks = inside.ticks = ticks
    return draw_panels([success, inside], 3.0, 2.6)


def plot_training(many: Sequence[Run]) -> Figure:
    """Loss of every training stage (first seed)."""
    stages = {name: stage for name, stage in many[0]["training"].items() if stage.get("loss")}
    panels = []
    for name, stage in stages.items():
        xs, ys = zip(*stage["loss"], strict=True)

        def draw(ax: Axes, xs: Sequence[float] = xs, ys: Sequence[float] = ys) -> None:
            ax.plot(xs, ys, color=COLOURS["spf"], linewidth=1.2)

        panels.append(Panel(label(name), draw, f"{stage['seconds']:.0f} s", "both", "step"))
    return draw_panels(panels, 2.9, 2.0)


def plot_bridge(many: Sequence[Run]) -> Figure:
    """New operators learned with and without the null-space rule: clusters, update, steepness and behaviour."""
    runs = [r["bridge"]["measurements"] for r in many]
    evaluations = [r["bridge"].get("evaluation", {}) for r in many]
    arms = _models(runs[0])
    names = ["before" if arm == "base" else arm for arm in arms]
    tuned = [a for a in arms if a != "base"]

    def rates(key: str, kind: str) -> list[list[float]]:
        return [[100 * e[n][key][kind]["free_running"]["value"] for e in evaluations] for n in names]

    def draw(series: Mapping[str, list[list[float]]], ax: Axes) -> None:
        for i, (name, per_arm) in enumerate(series.items()):
            colour = SET_COLOURS.get(name.split(":")[0]) or MORE_COLOURS[i % len(MORE_COLOURS)]
            said = name if len(series) > 1 else None  # of one kind of bar the title says what it is
            for x, values in enumerate(per_arm):
                place = x + 0.7 * (i + 0.5) / len(series) - 0.35
                if values:
                    ax.bar(place, _mean(values), width=0.6 / len(series), color=colour, alpha=0.75, label=said)
                    ax.plot([place] * len(values), values, "o", color=INK, markersize=2.5)
        ax.set_xlim(-0.6, len(names) - 0.4)

    panels = []
    if all(n in e for e in evaluations for n in names):
        shown = {"unsafe: refused": rates("unsafe", "null"), "safe: executed": rates("safe", "instruct")}
        extra = [s for s in evaluations[0][names[0]] if s not in ("safe", "unsafe") and not s.startswith("jb_")]
        shown |= {f"{label(s)}: executed": rates(s, "instruct") for s in extra}
        panels.append(Panel("behaviour", partial(draw, shown), "%", limits=(0, 103)))
    gaps = {"safe less unsafe": [[gap(r, a) for r in runs] for a in arms]}
    panels.append(Panel("O1: τ gap, last layer", partial(draw, gaps)))
    steep = {s: [[r["models"][a]["lipschitz"][s]["mean"] for r in runs] for a in arms] for s in ("safe", "unsafe")}
    panels.append(Panel("O4: Lipschitzness", partial(draw, steep)))
    outside = {"share": [[share(r, a)[0] for r in runs] if a in tuned else [] for a in arms]}
    chance = [(share(runs[0], tuned[0])[1], "chance")]
    panels.append(Panel("O2: ΔW outside span(W)", partial(draw, outside), levels=chance))
    ratio = {"ratio": [[gain_ratio(r, a) for r in runs] if a in tuned else [] for a in arms]}
    panels.append(Panel("O3: gain, unsafe / safe", partial(draw, ratio), levels=[(1.0, "chance")]))
    for panel in panels:
        panel.ticks = dict(enumerate(names))
    figure = draw_panels(panels, 2.9, 2.9, columns=5, legend_columns=8)
    for tick in (tick for ax in figure.axes for tick in ax.get_xticklabels()):
        tick.set(rotation=30, ha="right", rotation_mode="anchor")
    return figure


# ----------------------------------------------------------------------------------------------------------------- page

_GLOSSARY = (
    "Safe: an operator that is allowed on this kind of text, to be executed. Unsafe: one that is not, to be answered "
    "with the null token. Protocols: SSFT (supervised safety fine-tuning), DPO and unlearning, at a medium and a small "
    "learning rate; the baseline was tuned further on instructions only. Jailbreaks are unsafe in new ways: JB-CO-Task "
    "mixes a safe and an unsafe operator, JB-CO-Text mixes the two kinds of text, JB-MisGen uses synonyms of operators "
    "or texts that were not seen in safety tuning."
)

_INTRODUCTIONS = {
    "study": "A small language model learns to apply operators to texts, then to refuse some operators on some texts. "
    "This page redraws the figures of Jain et al. (arXiv 2407.10264) for it, with chance levels and baselines.",
    "measure": "The same measurements as in the study of the synthetic world (Jain et al., arXiv 2407.10264), on real "
    "checkpoints. Nothing here is a verdict on a model's safety: behaviour is what spf eval measures.",
}

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


def _rate_cell(rates: Sequence[Mapping[str, Any]]) -> Cell:
    """One rate with its Wilson interval, or over several seeds the mean and their range."""
    values = [100 * rate["value"] for rate in rates]
    low, high = (100 * v for v in rates[0]["interval"]) if len(rates) == 1 else (min(values), max(values))
    return Cell(f"{_mean(values):.1f}", (f"{low:.1f}–{high:.1f}",))


READINGS = {
    "free_running": "Free running: the model's own greedy answer (%)",
    "teacher_forced": "Teacher-forced tokens (the paper's accuracy) (%)",
    "first_token": "First token (%)",
}


def success_table(many: Sequence[Run], reading: str) -> Table:
    """How often each model executes the prompts of each set, or refuses the unsafe ones, by one reading."""
    evaluations = [r["evaluation"] for r in many]
    sets = {s: "null" if s == "unsafe" else "instruct" for s in next(iter(evaluations[0].values()))}
    rows = [
        [Cell(label(m)), *(_rate_cell([e[m][s][kind][reading] for e in evaluations]) for s, kind in sets.items())]
        for m in evaluations[0]
    ]
    return Table(["Model", *(f"{label(s)}: {'refused' if s == 'unsafe' else 'executed'}" for s in sets)], rows)


def data_table(many: Sequence[Run]) -> Table:
    """What is known of the texts, a column a seed."""

    def flat(name: str, content: Any) -> dict[str, Any]:
        if not isinstance(content, Mapping):
            return {name: content}
        return {k: v for key, value in content.items() for k, v in flat(f"{name} {key}".strip(), value).items()}

    columns = [flat("", r["data"]) for r in many]
    rows = [[name, *(_short(column.get(name)) for column in columns)] for name in columns[0]]
    return of_text(["", *(f"seed {i + 1}" for i in range(len(many)))], rows)


def gradient_table(runs: Sequence[Run]) -> Table:
    """Rank, cosine and overlap of the safety gradient, a row a model; in brackets, chance."""
    k = runs[0]["gradients"]["k"]
    head = ["Model", "effective rank, safety", "utility", f"CER({k}), safety", "utility", "cosine of the two"]
    head += [f"{what}, {side}" for what in ("overlap with before", "update's share") for side in ("left", "right")]
    rows = []
    for name in _models(runs[0]):
        many = [run["gradients"]["models"][name] for run in runs]
        keys = ["effective_rank_safety", "effective_rank_utility", "cer_safety", "cer_utility", "cosine"]
        row = [label(name), *(_spread_text([m[key] for m in many]) for key in keys)]
        for what in ("overlap", "update"):
            for side in ("left", "right"):
                if name == "base" or many[0][f"{what}_{side}"] is None:
                    row.append("")
                else:
                    chance = _mean([m[f"chance_{side}"] for m in many])
                    row.append(f"{_spread_text([m[f'{what}_{side}'] for m in many])} ({chance:.2g})")
        rows.append(row)
    return of_text(head, rows)


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
    first, config = many[0], runs[0]["config"]
    study = first.get("kind") != "measure"
    found = [claims(r) for r in many] if study else []

    def pictures(*draws: Callable[[Any], Figure], of: Sequence[Run] = runs) -> list[Picture]:
        made = []
        for draw in draws:
            name = draw.__name__.removeprefix("plot_").replace("_", "-")
            path = save_figure(draw(of), Path(directory) / "plots" / f"{name}.png", dpi=130)
            made.append(Picture((draw.__doc__ or "").split("\n")[0], path.read_bytes()))
        return made

    parts: list[tuple[str, str, Any, list[Picture], str]] = []

    def part(title: str, words: str, *draws: Callable[[Any], Figure], of: Sequence[Run] = runs, **more: Any) -> None:
        shown = pictures(*draws, of=of)
        parts.append((title, _WORDS.get(words, ""), more.get("table"), shown, more.get("note", "")))

    clusters = "Do safe and unsafe prompts form clusters?"
    part(clusters, "tau", plot_tau, plot_tau_layers, plot_separation, note=_positions(config))
    if _kinds(runs[0]):
        part("Where does the update write?", "angles", plot_angles, plot_null_space)
    if any(any(u["rows"]) for u in runs[0]["updates"].values()):
        part("What does the update listen to?", "rows", plot_rows, plot_gains)
    part("How steep is the model?", "lipschitz", plot_lipschitz_means, plot_lipschitz)
    part("Did the activations turn?", "spans", plot_spans)
    if runs[0].get("gradients"):
        part("The safety gradient", "gradients", table=gradient_table(runs))
    if runs[0]["alpha"]:
        part("What if the update is scaled?", "alpha", plot_alpha)
    if first.get("attack"):
        part("Adversarial attack", "attack", plot_attack, of=many)
    if first.get("bridge"):
        part("The bridge: fine-tuning with and without the null-space rule", "bridge", plot_bridge, of=many)
    if first.get("training"):
        part("Training", "", plot_training, of=many)
    facts = {**first.get("versions", {}), **{k: v for k, v in config.items() if not isinstance(v, Mapping)}}
    facts |= {k: first[k] for k in ("machine", "seconds", "safe", "unsafe", "seed") if k in first}
    return write_page(
        "study",
        Path(directory) / "report.html",
        title="What safety fine-tuning does inside a model" if study else "Inside a model before and after fine-tuning",
        subtitle=_subtitle(first, f"{len(many)} seeds" if len(many) > 1 else "one run"),
        introduction=_INTRODUCTIONS["study" if study else "measure"],
        glossary=_GLOSSARY,
        claims=claims_table(found) if study else None,
        held=sum(all(c.holds for c in per_seed) for per_seed in zip(*found, strict=True)),
        summary=summary_table(runs),
        columns=[(name, f"{said}.") for name, said in COLUMNS],
        several=len(many) > 1,
        success={t: success_table(many, r) for r, t in READINGS.items()} if first.get("evaluation") else {},
        parts=parts,
        data=data_table(many) if first.get("data") else None,
        command=first.get("command"),
        facts=facts,
    )


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
