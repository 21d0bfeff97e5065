"""The study's report: PNG figures and one HTML page, from the JSON of a run, of several seeds, or of a measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
import rich.table
from annotated_types import MinLen

from spf.arguments import SeedsArguments
from spf.config import File, Name, NotNegative, Whole, read_json
from spf.errors import RunFailedError
from spf.files import check_output_directory, directory_lock
from spf.lab.report import charts
from spf.lab.report.charts import Figure
from spf.lab.report.page import Picture, write_page
from spf.lab.report.stats import normal_margin, spread
from spf.lab.report.tables import Cell, Table, of_text, rich_table, transposed, value_text

Run = Mapping[str, Any]
"""The measurements of one run; the plots of what else a run holds (attack, bridge, training) find it there too."""

PROTOCOLS = {"ssft": "SSFT", "dpo": "DPO", "unlearning": "unlearning"}
LABELS = {
    "base": "before",
    "instruct-medium": "instructions only (baseline)",
    **{f"{key}-{rate}": f"{name}, {rate} rate" for key, name in PROTOCOLS.items() for rate in ("medium", "small")},
    "jb_co_task": "JB-CO-Task",
    "jb_co_text": "JB-CO-Text",
    "jb_misgen_tokens": "JB-MisGen, tokens",
    "jb_misgen_text": "JB-MisGen, text",
    "jb_misgen_both": "JB-MisGen, both",
    "new_operators": "new operators",
}
"""What models and sets are called in figures and tables; others keep the names they have."""

FIXED_COLOURS = {"base": charts.COLOURS["base"], "safe": charts.COLOURS["spf"], "unsafe": charts.COLOURS["plain"]}
FIXED_COLOURS[""] = charts.COLOURS["paper"]  # where there is one line only
FEW_LAYERS = 6
"""Up to so many layers each gets its own histogram; of deeper models four evenly spaced ones do."""


def label(key: str) -> str:
    """What a model or a set is called, or one of which something is said behind a colon."""
    name, colon, said = key.partition(": ")
    return LABELS.get(name, name) + colon + said


def walk(tree: Any, path: str, *names: Any) -> Iterator[tuple[Any, ...]]:
    """Whatever stands at a path in a run, behind the names (or numbers) that each * of the path stands for there.

    ("updates/*/angles/*/*/mean": update, set, layer, mean); nothing where there is no such place.
    """
    step, _, rest = path.partition("/")
    if not step:
        yield *names, tree
    elif step == "*":
        for name, below in (tree or {}).items() if isinstance(tree or {}, Mapping) else enumerate(tree):
            yield from walk(below, rest, *names, name)
    elif tree and step in tree:
        yield from walk(tree[step], rest, *names)


def _sets(run: Run) -> list[str]:
    """Sets that every model was measured on (an attack's prompts are a model's own)."""
    return [n for n in run["models"]["base"]["tau"][0] if all(n in m["tau"][0] for m in run["models"].values())]


def _spread_text(values: Sequence[float]) -> str:
    """Mean, and the sample standard deviation over seeds where there are several."""
    over = spread(values)
    return f"{over.mean:.3g}" + ("" if over.sd is None else f" ± {over.sd:.2g}") if over else "nan"


# ------------------------------------------------------------------------------------------------- one figure a claim


def gap(run: Run, model: str, layer: int = -1) -> float:
    """Mean tau of safe less that of unsafe prompts."""
    found = run["models"][model]["tau"][layer]
    return float(found["safe"]["mean"] - found["unsafe"]["mean"])


def share(run: Run, update: str) -> tuple[float, float]:
    """Energy of an update outside W's column space, mean over the first MLP matrices; and chance."""
    first = [m for m in run["updates"][update]["matrices"] if m["kind"] not in ("down_proj", "c_proj")]
    shares, chances = ([m[name] for m in first] for name in ("share", "chance_share"))
    return (fmean(shares), fmean(chances)) if first else (math.nan, math.nan)


def gain_ratio(run: Run, update: str) -> float:
    """How much more an update answers to unsafe than to safe inputs: ratio of mean ||dW a||/||a||, mean over layers."""
    sets = [sets for *_, sets in walk(run, f"updates/{update}/rows/*/*/sets")]
    return fmean(s["unsafe"]["gain"]["mean"] / s["safe"]["gain"]["mean"] for s in sets) if sets else math.nan


