"""The three insights of the SPF paper (arXiv 2601.10141), measured on the aligned demo model with controls.

Resumable: every part writes its JSON when done, and a part done with the same settings is kept.

OMP_NUM_THREADS=1 python benchmarks/gradient_insights.py --seeds 0 1 2 --output benchmarks/results/insights
"""

import argparse
import os
import platform
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import reduce
from importlib.metadata import version
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from spf.data import ENOUGH, Anchor, SafetyRow, complete_refusals, load_safety_rows, packaged_prompts, tokenise
from spf.evaluation import generate_answers, is_refusal
from spf.files import write_json
from spf.lab.analysis.gradients import (
    captured_energy,
    chance_overlap,
    cumulative_energy_ratio,
    effective_rank,
    group_cosine,
    overlap,
    sample_gram,
    svd_dense,
)
from spf.lab.demo.run import HARMLESS_STUB, DemoArguments, training_data
from spf.lab.demo.sql import make_sql_examples
from spf.lab.report import stats
from spf.lab.report.charts import INK, LOOKS, MORE_COLOURS, Row, chart, over_seeds, save_figure
from spf.lab.study.measure import finished, rounded
from spf.lab.trainer import collate_answers
from spf.models import DEMO_MODEL, load_aligned_demo_model, load_model
from spf.probe import SafetyProbe
from spf.subspace import Factors
from spf.text.generation import context_length, pad_id

ANSWER_TOKENS = 12
"""Every answer of parts I and III is cut to this many tokens, so that no set has more tokens with a loss."""

TOKEN_BUDGET = 1024
"""Where sets are compared at equal numbers of tokens (a gradient from T tokens has rank <= T)."""

KS = (1, 5, 10, 20)
CURVE = 32
SETS = ("safety", "sql", "benign", "refused")
GROWN = ("safety", "sql")
"""The sets measured up to the full number of samples; the controls stop at the token budget, to save time."""
LABELS = {
    "safety": "safety: harmful prompt, own refusal",
    "sql": "utility: SQL question, query",
    "benign": "control: benign prompt, own answer",
    "refused": "control: benign prompt, refusal",
}
PAIRS = {
    "safety-utility": ("safety", "utility"),
    "benign-utility": ("benign", "utility"),
    "safety-benign": ("safety", "benign"),
}
PAIR_LABELS = {
    "safety-utility": "safety and utility",
    "benign-utility": "control: benign prompts and utility",
    "safety-benign": "safety and benign prompts",
}
Triplets = dict[str, tuple[Tensor, Tensor, Tensor]]
DATA = {"harmless": 0.0, "harmful-10": 0.1}


def place(name: str) -> tuple[int, str]:
    """A matrix's layer and kind (q_proj, ...) by its parameter name, with or without LoRA around it."""
    parts = [p for p in name.split(".") if p not in {"weight", "base_layer", "default", "lora_A", "lora_B"}]
    return int(next(p for p in parts if p.isdigit())), parts[-1]


def mean_by(values: dict[str, float], key: Callable[[str], Any]) -> dict[Any, float]:
    """The mean of per-matrix values over groups of matrices."""
    groups = defaultdict(list)
    for name, value in values.items():
        groups[key(name)].append(value)
    return {group: statistics.mean(found) for group, found in groups.items()}


# ------------------------------------------------------------------------------------------------- samples


def make_pools(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sql: int) -> dict[str, list[Anchor]]:
    """Anchors to choose from, full answers: own refusals of harmful prompts, SQL, own answers to benign prompts."""
    benign = packaged_prompts("benign_anchors")
    answers = generate_answers(model, tokenizer, benign, max_new_tokens=20, description="benign answers")
    rows = {
        "safety": complete_refusals(load_safety_rows()[:ENOUGH], model, tokenizer),
        "sql": [_row(e.prompt, e.query, f"sql {i}") for i, e in enumerate(make_sql_examples(sql, 0, "train"))],
        "benign": [
            _row(p, a, f"benign {i}")
            for i, (p, a) in enumerate(zip(benign, answers, strict=True))
            if a and not is_refusal(a)
        ],
    }
    return {name: tokenise(r, tokenizer, context_length(model, tokenizer)) for name, r in rows.items()}


