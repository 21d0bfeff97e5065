"""The benchmark's cells, read and summarised: groups over seeds, paired differences, dominance, what is missing.

Everything is computed from the cells that ``spf bench`` writes, one JSON file a trained and evaluated model
(``DIR/<model>/<tuning>/<scenario>/<method>[@<variant>]/seed-<n>.json``).
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from spf.config import STRICT, Count, Ends, File, Interval, Name, NotNegative, Share, Whole, check, one_of, read_json
from spf.lab.bench.alike import FIRST_JUDGE, SETTINGS, Unlike, seeds_unlike, unlike
from spf.lab.bench.cell import Cell, Tuning
from spf.lab.bench.scenarios import SCENARIOS
from spf.lab.report.stats import Difference, Spread, normal_interval, pooled_difference, spread
from spf.lab.report.tables import join_words

DEFAULT_RULE = "null-space"
HEADLINE = ("plain", DEFAULT_RULE, "mix-rotating", "safegrad", "spf")
"""The methods of the README's plot, run in every scenario; the others are in the documentation."""

TASKS = {"sql_execution": "sql", "rouge_l": "summary"}
UTILITY_NAMES = {"sql": "SQL accuracy (%)", "summary": "ROUGE-L (× 100)", None: "Utility"}


# ----------------------------------------------------------------------------------------------------- cells


Bits = Annotated[str, Field(pattern="^[01]+$")]
"""A verdict a prompt."""


class _Rate(File):
    asr: Share
    asr_ci: Interval
    count: Count


class _Counts(File):
    harmful: Count
    benign: Count
    utility: Count | None = None


class _Verdicts(File):
    asr: Bits
    over_refusal: Bits
    utility: Bits | None
    foreign: Bits | None = None
    jailbreak: dict[str, Bits]


class _Task(File):
    utility: Share
    utility_ci: Ends | None = None
    metric: str | None = None
    count: Count | None = None
    verdicts: Bits | None = None
    values: list[Share] | None = None


class _Answers(File):
    """How far answers to harmless prompts are the aligned model's."""

    f1: Share
    f1_ci: Ends
    exact: Share
    chance: Share
    count: Count
    values: list[Share]

    @model_validator(mode="after")
    def figures_fit(self) -> "_Answers":
        if len(self.values) != self.count or not abs(statistics.fmean(self.values) - self.f1) < 1e-3:
            raise ValueError("`kept_answers.f1` must be the mean of its values, as many as its count says")
        return self


class _MadeFrom(File):
    """Hashes of the model directory's weights and of the file of prompts (`alike.made_from`)."""

    weights: str | None
    prompts: str | None


class _Step(BaseModel):
    """Of a curve or a history: what was measured at a step."""

    model_config = STRICT | {"extra": "allow"}
    __pydantic_extra__: dict[str, float | None]

    step: float