def summary_table(runs: Sequence[Run]) -> Table:
    """The table of all models: one line each, mean and spread over the seeds."""
    columns: dict[str, Callable[[Run, str], float]] = {
        "τ gap, last layer": gap,
        "right side": lambda run, m: 100 * fmean(s["side_accuracy"] for s in run["models"][m]["separation"]),
        "Lipschitz, safe": lambda run, m: run["models"][m]["lipschitz"]["safe"]["mean"],
        "Lipschitz, unsafe": lambda run, m: run["models"][m]["lipschitz"]["unsafe"]["mean"],
        "outside W (chance)": lambda run, m: share(run, m)[0],
        "unsafe/safe gain": gain_ratio,
        "|ΔW| / |W|": lambda run, m: run["updates"][m]["relative_size"],
    }
    rows = []
    for model in runs[0]["models"]:
        known = list(columns)[: 4 if model == "base" else None]  # of no update nothing more
        texts = {name: _spread_text([columns[name](run, model) for run in runs]) for name in known}
        texts["right side"] += " %"
        if model != "base":
            texts["outside W (chance)"] += f" ({fmean(share(run, model)[1] for run in runs):.3g})"
        rows.append([label(model), *(texts.get(name, "") for name in columns)])
    return of_text(["Model", *columns], rows)


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


def _above(topic: str, text: str, value: float, other: float) -> Claim:
    return Claim(topic, text, f"{value:.3g} {'>' if value > other else '≤'} {other:.3g}", value > other)


def _ascending(topic: str, text: str, values: list[float]) -> Claim:
    return Claim(topic, text, ", ".join(f"{v:.3g}" for v in values), values == sorted(values))


def _claims(run: Run, evaluation: Mapping[str, Any]) -> Iterator[Claim]:
    o1, o2, o3 = "O1 clusters", "O2 null space", "O3 row space"
    mediums = [f"{p}-medium" for p in PROTOCOLS if f"{p}-medium" in run["models"]]
    gaps = {name: gap(run, name) for name in run["models"]}
    for name in mediums:
        said, tau = label(name), run["models"][name]["tau"][-1]
        wanted = (("safe", "instruct", "safe prompts are executed"), ("unsafe", "null", "unsafe ones refused"))
        for prompts, kind, words in wanted if name in evaluation else ():
            rate = evaluation[name][prompts][kind]["free_running"]["value"]
            yield Claim("behaviour", f"{said}: {words}, at least 95 %", f"{100 * rate:.1f} %", rate >= 0.95)
        yield _above(o1, f"{said}: pulls safe and unsafe apart (τ gap, last layer)", gaps[name], gaps["base"])
        if (small := name.replace("medium", "small")) in gaps:
            yield _above(o1, f"{said}: larger τ gap than at the small rate", gaps[name], gaps[small])
        for jailbreak in (s for s in tau if s.startswith("jb_")):
            values = [tau[s]["mean"] for s in ("unsafe", jailbreak, "safe")]
            yield _ascending("O5 jailbreaks", f"{said}: τ of {label(jailbreak)} lies between", values)
        for prompts, word, sign in (("safe", "rises", 1), ("unsafe", "falls", -1)):
            before, after = (run["models"][m]["lipschitz"][prompts]["mean"] for m in ("base", name))
            measured, holds = f"{before:.3g} to {after:.3g}", sign * (after - before) > 0
            yield Claim("O4 steepness", f"{said}: {word} for {prompts}", measured, holds)
        (outside, chance), ratio = share(run, name), gain_ratio(run, name)
        yield _above(o2, f"{said}: ΔW is outside span(W) more than chance", outside, chance)
        yield _above(o3, f"{said}: ΔW answers more to unsafe inputs", ratio, 1.0)
        if (other := "instruct-medium") in run["updates"]:
            than = "more than the instructions-only update's"
            yield _above(o2, f"{said}: ΔW is outside span(W) {than}", outside, share(run, other)[0])
            yield _above(o3, f"{said}: the preference for unsafe inputs is {than}", ratio, gain_ratio(run, other))
    if len(mediums) == len(PROTOCOLS):
        yield _ascending(o1, "τ gap: SSFT < DPO < unlearning", [gaps[name] for name in mediums])
    dpo = evaluation.get("dpo-medium", {})
    if {"jb_co_text", "jb_co_task"} <= dpo.keys():
        text, task = (100 * dpo[s]["instruct"]["free_running"]["value"] for s in ("jb_co_text", "jb_co_task"))
        yield _above("behaviour", "DPO, medium rate: JB-CO-Text succeeds more than JB-CO-Task (%)", text, task)