def _row(prompt: str, answer: str, where: str) -> SafetyRow:
    return SafetyRow([{"role": "user", "content": prompt}], answer, where)


def choose(pools: dict[str, list[Anchor]], count: int, seed: int) -> dict[str, list[Anchor]]:
    """`count` samples a set, all with ANSWER_TOKENS answer tokens; `refused` has safety's answers, benign's prompts.

    Raises:
        ValueError: a pool has too few samples with answers that long.
    """
    chosen = {}
    for name, pool in pools.items():
        cut = [
            Anchor(a.prompt_ids, a.refusal_ids[:ANSWER_TOKENS], a.where)
            for a in pool
            if len(a.refusal_ids) >= ANSWER_TOKENS
        ]
        if len(cut) < count:
            raise ValueError(f"{name}: {count} samples of {ANSWER_TOKENS} answer tokens needed, {len(cut)} at hand")
        chosen[name] = random.Random(f"{name} {seed}").sample(cut, count)
    chosen["refused"] = [
        Anchor(b.prompt_ids, s.refusal_ids, b.where) for b, s in zip(chosen["benign"], chosen["safety"], strict=True)
    ]
    return {name: chosen[name] for name in SETS}


def tokens_of(anchors: Sequence[Anchor]) -> int:
    return sum(len(a.prompt_ids) + len(a.refusal_ids) for a in anchors)


def samples_within(anchors: Sequence[Anchor], budget: int) -> int:
    """How many of the first anchors come closest to `budget` tokens."""
    return min(range(1, len(anchors) + 1), key=lambda n: abs(tokens_of(anchors[:n]) - budget))


# -------------------------------------------------------------------------------------- insights I and III


def mean_gradients(
    probe: SafetyProbe, anchors: Sequence[Anchor], points: Sequence[int], at: Callable[[int, dict[str, Tensor]], None]
) -> dict[str, Tensor]:
    """Dense mean gradient (m, n) of every matrix over the anchors; `at(n, sums)` sees the sums after n samples."""
    sums: dict[str, Tensor] = {}
    done = 0
    for stop in sorted({*points, len(anchors)}):
        while done < stop:
            chunk = anchors[done : min(done + 4, stop)]
            for name, factors in probe.measure(chunk).factors.items():
                if name not in sums:
                    sums[name] = torch.zeros(factors.D.shape[1], factors.X.shape[1])
                sums[name].addmm_(factors.D.T, factors.X, alpha=len(chunk))
            done += len(chunk)
        at(stop, sums)
    return {name: G / len(anchors) for name, G in sums.items()}


def describe(spectra: dict[str, Tensor]) -> dict[str, Any]:
    """Effective rank (by kind, and over all) and CER(1 ... CURVE), means over matrices."""
    ranks = {name: effective_rank(s) for name, s in spectra.items()}
    return {
        "effective_rank": statistics.mean(ranks.values()),
        "by_kind": mean_by(ranks, lambda name: place(name)[1]),
        "cer": [statistics.mean(cumulative_energy_ratio(s, k) for s in spectra.values()) for k in range(1, CURVE + 1)],
    }


def watched_names(probe: SafetyProbe) -> list[str]:
    """The matrices of five layers, evenly spaced from the first to the last."""
    last = max(place(name)[0] for name in probe.matrices)
    layers = {round(i * last / 4) for i in range(5)}
    return [name for name in probe.matrices if place(name)[0] in layers]