class _Cell(File):
    """What a cell's file holds."""

    model: Name
    tuning: Tuning
    scenario: Annotated[str, one_of((*SCENARIOS, "none"))]
    method: Name
    variant: Name
    seed: Whole
    config: dict[str, Any]
    versions: dict[str, str]
    machine: str
    judge: str = FIRST_JUDGE
    dtype: Literal["float32", "bfloat16"] | None = None
    made_from: _MadeFrom | None = None
    curve: list[_Step]
    history: list[_Step]
    asr: Share
    asr_ci: Interval
    over_refusal: Share
    over_refusal_ci: Interval
    perplexity: NotNegative | None
    jailbreak_asr: dict[str, _Rate]
    counts: _Counts
    verdicts: _Verdicts
    utility: Share | None
    utility_ci: Ends | None  # of a mean score: it may reach beyond
    utility_metric: Literal["sql_execution", "rouge_l"] | None
    utility_values: list[Share] | None = None
    utilities: dict[Literal["sql", "summary"], _Task] = Field(default_factory=dict)
    steps: Whole | None = None
    seconds_per_step: NotNegative | None = None
    train_seconds: NotNegative | None = None
    eval_seconds: NotNegative | None = None
    peak_memory_mb: NotNegative | None = None
    foreign: _Rate | None = None
    kept_answers: _Answers | None = None
    audit: dict[str, float] | None = None
    watched: dict[str, bool | list[Share]] | None = None
    directions: list[Whole] | None = None
    note: str | None = None
    notes: dict[str, Any] | None = None

    @model_validator(mode="after")
    def figures_fit(self) -> "_Cell":
        """The shares are those of the verdicts, which are as many as the counts say."""
        check(Cell, self.config, "`config.{}`")
        if "split" not in self.config:
            raise ValueError("`config.split` is missing")
        verdicts, counts = self.verdicts, self.counts
        rates: dict[str, tuple[float, str, int]] = {
            "asr": (self.asr, verdicts.asr, counts.harmful),
            "over_refusal": (self.over_refusal, verdicts.over_refusal, counts.benign),
        }
        if unlike := verdicts.jailbreak.keys() ^ self.jailbreak_asr.keys():
            raise ValueError(f"`jailbreak_asr.{min(unlike)}` must be given where its verdicts are")
        if self.foreign is not None:
            rates["foreign.asr"] = self.foreign.asr, verdicts.foreign or "", self.foreign.count
        for name, of in self.jailbreak_asr.items():
            rates[f"jailbreak_asr.{name}.asr"] = of.asr, verdicts.jailbreak[name], of.count
        for name in ("utility_metric", "utility_ci") if self.utility is not None else ():
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` must be given where `utility` is")
        if self.utility is not None and verdicts.utility is not None:
            rates["utility"] = self.utility, verdicts.utility, counts.utility or 0
        elif self.utility is not None:
            if len(values := self.utility_values or []) != counts.utility:
                raise ValueError("`utility_values` must be as many as `counts` says where there are no verdicts")
            if not abs((mean := statistics.fmean(values)) - self.utility) < 1e-3:
                raise ValueError(f"`utility` must be the mean of utility_values, {mean:.4f}, not {self.utility}")
        for field, (value, bits, count) in rates.items():
            if len(bits) != count:
                raise ValueError(f"`verdicts of {field}` must be {count} digits long, as `counts` says")
            if not abs((mean := bits.count("1") / count) - value) < 1e-3:
                raise ValueError(f"`{field}` must be the share of 1 in its verdicts, {mean:.4f}, not {value}")
        return self


_Key = tuple[str, str, str, str, str]
"""Model, tuning, scenario, method, variant."""


def _key(cell: Mapping[str, Any]) -> _Key:
    return cell["model"], cell["tuning"], cell["scenario"], cell["method"], cell["variant"]


def load_cell(path: Path) -> dict[str, Any]:
    """One cell from its file.

    Raises:
        ValueError: the file is no JSON, or a field is missing or wrong; the message names both.
    """
    read_json(_Cell, path, "remove it, and the same grid makes it anew")
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def load_cells(directory: str | Path) -> list[dict[str, Any]]:
    """The benchmark's cells: every ``seed-<n>.json`` below a directory, in the order of their paths.

    Raises:
        ValueError: no cell there, a file that is no JSON, a field that is missing or wrong, or two files for
            one cell; the message names file and field. Cells of the eval and the validation prompts together.
    """
    cells: list[dict[str, Any]] = []
    seen: dict[tuple[str | int, ...], Path] = {}
    for path in sorted(Path(directory).rglob("seed-*.json")):
        cell = load_cell(path)
        place = (*_key(cell), cell["seed"])
        if place in seen:
            raise ValueError(f"{path}: the same cell as {seen[place]} ({', '.join(map(str, place))})")
        seen[place] = path
        cells.append(cell)
    if not cells:
        raise ValueError(f"{directory}: holds no benchmark cells (<model>/<tuning>/<scenario>/<method>/seed-<n>.json)")
    if len({cell["config"]["split"] for cell in cells}) > 1:
        raise ValueError(f"{directory}: mixes cells of the eval and the validation prompts in `config.split`")
    return cells


# --------------------------------------------------------------------------------------------------- summary


@dataclass(frozen=True)
class Group:
    """The cells that differ in the seed only.

    metrics: asr, foreign (ASR on requests of the attack's kind), over_refusal, utility, perplexity, peak_memory_mb,
    jailbreak/<name>, kept/f1, kept/exact and kept/chance, and for the aligned model utility/sql and utility/summary;
    shares from 0 to 1; what was not measured is left out. differences: asr, foreign, over_refusal and
    jailbreak/<name> less the aligned model's, utility and kept/f1 less plain's.
    task: what the utility was measured on, sql, summary or None. unlike: of `aligned` and `plain` those that the cells
    cannot be compared with, so that there are no differences, and in what they differ.
    """

    model: str
    tuning: str
    scenario: str
    method: str
    variant: str
    cells: tuple[Mapping[str, Any], ...]
    metrics: Mapping[str, Spread]
    differences: Mapping[str, Difference]
    task: str | None
    unlike: Mapping[str, Unlike]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(cell["seed"] for cell in self.cells)

    @property
    def name(self) -> str:
        return self.method if self.variant == "default" else f"{self.method}@{self.variant}"


def _shares(cell: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """The shares of a cell that are compared with the aligned model's: value and verdicts."""
    verdicts = cell["verdicts"]
    found = {name: (cell[name], verdicts[name]) for name in ("asr", "over_refusal")}
    if (foreign := cell.get("foreign")) is not None:
        found["foreign"] = foreign["asr"], verdicts["foreign"]
    return found | {f"jailbreak/{n}": (of["asr"], verdicts["jailbreak"][n]) for n, of in cell["jailbreak_asr"].items()}


def _utility_difference(runs: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> Difference:
    """Utility less plain's; the runs and plain are matched by seed. Verdicts by Newcombe's interval; scores (ROUGE-L)
    by the normal one of the prompts' changes, each the mean over seeds."""
    texts = [[cell["verdicts"].get("utility") for cell in cells] for cells in (runs, plain)]
    if all(text is not None for side in texts for text in side):
        return pooled_difference(*texts)
    return _score_difference(*([cell["utility_values"] for cell in cells] for cells in (runs, plain)))


def _score_difference(runs: Sequence[Sequence[float]], plain: Sequence[Sequence[float]]) -> Difference:
    lengths = {len(scores) for scores in (*runs, *plain)}
    if len(lengths) != 1:
        raise ValueError(f"paired scores must cover the same prompts; their counts are {sorted(lengths)}")
    ours, theirs = ([statistics.fmean(scores) for scores in zip(*side, strict=True)] for side in (runs, plain))
    mean, low, high = normal_interval([a - b for a, b in zip(ours, theirs, strict=True)])
    return Difference(mean, max(-1.0, low), min(1.0, high), len(runs))


@contextmanager
def _naming(*what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{', '.join(what)}: {error}") from error


def summarise(cells: Sequence[Mapping[str, Any]]) -> list[Group]:
    """One group for each (model, tuning, scenario, method, variant) of the cells, in the order of the report.

    Differences are over all seeds of a group: ASR (of both kinds), over-refusal and jailbreaks against the model's
    aligned cell, utility against the plain cell of the same scenario, seed and variant (the default variant where plain
    was not run in that one). None where the cells are unlike (`alike.unlike`).

    Raises:
        ValueError: two cells that are to be compared have different numbers of prompts, or the seeds of one group
            other settings; the message names both.
    """
    by: dict[_Key, dict[int, Mapping[str, Any]]] = {}
    for cell in sorted(cells, key=lambda c: c["seed"]):
        by.setdefault(_key(cell), {})[cell["seed"]] = cell
    groups = []
    for key, runs in by.items():
        model, tuning, scenario, _, variant = key
        own, shares = list(runs.values()), [_shares(cell) for cell in runs.values()]
        for name, (first, other) in seeds_unlike(own).items():
            raise ValueError(
                f"{', '.join(key)}: of seeds {join_words([str(seed) for seed in runs])} one has {name} {first}, "
                f"another {other}, so they have no mean: run all of them with one, or tell them apart by `variants`"
            )
        metrics = {name: spread(of[name][0] for of in shares if name in of) for of in shares for name in of}
        metrics |= {name: spread(c.get(name) for c in own) for name in ("utility", "perplexity", "peak_memory_mb")}
        for figure in ("f1", "exact", "chance"):
            metrics[f"kept/{figure}"] = spread(c["kept_answers"][figure] for c in own if c.get("kept_answers"))
        for task in TASKS.values():
            metrics[f"utility/{task}"] = spread(cell.get("utilities", {}).get(task, {}).get("utility") for cell in own)
        differences: dict[str, Difference] = {}
        aligned = _aligned_cell(by, model, tuning) if scenario != "none" else None
        plain, settings = _plain_cells(by, key)
        nearest = [(cell, plain.get(seed) or next(iter(plain.values()))) for seed, cell in runs.items() if plain]
        apart = {"aligned": unlike(((c, aligned) for c in own if aligned), ()), "plain": unlike(nearest, settings)}
        for name, (_, start) in _shares(aligned).items() if aligned and not apart["aligned"] else ():
            if ours := [of[name][1] for of in shares if name in of]:
                with _naming(*key[:-1], f"{variant}: {name}"):
                    differences[name] = pooled_difference(ours, [start] * len(ours))
        pairs = [(cell, plain[seed]) for seed, cell in runs.items() if seed in plain and not apart["plain"]]
        kept = [
            [c["kept_answers"]["values"] for c in pair] for pair in pairs if all(c.get("kept_answers") for c in pair)
        ]
        if kept:
            with _naming(*key[:-1], f"{variant}: answers kept"):
                differences["kept/f1"] = _score_difference(*zip(*kept, strict=True))
        if pairs := [pair for pair in pairs if all(c["utility"] is not None for c in pair)]:
            with _naming(*key[:-1], f"{variant}: utility"):
                differences["utility"] = _utility_difference(*zip(*pairs, strict=True))
        known = {name: value for name, value in metrics.items() if value is not None}
        learned = min((TASKS[cell["utility_metric"]] for cell in own if cell["utility_metric"]), default=None)
        groups.append(Group(*key, tuple(own), known, differences, learned, {n: of for n, of in apart.items() if of}))
    return sorted(groups, key=_place)


def _plain_cells(
    by: Mapping[_Key, Mapping[int, Mapping[str, Any]]], key: _Key
) -> tuple[Mapping[int, Mapping[str, Any]], tuple[str, ...]]:
    """Plain's cells that a group's utility is compared with, and the settings that they must share."""
    *place, method, variant = key
    if method == "plain":
        return {}, ()
    if own := by.get((*place, "plain", variant)):  # type: ignore[arg-type]
        return own, SETTINGS
    # a variant that plain was not run in says by its name that it has other settings
    return by.get((*place, "plain", "default"), {}), ()  # type: ignore[arg-type]


def _aligned_cell(by: Mapping[_Key, Mapping[int, Mapping[str, Any]]], model: str, tuning: str) -> Any:
    """The aligned model's cell; one serves both tunings, since the model is the same before training."""
    found = [by.get((model, of, "none", "aligned", "default"), {}) for of in (tuning, "lora", "full")]
    return next((cell for runs in found for cell in runs.values()), None)


def _place(group: Group) -> tuple[Any, ...]:
    scenario, first = ["none", *SCENARIOS].index(group.scenario), ("aligned", "plain", DEFAULT_RULE, "spf")
    method = first.index(group.method) if group.method in first else len(first)
    variant = group.variant != "default", group.variant
    return group.model, group.tuning != "lora", scenario, method, group.method, *variant


@dataclass(frozen=True)
class Part:
    """What is shown in one table and compared in it: the groups of a scenario, with the model's aligned one.

    methods: all that were run in any scenario of the model and tuning, so that each has its colour.
    """

    model: str
    tuning: str
    scenario: str
    aligned: Group | None
    groups: Sequence[Group]
    methods: frozenset[str]

    @property
    def default(self) -> list[Group]:
        return [g for g in self.groups if g.variant == "default"]

    @property
    def task(self) -> str | None:
        return next((g.task for g in self.groups if g.task), None)


def parts(summary: Sequence[Group]) -> list[Part]:
    """Of every model and tuning every scenario in which something was trained, in order."""
    found: dict[tuple[str, str, str], list[Group]] = {}
    for group in (g for g in summary if g.scenario != "none"):
        found.setdefault((group.model, group.tuning, group.scenario), []).append(group)
    made = []
    for (model, tuning, scenario), groups in found.items():
        before = [g for g in summary if g.model == model and g.scenario == "none"]  # in whichever tuning it is filed
        aligned = min(before, key=lambda g: g.tuning != tuning, default=None)
        methods = frozenset(g.method for place, of in found.items() if place[:2] == (model, tuning) for g in of)
        made.append(Part(model, tuning, scenario, aligned, groups, methods))
    return made


# ------------------------------------------------------------------------------------------- fronts and gaps


def dominated(part: Part) -> dict[str, list[str]]:
    """Which methods are weakly dominated, and by which: {method: [methods that dominate it]}.

    One dominates another if it is at least as good in ASR, utility and over-refusal and better in one of them,
    by the means over the seeds that both have. Default variants only; the aligned model does not take part. Two
    methods of which only one has a utility are not compared, nor are two with unlike cells or without a common seed.
    """

    def point(group: Group, seeds: set[int]) -> list[float]:
        own = [cell for cell in group.cells if cell["seed"] in seeds]
        means = [statistics.fmean(cell[name] for cell in own) for name in ("asr", "over_refusal")]
        learned = [cell["utility"] for cell in own if cell["utility"] is not None]
        return means + ([-statistics.fmean(learned)] if learned else [])

    def dominates(one: Group, other: Group) -> bool:
        seeds = set(one.seeds) & set(other.seeds)
        if not seeds or unlike([(one.cells[0], other.cells[0])]):
            return False
        a, b = point(one, seeds), point(other, seeds)
        return len(a) == len(b) and all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    beaten = {of.method: [o.method for o in part.default if dominates(o, of)] for of in part.default}
    return {name: by for name, by in beaten.items() if by}


def missing(summary: Sequence[Group]) -> list[str]:
    """One line for each group of cells that was not run.

    Every setting is expected to have an aligned cell and every scenario; every scenario plain, the default
    rule and the methods that were run in another scenario of the setting.
    """
    lines = []
    for (model, tuning), of in groupby(parts(summary), key=lambda part: (part.model, part.tuning)):
        ran = {part.scenario: part for part in of}
        if not any(part.aligned for part in ran.values()):
            lines.append(f"not run: {model}: the aligned model, so nothing is compared with it")
        if empty := [s for s in SCENARIOS if s not in ran]:
            lines.append(f"not run: {model}, {tuning}: no method in {join_words(empty)}")
        methods = {scenario: [g.method for g in part.default] for scenario, part in ran.items()}
        everywhere = dict.fromkeys(["plain", DEFAULT_RULE, *chain(*methods.values())])
        for scenario, have in methods.items():
            if lacking := [method for method in everywhere if method not in have]:
                lines.append(f"not run: {model}, {tuning}, {scenario}: {', '.join(lacking)}")
    return lines