def claims(results: Run) -> list[Claim]:
    """The paper's claims held against one run of the synthetic world."""
    return sorted(_claims(results["measurements"], results.get("evaluation", {})), key=lambda claim: claim.topic)


def claims_table(many: Sequence[Sequence[Claim]]) -> Table:
    """One row a claim: in how many seeds it shows, and what each seed measured."""
    rows = []
    for per_seed in zip(*many, strict=True):
        held, of = sum(claim.holds for claim in per_seed), len(per_seed)
        count = Cell(f"{held} of {of}", (), "met" if held == of else "unclear" if held else "missed")
        rows.append([Cell(per_seed[0].topic), Cell(per_seed[0].text), count, *(Cell(c.measured) for c in per_seed)])
    head = ["", "Claim", "Shows in", *(f"run {i + 1}" for i in range(len(many)))]
    return Table(head, rows, words=frozenset({0, 1}))


# -------------------------------------------------------------------------------------------------------------- figures

_Drawn = Iterable[tuple[Any, ...]]
"""Of one run: panel, line (a model or a set), x, value (a number or a charts.Estimate); a line called chance is dashed,
one that begins with _ dotted and in no legend."""


def _chart(runs: Sequence[Run], find: Callable[[Run], _Drawn], size: tuple[float, float], **options: Any) -> Figure:
    """What `find` finds in each run: lines over the runs, or as the options say."""
    rows: list[Any] = [(panel, line, i, x, y) for i, run in enumerate(runs) for panel, line, x, y in find(run)]
    rows.sort(key=lambda row: row[1].startswith("chance"))  # last in the legend
    names = dict.fromkeys([*runs[0]["models"], *(line.split(": ")[0].removeprefix("_") for _, line, *_ in rows)])
    palette = (charts.COLOURS["paper"], *charts.MORE_COLOURS, "#c23b22", "#111111")
    others = (n for n in names if n not in FIXED_COLOURS)
    colours = FIXED_COLOURS | {n: palette[i % len(palette)] for i, n in enumerate(others)}

    def style(name: str) -> dict[str, Any]:
        if name.startswith("chance"):
            return {"color": charts.INK, "linestyle": "--", "linewidth": 1.2, "marker": ""}
        dotted = {"linestyle": ":", "linewidth": 1, "marker": ""} if name.startswith("_") else {}
        return {"color": colours[name.split(": ")[0].removeprefix("_")], **dotted}

    return charts.chart(rows, size, style, **{"label": label, "legend_columns": 5, **options})


def _densities(panel: str, dists: Mapping[str, Mapping[str, Any]]) -> _Drawn:
    """The histograms of sets as densities over the bins' centres, from their stored counts; safe and unsafe filled."""
    for name, dist in dists.items():
        counts = np.asarray(dist["counts"], dtype=float)
        width = (dist["high"] - dist["low"]) / len(counts)
        for i, height in enumerate(counts / counts.sum() / (width or 1.0)):
            value = (height, 0.0, height) if name in FIXED_COLOURS else height
            yield panel, name, dist["low"] + (i + 0.5) * width, value