def measure_subspaces(
    model: PreTrainedModel, chosen: dict[str, list[Anchor]], singles: int, counts: Sequence[int], pad: int
) -> dict[str, Any]:
    """Parts I and III for one choice of samples: the first `singles` of a set one by one, the others together."""
    result: dict[str, Any] = {"growth": {}, "layers": {}, "loss": {}, "norm": {}}
    result |= {"overlap": {}, "own": {}, "captured": {}}
    one: dict[str, list[Triplets]] = {}
    many: dict[str, dict[str, Tensor]] = {}
    probe = SafetyProbe(model, chosen["safety"], pad_token_id=pad)
    watched = watched_names(probe)
    for set_name, anchors in tqdm(chosen.items(), desc="sets", leave=False):
        results = [probe.measure([a]) for a in tqdm(anchors[:singles], desc=f"{set_name}, one by one", leave=False)]
        one[set_name] = [{name: r.factors[name].svd(max(KS)) for name in watched} for r in results]
        result["loss"][set_name] = [r.loss for r in results]
        result["norm"][set_name] = [sum(float(f.norm_squared()) for f in r.factors.values()) ** 0.5 for r in results]
        del results
        described = [describe({name: s for name, (_, s, _) in found.items()}) for found in one[set_name]]
        growth: dict[str, Any] = {
            "1": {**_mean(described), "samples": 1, "tokens": tokens_of(anchors[:singles]) / singles}
        }
        rest = anchors[singles:]
        budget = samples_within(rest, TOKEN_BUDGET)
        if set_name not in GROWN:
            rest = rest[:budget]
        points = sorted({*(c for c in counts if c <= len(rest)), budget})
        with tqdm(total=len(points), desc=f"{set_name}, together", leave=False) as bar:

            def at(n: int, sums: dict[str, Tensor], growth=growth, rest=rest, budget=budget, bar=bar) -> None:
                found = describe({name: torch.linalg.svdvals(sums[name]) for name in watched})
                entry = {**found, "samples": n, "tokens": tokens_of(rest[:n])}
                if n in counts:
                    growth[str(n)] = entry
                if n == budget:
                    growth["budget"] = entry
                bar.update()

            gradients = mean_gradients(probe, rest, points, at)
        result["growth"][set_name] = growth
        if set_name in GROWN:
            result["layers"][set_name] = by_layer(gradients)
            many[set_name] = {name: gradients[name] for name in watched}
        del gradients
    bases = {s: {name: svd_dense(G, max(KS)) for name, G in many[s].items()} for s in GROWN}
    for set_name in chosen:
        result["overlap"][set_name] = compare(one[set_name], bases["safety"])
        if set_name in GROWN:
            result["own"][set_name] = compare(one[set_name], bases[set_name])
        result["captured"][set_name] = captured(one[set_name], many["safety"])
    result["chance"] = {
        side: {
            k: statistics.mean(chance_overlap(k, k, many["safety"][name].shape[axis]) for name in watched) for k in KS
        }
        for axis, side in enumerate(("left", "right"))
    }
    result["cer_many"] = {
        s: {k: statistics.mean(cumulative_energy_ratio(b[1], k) for b in bases[s].values()) for k in KS} for s in bases
    }
    return result


def by_layer(gradients: dict[str, Tensor]) -> dict[str, Any]:
    """Effective rank and CER(10) of every matrix: a list over layers for each kind."""
    result: dict[str, Any] = {}
    for name, G in tqdm(gradients.items(), desc="SVD of all layers", leave=False):
        found = result.setdefault(place(name)[1], {"effective_rank": [], "cer@10": []})
        s = torch.linalg.svdvals(G)
        found["effective_rank"].append(effective_rank(s))
        found["cer@10"].append(cumulative_energy_ratio(s, 10))
    return result


def _mean(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "effective_rank": statistics.mean(e["effective_rank"] for e in entries),
        "by_kind": {k: statistics.mean(e["by_kind"][k] for e in entries) for k in entries[0]["by_kind"]},
        "cer": [statistics.mean(values) for values in zip(*(e["cer"] for e in entries), strict=True)],
    }


def compare(ones: list[Triplets], bases: Triplets) -> dict[str, Any]:
    """Overlap of one-sample and many-sample subspaces, a value a sample (mean over matrices) and by kind."""
    result: dict[str, Any] = {}
    for axis, side in ((0, "left"), (2, "right")):
        result[side] = {}
        for k in KS:
            found = [
                {name: overlap(svd[axis][:, :k], bases[name][axis][:, :k]) for name, svd in sample.items()}
                for sample in ones
            ]
            kinds = [mean_by(values, lambda name: place(name)[1]) for values in found]
            result[side][k] = {
                "values": [statistics.mean(values.values()) for values in found],
                "by_kind": {kind: statistics.mean(values[kind] for values in kinds) for kind in kinds[0]},
            }
    return result