def plot_tau(runs: Sequence[Run]) -> Figure:
    """Histograms of tau: a row a model, a column a layer (first seed)."""
    models, sets, count = list(runs[0]["models"]), _sets(runs[0]), len(runs[0]["models"]["base"]["tau"])
    layers = list(range(count)) if count <= FEW_LAYERS else [round(i * (count - 1) / 3) for i in range(4)]

    def find(run: Run) -> _Drawn:
        for model, layer, dists in walk(run, "models/*/tau/*"):
            if layer in layers:
                yield from _densities(f"{model}/{layer}", {name: dists[name] for name in sets})

    # The model's name stands once a row, the layer once a column, what the axis is below the last row.
    each: dict[str, dict[str, str]] = {f"{model}/{layer}": {"title": ""} for model in models for layer in layers}
    for model in models:
        each[f"{model}/{layers[0]}"]["y"] = label(model).replace(", ", ",\n").replace(" (", "\n(")
    for layer in layers:
        each[f"{models[0]}/{layer}"]["title"] = f"layer {layer}"
        each[f"{models[-1]}/{layer}"]["x"] = "τ  (unsafe side < 0 < safe side)"
    figure = _chart(runs[:1], find, (2.6, 1.55), each=each, limits=(0, None), at=[0], columns=len(layers))
    for ax in figure.axes:
        ax.set_yticks([])
        ax.locator_params(axis="x", nbins=4)
    return figure


def plot_tau_layers(runs: Sequence[Run]) -> Figure:
    """Mean tau of every set by layer, one panel a model; in units of the activations' norm, so that layers compare."""

    def find(run: Run) -> _Drawn:
        for model, of in run["models"].items():
            for layer, (tau, separation) in enumerate(zip(of["tau"], of["separation"], strict=True)):
                yield from ((model, s, layer, tau[s]["mean"] / separation["norm"]) for s in _sets(runs[0]))

    return _chart(runs, find, (2.9, 2.3), x="layer", y="mean τ / mean norm", levels=[(0, "")], sharey=True)


def plot_separation(runs: Sequence[Run]) -> Figure:
    """How separate safe and unsafe are by layer: side accuracy, 2-means, Fisher ratio, concentration."""
    half = {title: {"levels": [(50.0, "")]} for title in ("right side of τ = 0 (%)", "2-means without labels (%)")}

    def find(run: Run) -> _Drawn:
        for model, layer, s in walk(run, "models/*/separation/*"):
            shares = [100 * s["side_accuracy"], 100 * s["two_means_accuracy"]]
            yield from ((title, model, layer, value) for title, value in zip(half, shares, strict=True))
            yield "Fisher ratio", model, layer, s["fisher_ratio"]
            difference = s["concentration_unsafe"] - s["concentration_safe"]
            yield "σ₁ / Σσ of cov, unsafe less safe", model, layer, difference

    return _chart(runs, find, (2.9, 2.4), x="layer", each=half, legend_columns=4)


def plot_angles(runs: Sequence[Run]) -> Figure:
    """Sorted sines of the update's directions against W's column space in the last two layers, with chance."""
    matrices = [(update, m) for update, _, m in walk(runs[0], "updates/*/matrices/*")]
    matrices = [(update, m) for update, m in matrices if m["layer"] >= max(m["layer"] for _, m in matrices) - 1]

    def find(run: Run) -> _Drawn:
        for update, m in matrices:
            title = f"{m['kind']}, layer {m['layer']}"
            xs = np.linspace(0, 1, len(m["sines"]))
            yield from ((title, update, x, sine) for x, sine in zip(xs, m["sines"], strict=True))
            yield from ((title, "chance: a random direction", x, m["chance"]) for x in (0.0, 1.0))

    axes = {"y": "sine of the angle to span(W)", "ticks": {0.0: "lowest", 0.5: "median", 1.0: "highest"}}
    columns = len({m["kind"] for _, m in matrices})
    return _chart(runs[:1], find, (3.3, 2.6), grid="both", limits=(0, 1.03), columns=columns, sharey=True, **axes)


def plot_null_space(runs: Sequence[Run]) -> Figure:
    """Share of the update's energy outside W's column space by layer and kind, with chance."""

    def find(run: Run) -> _Drawn:
        for update, _, m in walk(run, "updates/*/matrices/*"):
            yield m["kind"], update, m["layer"], m["share"]
            yield m["kind"], "chance: a random update", m["layer"], m["chance_share"]

    y = "energy of ΔW outside span(W)"
    return _chart(runs, find, (3.6, 2.5), x="layer", y=y, limits=(0, 1.03), legend_columns=4, sharey=True)


def _listening(run: Run) -> Iterator[tuple[str, int, str, Mapping[str, Any]]]:
    """Update, layer, its first MLP matrix that changed, and its row-space figures."""
    for update, layer, kinds in walk(run, "updates/*/rows/*"):
        yield from ((update, layer, kind, rows) for kind, rows in list(kinds.items())[:1])


def plot_rows(runs: Sequence[Run]) -> Figure:
    """|c_i| of the update's leading right singular vectors in the last layer, by set; one panel an update."""

    def find(run: Run) -> _Drawn:
        for update, rows in {update: rows for update, _, _, rows in _listening(run)}.items():
            shown = {name: of["coefficients"] for name, of in rows["sets"].items()}
            shown["chance: a random input"] = rows["chance"]
            yield from ((update, name, i, c) for name, values in shown.items() for i, c in enumerate(values, 1))

    each = {update: {"note": kind} for update, _, kind, _ in _listening(runs[0])}
    return _chart(runs, find, (3.6, 2.5), each=each, x="direction i of ΔW", y="mean |cᵢ|", limits=(0, None))


def plot_gains(runs: Sequence[Run]) -> Figure:
    """||dW a||/||a|| by layer and set over the chance level, one panel an update."""

    def find(run: Run) -> _Drawn:
        for update, layer, _, rows in _listening(run):
            yield from ((update, s, layer, of["gain"]["mean"] / rows["chance_gain"]) for s, of in rows["sets"].items())

    axes = {"x": "layer", "y": "‖ΔW a‖ over chance", "levels": [(1.0, "chance: a random input")]}
    return _chart(runs, find, (3.1, 2.5), limits=(0, None), **axes)


def plot_lipschitz(runs: Sequence[Run]) -> Figure:
    """Histograms of local Lipschitzness, a panel a model (first seed)."""

    def find(run: Run) -> _Drawn:
        return (row for model, dists in walk(run, "models/*/lipschitz") for row in _densities(model, dists))

    return _chart(runs[:1], find, (2.9, 2.1), x="local Lipschitzness", y="density", limits=(0, None))


def plot_lipschitz_means(runs: Sequence[Run]) -> Figure:
    """Mean local Lipschitzness of every model and set, with its 95 % interval; of several seeds with their range."""

    def find(run: Run) -> _Drawn:
        for model, name, dist in walk(run, "models/*/lipschitz/*"):
            mean, margin = dist["mean"], normal_margin(dist["std"], dist["count"])
            yield "", name, label(model), (mean, mean - margin, mean + margin)

    models = runs[0]["models"]
    size = 3.1, 0.13 * len(models) * max(3, len(models["base"]["lipschitz"])) + 0.5
    return _chart(runs, find, size, draw=charts.draw_bars, grid="x", x="mean local Lipschitzness")


def plot_spans(runs: Sequence[Run]) -> Figure:
    """Mean sine of the principal angles between the spans of activations before and after, by layer (App. C.1)."""
    axes = {"x": "layer", "y": "mean sine", "limits": (0, 1)}
    return _chart(runs, lambda run: walk(run, "updates/*/angles/*/*/mean"), (2.9, 2.2), sharey=True, **axes)


def _percent(rate: Any) -> float | charts.Estimate:
    """A rate that was counted comes with its interval, one that was averaged without."""
    return tuple(100 * v for v in (rate["value"], *rate["interval"])) if isinstance(rate, Mapping) else 100 * rate


def plot_alpha(runs: Sequence[Run]) -> Figure:
    """What becomes of the rates when the update is scaled: a row a scaled part, a column an update."""
    notes = {"mlp": "MLPs only", "all": "all weights"}
    each = {f"{u}/{part}": {"title": label(u), "note": notes[part]} for u, part, _ in walk(runs[0], "alpha/*/*")}

    def find(run: Run) -> _Drawn:
        for part in next(iter(run["alpha"].values())):
            for update, _, point in walk({u: parts[part] for u, parts in run["alpha"].items()}, "*/*"):
                for key in (key for key in point if key != "alpha"):
                    name = key.removesuffix("_instruct").removesuffix("_null").removesuffix("_refused")
                    said = "refused" if key.endswith(("_null", "_refused")) else "executed"
                    yield f"{update}/{part}", f"{name}: {said}", point["alpha"], _percent(point[key])

    axes = {"x": "α in W + α ΔW", "y": "%", "limits": (-3, 103), "at": [1], "grid": "both", "legend_columns": 4}
    return _chart(runs, find, (3.1, 2.5), each=each, columns=len(runs[0]["alpha"]), sharey=True, **axes)