def captured(ones: list[Triplets], gradients: dict[str, Tensor]) -> dict[str, Any]:
    """Energy of the many-sample gradient in the one-sample subspaces, a side and a k: a value a sample."""
    result: dict[str, Any] = {}
    for axis, side in ((0, "left"), (2, "right")):
        curves = [
            [captured_energy(G if side == "left" else G.T, sample[name][axis]) for name, G in gradients.items()]
            for sample in ones
        ]
        # a basis of fewer than k directions counts with all it has
        result[side] = {
            k: {"values": [statistics.mean(float(c[min(k, len(c)) - 1]) for c in sample) for sample in curves]}
            for k in KS
        }
    return result


def measure_reference(
    aligned: PreTrainedModel, chosen: dict[str, list[Anchor]], count: int, pad: int
) -> dict[str, Any]:
    """Part I on the aligned model in float32, the model before alignment and a randomly initialised one."""

    def untrained() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(aligned.config).to(aligned.dtype)

    models: dict[str, Callable[[], PreTrainedModel]] = {
        "aligned, float32": lambda: load_aligned_demo_model()[0].float(),
        "before alignment": lambda: load_model(DEMO_MODEL, aligned.dtype)[0],
        "random weights": untrained,
    }
    result: dict[str, Any] = {}
    for label, load in tqdm(models.items(), desc="reference models", leave=False):
        model = load()
        model.requires_grad_(True)
        probe = SafetyProbe(model, chosen["safety"], pad_token_id=pad)
        watched = watched_names(probe)
        result[label] = {}
        for set_name in GROWN:
            anchors = chosen[set_name]
            gradients = mean_gradients(probe, anchors[-count:], [], lambda n, sums: None)
            spectra = {name: torch.linalg.svdvals(gradients[name]) for name in watched}
            tokens = tokens_of(anchors[-count:])
            result[label][set_name] = {**describe(spectra), "samples": count, "tokens": tokens}
    return result


# ---------------------------------------------------------------------------------------------- insight II