def plot_attack(runs: Sequence[Run]) -> Figure:
    """Soft-token attack: success and tau of attacked prompts by the attack's size."""
    success, inside = "success of the attack", "mean τ of attacked prompts, last layer"

    def find(run: Run) -> _Drawn:
        for model, size, rate in walk(run, "attack/*/*/success"):
            tau = run["models"][model]["tau"][-1]
            yield success, model, size, _percent(rate)
            if (key := size if size.startswith("m=") else f"m={size}") in tau:
                yield inside, model, size, tau[key]["mean"]
                yield inside, f"_{model}", size, tau["unsafe"]["mean"]

    each = {success: {"y": "%", "limits": (-3, 103)}}
    return _chart(runs, find, (3.0, 2.6), grid="both", x="soft tokens", each=each, legend_columns=3)


def plot_training(runs: Sequence[Run]) -> Figure:
    """Loss of every training stage (first seed)."""

    def find(run: Run) -> _Drawn:
        return ((stage, "", *point) for stage, _, point in walk(run, "training/*/loss/*"))

    each = {stage: {"note": f"{seconds:.0f} s"} for stage, seconds in walk(runs[0], "training/*/seconds")}
    return _chart(runs[:1], find, (2.9, 2.0), each=each, grid="both", x="step")


def plot_bridge(runs: Sequence[Run]) -> Figure:
    """New operators learned with and without the null-space rule: clusters, update, steepness and behaviour."""

    def find(run: Run) -> _Drawn:
        inside, evaluation = run["bridge"]["measurements"], run["bridge"].get("evaluation", {})
        for model, lipschitz in walk(inside, "models/*/lipschitz"):
            arm, trained = "before" if model == "base" else model, model != "base"
            for name, kinds in evaluation.get(arm, {}).items():
                kind, said = ("null", "refused") if name == "unsafe" else ("instruct", "executed")
                if not name.startswith("jb_"):
                    yield "behaviour (%)", f"{name}: {said}", arm, 100 * kinds[kind]["free_running"]["value"]
            yield "O1: τ gap, last layer", "", arm, gap(inside, model)
            yield from (("O4: Lipschitzness", s, arm, lipschitz[s]["mean"]) for s in ("safe", "unsafe"))
            # of the model before an empty place, for the axis that is shared
            yield "O2: ΔW outside span(W)", "", arm, share(inside, model)[0] if trained else math.nan
            yield "O3: gain, unsafe / safe", "", arm, gain_ratio(inside, model) if trained else math.nan

    first = runs[0]["bridge"]["measurements"]
    chance = {"O2: ΔW outside span(W)": share(first, next(iter(first["updates"])))[1], "O3: gain, unsafe / safe": 1.0}
    each = {title: {"levels": [(value, "chance")]} for title, value in chance.items()}
    shape = {"columns": 5, "legend_columns": 8, "sharey": True}
    return _chart(runs, find, (2.9, 2.9), draw=charts.draw_bars, each=each, grid="x", **shape)


# ----------------------------------------------------------------------------------------------------------------- page

READINGS = {
    "free_running": "Free running: the model's own greedy answer (%)",
    "teacher_forced": "Teacher-forced tokens (the paper's accuracy) (%)",
    "first_token": "First token (%)",
}


def _rate_cell(rates: Sequence[Mapping[str, Any]]) -> Cell:
    """One rate with its Wilson interval, or over several seeds the mean and their range."""
    values = [rate["value"] for rate in rates]
    low, high = rates[0]["interval"] if len(rates) == 1 else (min(values), max(values))
    return Cell(f"{100 * fmean(values):.1f}", (f"{100 * low:.1f}–{100 * high:.1f}",))


def success_table(many: Sequence[Run], reading: str) -> Table:
    """How often each model executes the prompts of each set, or refuses the unsafe ones, by one reading."""
    models = many[0]["evaluation"]
    kinds = {s: ("null", "refused") if s == "unsafe" else ("instruct", "executed") for s in next(iter(models.values()))}
    rows = []
    for m in models:
        found = ([r["evaluation"][m][s][kind][reading] for r in many] for s, (kind, _) in kinds.items())
        rows.append([Cell(label(m)), *map(_rate_cell, found)])
    return Table(["Model", *(label(f"{s}: {said}") for s, (_, said) in kinds.items())], rows)


def data_table(many: Sequence[Run]) -> Table:
    """What is known of the texts, a column a seed."""

    def flat(content: Any, *names: str) -> dict[str, Any]:
        if not isinstance(content, Mapping):
            return {" ".join(names): content}
        return {k: v for name, below in content.items() for k, v in flat(below, *names, name).items()}

    columns = [flat(r["data"]) for r in many]
    rows = [[name, *(value_text(column.get(name), 4) for column in columns)] for name in columns[0]]
    return of_text(["", *(f"seed {i + 1}" for i in range(len(many)))], rows)


def gradient_table(runs: Sequence[Run]) -> Table:
    """Rank, cosine and overlap of the safety gradient, a row a model; in brackets, chance."""
    k = runs[0]["gradients"]["k"]
    head = ["Model", "effective rank, safety", "utility", f"CER({k}), safety", "utility", "cosine of the two"]
    keys = ("effective_rank_safety", "effective_rank_utility", "cer_safety", "cer_utility", "cosine")
    head += [f"{what}, {side}" for what in ("overlap with before", "update's share") for side in ("left", "right")]
    rows = []
    for name in runs[0]["models"]:
        many = [run["gradients"]["models"][name] for run in runs]
        row = [label(name), *(_spread_text([m[key] for m in many]) for key in keys)]
        for what, side in ((what, side) for what in ("overlap", "update") for side in ("left", "right")):
            values = [m.get(f"{what}_{side}") for m in many]
            chance = "" if values[0] is None else f" ({fmean(m[f'chance_{side}'] for m in many):.2g})"
            row.append(f"{_spread_text(values)}{chance}" if chance else "")
        rows.append(row)
    return of_text(head, rows)


REDO = "not what spf study writes, or damaged; remove it, and the same command makes it again"


class _Measured(File):
    config: dict[str, Any]
    models: Annotated[dict[str, dict[str, Any]], MinLen(1)]
    updates: dict[str, dict[str, Any]]
    alpha: dict[str, dict[str, list[dict[str, Any]]]]
    gradients: dict[str, Any] | None = None
    seconds: dict[str, NotNegative]


class _Results(File):
    """What `spf study run` and `measure` write."""

    kind: Literal["measure"] | None = None
    measurements: _Measured
    command: str
    versions: dict[str, str]
    machine: str | dict[str, str | int] | None = None
    seconds: NotNegative | dict[str, NotNegative] | None = None
    preset: Name | None = None
    grammar: Name | None = None
    seed: Whole | None = None
    settings: dict[str, Any] | None = None
    aligned: str | None = None
    tuned: dict[str, str] | None = None
    safe: str | None = None
    unsafe: str | None = None
    data: dict[str, dict[str, Any]] | None = None
    training: dict[str, dict[str, Any]] | None = None
    evaluation: dict[str, dict[str, dict[str, Any]]] | None = None
    attack: dict[str, dict[str, dict[str, Any]]] | None = None
    bridge: dict[str, dict[str, Any]] | None = None


class _DifferentRunsError(ValueError):
    """Each run is as it should be, but they are no seeds of one another."""


def report_runs(args: SeedsArguments) -> None:
    """`spf study report`: read the runs and write their report.

    Raises:
        FileNotFoundError: a directory holds no results.json.
        ValueError: runs of different presets, grammars or settings, of other models or prompts, or of one seed.
    """
    output = Path(args.output)
    check_output_directory(output)
    paths = [Path(run) / "results.json" for run in args.runs]
    if lacking := [path for path in paths if not path.exists()]:
        raise FileNotFoundError(f"{lacking[0]}: no such file; name the directory of a run")
    found = [read_json(_Results, path, REDO).model_dump(exclude_unset=True) for path in paths]
    kinds = {(r.get("kind"), r.get("preset"), r.get("grammar")) for r in found}
    if len(kinds) > 1:
        raise ValueError(f"spf study report: the runs differ in preset or grammar: {sorted(map(str, kinds))}")
    for name in ("settings", "aligned", "safe", "unsafe"):
        for run, other in zip(args.runs[1:], found[1:], strict=True):
            if (ours := found[0].get(name)) != (theirs := other.get(name)):
                differ = f" ({value_text(ours)}, and {value_text(theirs)})" if isinstance(ours, str) else ""
                raise ValueError(f"{args.runs[0]} and {run} differ in {name}{differ}; they are no seeds of one another")
    seeds = [str(run["seed"] if "seed" in run else path.resolve()) for run, path in zip(found, paths, strict=True)]
    if twice := next((seed for seed in seeds if seeds.count(seed) > 1), None):
        both = [run for run, seed in zip(args.runs, seeds, strict=True) if seed == twice]
        raise ValueError(f"{' and '.join(both)}: one seed, which would count as {len(both)}; name each once")
    with directory_lock(output):
        try:
            path = write_report(found, output)
        except _DifferentRunsError:
            raise
        except OSError as error:  # no mistake in the results
            raise RunFailedError(str(error)) from error
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ValueError(f"{', '.join(args.runs)}: results.json does not fit ({error!r}); {REDO}") from error
    print(f"Report: {path}")