def full_weight_probe(model: PreTrainedModel, anchors: Sequence[Anchor], pad: int) -> SafetyProbe:
    """A probe of the frozen weights under LoRA as well as of the adapter: its matrices are noted while trainable."""
    weights = [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        return SafetyProbe(model, anchors, pad_token_id=pad)
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def measure_cosines(probe: SafetyProbe, groups: dict[str, list[Anchor]]) -> dict[str, Any]:
    """Cosines between the gradients of groups of samples at the current weights.

    full: all frozen weights, as if trained in full; adapter: all of LoRA's A and B, what the optimizer sees;
    by_layer, by_kind: full, a part at a time; singles: full, every pair of single samples.
    """
    results = {name: probe.measure(anchors) for name, anchors in groups.items()}
    lengths = [len(a.prompt_ids) + len(a.refusal_ids) for anchors in groups.values() for a in anchors]
    index: dict[str, list[int]] = {}
    for name, anchors in groups.items():
        start = sum(len(found) for found in index.values())
        index[name] = list(range(start, start + len(anchors)))
    grams: dict[tuple[str, Any], Tensor] = defaultdict(lambda: torch.zeros(len(lengths), len(lengths)).double())
    for name in probe.matrices:
        parts: list[Factors] = [r.factors.pop(name) for r in results.values()]
        gram = sample_gram(torch.cat([p.X for p in parts]), torch.cat([p.D for p in parts]), lengths)
        if ".lora_" in name:
            grams["adapter", None] += gram
        else:
            layer, kind = place(name)
            for key in (("full", None), ("layer", layer), ("kind", kind)):
                grams[key] += gram
    found: dict[str, Any] = {"loss": {name: r.loss for name, r in results.items()}}
    for pair, (a, b) in PAIRS.items():
        first, second = index[a], index[b]
        found[pair] = {
            "full": group_cosine(grams["full", None], first, second),
            "by_layer": [group_cosine(g, first, second) for (of, _), g in grams.items() if of == "layer"],
            "by_kind": {key: group_cosine(g, first, second) for (of, key), g in grams.items() if of == "kind"},
            "singles": [group_cosine(grams["full", None], [i], [j]) for i in first for j in second],
        }
        if ("adapter", None) in grams:
            found[pair]["adapter"] = group_cosine(grams["adapter", None], first, second)
    return found


def measure_training(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pools: dict[str, list[Anchor]], share: float, seed: int,
    steps: int, every: int, batch: int, draws: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Plain LoRA fine-tuning as in the demo; every `every` steps the cosines for the next `draws` batches.

    Afterwards the model is as it was: without the adapter, its weights untouched.
    """
    rows, _ = training_data(DemoArguments(steps=steps + draws, batch_size=batch, harmful_share=share, seed=seed))
    train = tokenise(rows, tokenizer, context_length(model, tokenizer))
    pad = pad_id(tokenizer)
    rng = random.Random(seed)
    fixed = rng.sample(pools["safety"], min(16, len(pools["safety"])))
    set_seed(seed)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
    peft = get_peft_model(model, adapter)
    probe = full_weight_probe(peft, fixed, pad)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(5, steps), steps)
    measured: list[dict[str, Any]] = []
    for step in tqdm(range(steps + 1), desc=f"training, stubs {share:.0%}, seed {seed}", leave=False):
        if step % every == 0 or step == steps:
            draw = []
            for i in range(step, step + draws):
                utility = train[i * batch : (i + 1) * batch]
                others = {name: rng.sample(pools[name], batch) for name in ("safety", "benign")}
                stubs = [row.refusal == HARMLESS_STUB for row in rows[i * batch : (i + 1) * batch]]
                draw.append({**measure_cosines(probe, {"utility": utility, **others}), "stubs": stubs})
            measured.append({"step": step, "safety_loss": probe.loss(fixed), "draws": draw})
        if step == steps:
            break
        examples = [
            {"prompt_ids": a.prompt_ids, "answer_ids": a.refusal_ids} for a in train[step * batch : (step + 1) * batch]
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            loss = peft(**collate_answers(examples, pad)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peft.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    peft.unload().requires_grad_(True)
    return measured


# ------------------------------------------------------------------------------------------------- summary


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value) and number of values."""
    found = stats.spread(values)
    assert found
    return {"mean": found.mean, "sd": found.sd, "n": found.seeds}


def over(parts: Sequence[Any], *path: Any) -> dict[str, Any]:
    """The spread of what stands at a path in every part, a number or a list of them."""
    return spread(np.ravel([reduce(getitem, path, part) for part in parts]).tolist())


def share_negative(values: Sequence[float]) -> dict[str, Any]:
    """How many of the values are below zero."""
    negative = sum(v < 0 for v in values)
    return {"negative": negative, "n": len(values), "share": negative / len(values)}


def summarise_subspaces(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Parts I and III over the seeds."""
    summary: dict[str, Any] = {"growth": {}, "ratio_to_sql": {}, "overlap": {}, "own": {}, "captured": {}}
    for s in SETS:
        points = parts[0]["growth"][s]
        summary["growth"][s] = {
            p: {name: over(parts, "growth", s, p, name) for name in ("samples", "tokens", "effective_rank")}
            | {f"cer@{k}": over(parts, "growth", s, p, "cer", k - 1) for k in KS}
            for p in points
        }
        ranks = {p: [(part["growth"][of][p]["effective_rank"] for of in (s, "sql")) for part in parts] for p in points}
        summary["ratio_to_sql"][s] = {p: spread([a / b for a, b in found]) for p, found in ranks.items()}
        for what in ("overlap", "own", "captured") if s in GROWN else ("overlap", "captured"):
            summary[what][s] = {
                side: {str(k): over(parts, what, s, side, str(k), "values") for k in KS} for side in ("left", "right")
            }
    summary["layers"] = {
        s: {
            kind: spread([statistics.mean(part["layers"][s][kind]["effective_rank"]) for part in parts])
            for kind in found
        }
        for s, found in parts[0]["layers"].items()
    }
    for what in ("loss", "norm"):
        summary[what] = {s: over(parts, what, s) for s in SETS}
    summary["chance"] = parts[0]["chance"]
    summary["cer_many"] = {s: {str(k): over(parts, "cer_many", s, str(k)) for k in KS} for s in GROWN}
    return summary


def singles(entries: list[dict[str, Any]], pair: str, stub: bool) -> list[float]:
    """Cosines of single samples whose utility sample is a harmful stub, or is not."""
    found = []
    for draw in (draw for entry in entries for draw in entry["draws"]):
        for i, value in enumerate(draw[pair]["singles"]):
            # every pair of samples, the second one running fastest
            if stub == ("utility" in pair and draw["stubs"][i % len(draw["stubs"])]):
                found.append(value)
    return found


def summarise_training(parts: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """Part II: cosines at the start (harmless data), by step, and over all steps after the start."""

    def cosines(entries: list[dict[str, Any]], pair: str) -> dict[str, Any]:
        draws = [draw[pair] for entry in entries for draw in entry["draws"]]
        found: dict[str, Any] = {"layers": share_negative([v for d in draws for v in d["by_layer"]])}
        values = {
            "full": [d["full"] for d in draws],
            "adapter": [d["adapter"] for d in draws],
            "singles": singles(entries, pair, stub=False),
            "stub singles": singles(entries, pair, stub=True),
        }
        return found | {name: {**spread(v), **share_negative(v)} for name, v in values.items() if v}

    summary: dict[str, Any] = {"steps": {}, "training": {}}
    summary["start"] = {pair: cosines([run[0] for run in parts["harmless"]], pair) for pair in PAIRS}
    for data, runs in parts.items():
        summary["steps"][data] = [
            {
                "step": entries[0]["step"],
                "safety_loss": spread([e["safety_loss"] for e in entries]),
                **{pair: cosines(list(entries), pair) for pair in PAIRS},
            }
            for entries in zip(*runs, strict=True)
        ]
        later = [entry for run in runs for entry in run[1:]]
        summary["training"][data] = {pair: cosines(later, pair) for pair in PAIRS}
    return summary


# ------------------------------------------------------------------------------------------------- figures

ADAPTER = ", LoRA's weights"
STYLES: dict[str, dict[str, Any]] = {
    name: {"color": look.colour, "marker": look.marker, "markersize": 4.5}
    for name, look in zip(SETS, (LOOKS["spf"], LOOKS["plain"], LOOKS["base"], LOOKS["paper"]), strict=True)
}
STYLES |= {
    "chance (random subspace)": {"color": INK, "linestyle": ":", "marker": ""},
    "best possible, CER(k)": {"color": INK, "linestyle": "--", "linewidth": 1, "marker": ""},
}
for _pair, _colour in zip(PAIRS, (LOOKS["spf"].colour, LOOKS["base"].colour, MORE_COLOURS[0]), strict=True):
    STYLES[_pair], STYLES[_pair + ADAPTER] = {"color": _colour}, {"color": _colour, "linestyle": ":", "marker": "x"}


def label(name: str) -> str:
    said = (LABELS | PAIR_LABELS).get(name.removesuffix(ADAPTER), name)
    return said + ADAPTER if name.endswith(ADAPTER) else said


def plot_ranks(parts: list[dict[str, Any]], path: Path) -> None:
    """Insight I: CER(k) and effective rank against tokens, and the ratio safety / SQL by layer and kind."""
    budget = round(statistics.mean(p["growth"][s]["budget"]["tokens"] for p in parts for s in SETS))
    count = max(int(q) for q in parts[0]["growth"]["safety"] if q.isdigit())
    energy, against = f"Energy in k directions, {budget} tokens each", "Effective rank against tokens"
    ratio = f"Effective rank, safety / SQL, {count} samples each"
    rows: list[Row] = []
    for s in SETS:
        points = sorted((q for q in parts[0]["growth"][s] if q.isdigit()), key=int)
        for seed, growth in enumerate(part["growth"][s] for part in parts):
            rows += [(energy, s, seed, k, cer) for k, cer in enumerate(growth["budget"]["cer"], 1)]
            for q in points:
                tokens = over(parts, "growth", s, q, "tokens")["mean"]
                rows.append((against, s, seed, tokens, growth[q]["effective_rank"]))
    for seed, layers in enumerate(part["layers"] for part in parts):
        for kind in layers["safety"]:
            pairs = zip(*(layers[s][kind]["effective_rank"] for s in ("safety", "sql")), strict=True)
            rows += [(ratio, kind.removesuffix("_proj"), seed, layer, a / b) for layer, (a, b) in enumerate(pairs)]

    def draw_ratio(ax: Axes, rows: Sequence[Row], *_: Any) -> None:
        means = {kind: mean for kind, (_, mean, _) in over_seeds(rows).items()}
        image = ax.pcolormesh(list(means.values()), cmap="RdBu", vmin=0.25, vmax=1.75)
        ax.set_yticks(np.arange(len(means)) + 0.5, list(means))
        ax.invert_yaxis()
        ax.figure.colorbar(image, ax=ax, shrink=0.9).set_label("below 1: safety lower", fontsize=8, color=INK)

    each = {
        energy: {"grid": "both", "x": "k", "y": "CER(k)"},
        against: {"grid": "both", "x": "tokens", "y": "effective rank"},
        ratio: {"draw": draw_ratio, "x": "layer"},
    }
    figure = chart(rows, (4.1, 3.9), STYLES.__getitem__, label, "sd", each=each, legend_columns=2)
    figure.axes[1].set_xscale("log")
    save_figure(figure, path, dpi=130)


def plot_cosines(parts: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Insight II: cosines of sample pairs at the start, by layer, and over training."""
    starts = [draw for run in parts["harmless"] for draw in run[0]["draws"]]
    single = "Before training: pairs of single samples"
    by_layer = f"Before training: by layer, batches of 4 (mean and sd of {len(starts)})"
    training = {
        "harmless": "Training on text-to-SQL",
        "harmful-10": "Training on text-to-SQL with 10 % harmful stubs",
    }
    values = {p: singles([run[0] for run in parts["harmless"]], p, stub=False) for p in PAIRS}
    ends = [-0.02, 0.02, *(v for draw in starts for p in PAIRS for v in draw[p]["singles"])]
    bins = np.linspace(min(ends), max(ends), 21)
    rows: list[Row] = []
    for p, found in values.items():
        shares = np.histogram(found, bins)[0] / len(found)
        rows += [(single, p, 0, x, float(y)) for x, y in zip((bins[1:] + bins[:-1]) / 2, shares, strict=True)]
        rows += [(by_layer, p, i, layer, v) for i, d in enumerate(starts) for layer, v in enumerate(d[p]["by_layer"])]
    rows += [
        (title, pair + suffix, (seed, i), entry["step"], draw[pair][what])
        for data, title in training.items()
        for pair in PAIRS
        for what, suffix in (("full", ""), ("adapter", ADAPTER))
        for seed, run in enumerate(parts[data])
        for entry in run
        for i, draw in enumerate(entry["draws"])
    ]
    zero = {"y": "cosine", "levels": [(0.0, "")], "x": "step"}
    each = dict.fromkeys(training.values(), zero) | {
        single: {"x": "cosine of full-weight gradients", "y": "share of pairs", "at": [0]},
        by_layer: zero | {"x": "layer"},
    }
    figure = chart(rows, (4.1, 3.5), STYLES.__getitem__, label, "sd", each, 2, 3, grid="both")
    for line in figure.axes[0].lines[: len(values)]:
        line.set(drawstyle="steps-mid", marker="")
    figure.axes[3].sharey(figure.axes[2])
    figure.axes[3].autoscale_view()
    save_figure(figure, path, dpi=130)


def plot_overlap(parts: list[dict[str, Any]], path: Path) -> None:
    """Insight III: overlap with, and energy captured of, the many-sample safety gradient; left and right."""
    rows: list[Row] = []
    for what, title in (("overlap", "overlap of the subspaces"), ("captured", "energy of the safety gradient held")):
        for side, of in (("left", "Left (outputs)"), ("right", "Right (inputs)")):
            panel = f"{of}: {title}"
            for seed, part in enumerate(parts):
                for s, k in ((s, str(k)) for s in SETS for k in KS):
                    values = part[what][s][side][k]["values"]
                    rows += [(panel, s, (seed, i), k, value) for i, value in enumerate(values)]
            rows += [(panel, "chance (random subspace)", 0, str(k), parts[0]["chance"][side][str(k)]) for k in KS]
            if what == "captured":
                best = [(str(k), over(parts, "cer_many", "safety", str(k))["mean"]) for k in KS]
                rows += [(panel, "best possible, CER(k)", 0, *point) for point in best]
    options = {"grid": "both", "x": "k", "y": "share", "limits": (0, 1.02), "columns": 2, "legend_columns": 3}
    save_figure(chart(rows, (3.3, 3.5), STYLES.__getitem__, label, "sd", **options), path, dpi=130)


# ---------------------------------------------------------------------------------------------------- main


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="choices of samples and training runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/insights"))
    parser.add_argument("--samples", type=int, default=64, help="samples of the many-sample gradient")
    parser.add_argument("--singles", type=int, default=6, help="one-sample gradients a set and seed")
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps of a training run")
    parser.add_argument("--every", type=int, default=5, help="steps between measurements in training")
    parser.add_argument("--draws", type=int, default=1, help="batches a measurement in training")
    args = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    model, tokenizer = load_aligned_demo_model()
    model.requires_grad_(True)  # merging an adapter leaves the weights frozen
    pad = pad_id(tokenizer)
    pools = make_pools(model, tokenizer, 2 * (args.samples + args.singles) + 16)
    common = {
        "model": "SmolLM2-135M-Instruct, aligned by spf align",
        "dtype": str(model.dtype).removeprefix("torch."),
        "pools": {name: len(pool) for name, pool in pools.items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    subspace_settings = {"samples": args.samples, "singles": args.singles, "answer_tokens": ANSWER_TOKENS}
    training_settings = {"steps": args.steps, "every": args.every, "batch": 4, "draws": args.draws}
    count = args.samples + args.singles
    counts = sorted({*(c for c in (4, 16, 64) if c < args.samples), args.samples})
    subspaces = [
        finished(
            args.output / f"subspaces-seed-{seed}.json",
            {**common, **subspace_settings, "seed": seed},
            lambda seed=seed: measure_subspaces(model, choose(pools, count, seed), args.singles, counts, pad),
        )
        for seed in args.seeds
    ]
    few = min(16, args.samples)
    reference = finished(
        args.output / "reference.json",
        {**common, "samples": few, "seed": args.seeds[0]},
        lambda: measure_reference(model, choose(pools, count, args.seeds[0]), few, pad),
    )
    training: dict[str, list[list[dict[str, Any]]]] = {}
    for data, share in DATA.items():
        training[data] = []
        for seed in args.seeds:

            def train(share: float = share, seed: int = seed) -> list[dict[str, Any]]:
                return measure_training(model, tokenizer, pools, share, seed, args.steps, args.every, 4, args.draws)

            settings = {**common, **training_settings, "harmful_share": share, "seed": seed}
            training[data].append(finished(args.output / f"training-{data}-seed-{seed}.json", settings, train))
    summary = {
        "config": {
            **common,
            **subspace_settings,
            **training_settings,
            "seeds": args.seeds,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "seconds": round(time.perf_counter() - started, 1),
        },
        "subspaces": summarise_subspaces(subspaces),
        "reference": reference,
        "training": summarise_training(training),
    }
    write_json(args.output / "summary.json", rounded(summary))
    plot_ranks(subspaces, args.output / "insight-1-rank.png")
    plot_cosines(training, args.output / "insight-2-cosine.png")
    plot_overlap(subspaces, args.output / "insight-3-overlap.png")
    print(f"Summary: {args.output / 'summary.json'}, {summary['config']['seconds'] / 60:.1f} minutes")


if __name__ == "__main__":
    main()