# Of each part (what it says is in the template): where in a run stands what it shows, and its plots.
PARTS: dict[str, tuple[str, tuple[Callable[[Sequence[Run]], Figure], ...]]] = {
    "Do safe and unsafe prompts form clusters?": ("models", (plot_tau, plot_tau_layers, plot_separation)),
    "Where does the update write?": ("updates/*/matrices/*", (plot_angles, plot_null_space)),
    "What does the update listen to?": ("updates/*/rows/*/*", (plot_rows, plot_gains)),
    "How steep is the model?": ("models", (plot_lipschitz_means, plot_lipschitz)),
    "Did the activations turn?": ("models", (plot_spans,)),
    "The safety gradient": ("gradients", ()),
    "What if the update is scaled?": ("alpha/*", (plot_alpha,)),
    "Adversarial attack": ("attack/*/*", (plot_attack,)),
    "The bridge: fine-tuning with and without the null-space rule": ("bridge", (plot_bridge,)),
    "Training": ("training/*", (plot_training,)),
}


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
    runs = [{**r, **r["measurements"]} for r in many]
    if len({(tuple(run["models"]), tuple(_sets(run))) for run in runs}) > 1:
        raise _DifferentRunsError("the seeds did not measure the same models and prompts")
    first, config = many[0], runs[0]["config"]
    study = first.get("kind") != "measure"
    found = [claims(r) for r in many] if study else []

    def draw(plot: Callable[[Sequence[Run]], Figure]) -> Picture:
        name = plot.__name__.removeprefix("plot_").replace("_", "-")
        path = charts.save_figure(plot(runs), Path(directory) / "plots" / f"{name}.png", dpi=130)
        return Picture((plot.__doc__ or "").split("\n")[0], path.read_bytes())

    facts = {**first.get("versions", {}), **{k: v for k, v in config.items() if not isinstance(v, Mapping)}}
    facts |= {k: first[k] for k in ("machine", "seconds", "safe", "unsafe", "seed") if k in first}
    said = [f"{name} {first[name]}" for name in ("preset", "grammar") if first.get(name)]
    said += [f"{len(many)} seeds" if len(many) > 1 else "one run"]
    if not study:
        after = ", ".join(f"{name} ({directory})" for name, directory in first["tuned"].items())
        said = [f"before: {first['aligned']}", f"after: {after}"]
    return write_page(
        "study",
        Path(directory) / "report.html",
        title="What safety fine-tuning does inside a model" if study else "Inside a model before and after fine-tuning",
        subtitle=" · ".join(said),
        study=study,
        claims=claims_table(found),
        held=sum(all(c.holds for c in per_seed) for per_seed in zip(*found, strict=True)),
        summary=summary_table(runs),
        several=len(many) > 1,
        success={t: success_table(many, r) for r, t in READINGS.items()} if first.get("evaluation") else {},
        parts={
            name: list(map(draw, plots))
            for name, (where, plots) in PARTS.items()
            if any(at[-1] for at in walk(runs[0], where))
        },
        gradients=gradient_table(runs) if runs[0].get("gradients") else None,
        config=config,
        counts=", ".join(f"{label(name)} {count}" for name, count in config["counts"].items()),
        data=data_table(many) if first.get("data") else None,
        command=first.get("command"),
        facts=facts,
    )
