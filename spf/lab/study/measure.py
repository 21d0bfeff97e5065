"""The study's measurements: `measure_world` for models in memory, `measure_checkpoints` for `spf study measure`."""

import hashlib
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spf.arguments import MeasureArguments
from spf.config import File, NotNegative, read_json
from spf.data import Anchor, SafetyRow, load_safety_rows, packaged_rows, render, tokenise
from spf.errors import keeping, working
from spf.evaluation import TRANSFORMS, Rate, generate_answers, is_refusal
from spf.files import directory_lock, weights_at, write_json
from spf.lab.analysis import clusters, weights
from spf.lab.analysis.activations import Activations, capture, find_mlps, local_lipschitz
from spf.lab.analysis.gradients import (
    captured_energy,
    chance_overlap,
    cumulative_energy_ratio,
    effective_rank,
    overlap,
    svd_dense,
)
from spf.lab.analysis.inputs import Prompts
from spf.probe import SafetyProbe
from spf.progress import progress, tracked
from spf.text.generation import context_length, pad_id

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
"""The paper's factors on the update."""

BINS = 24
COEFFICIENTS = 15
SINES = 64
"""At most so many sines of a matrix are kept, evenly chosen from the sorted ones; the means are over all."""

Evaluate = Callable[[PreTrainedModel], Mapping[str, Any]]


def describe(values: Tensor) -> dict[str, Any]:
    """Mean, standard deviation, quartiles and a histogram of (N,) values, for JSON.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    values = values.double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{int((~torch.isfinite(values)).sum())} of {len(values)} measured values are NaN or infinite")
    low, high = float(values.min()), float(values.max())
    return {
        "count": len(values),
        "mean": float(values.mean()),
        "std": float(values.std()) if len(values) > 1 else 0.0,
        "quartiles": values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist(),
        "low": low,
        "high": high,
        "counts": torch.histc(values, BINS, low, high).int().tolist() if high > low else [len(values)],
    }


def _mean_and_std(values: Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "std": float(values.std())}


def rounded(content: Any) -> Any:
    """The same content with floats at five significant digits."""
    if isinstance(content, Mapping):
        return {str(key): rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value) for value in content]
    return float(f"{content:.5g}") if isinstance(content, float) else content


class Part(File):
    """What `finished` writes."""

    config: dict[str, Any]
    seconds: NotNegative
    result: Any

    @classmethod
    def read(cls, path: Path) -> "Part":
        return read_json(cls, path, "damaged; remove it, and it is computed again")


def finished(path: Path, config: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """What `path` holds if it was computed with this config, else computed now, rounded and written there."""
    config = json.loads(json.dumps(config))
    if path.exists():
        done = Part.read(path)
        if done.config == config:
            print(f"{path.name}: done before, kept")
            return done.result
    started = time.perf_counter()
    result = rounded(compute())
    seconds = round(time.perf_counter() - started, 1)
    with working():
        write_json(path, {"config": config, "seconds": seconds, "result": result})
    print(f"{path.name}: {seconds:.0f} s")
    return Part.read(path).result


def measure_model(
    activations: Mapping[str, Activations],
    lipschitz: Mapping[str, Tensor],
    works: Mapping[str, Sequence[bool]] | None = None,
) -> dict[str, Any]:
    """O1 and O4 of one model: tau a layer and set, how separate the clusters are, local Lipschitzness.

    activations: by set, `safe` and `unsafe` among them. lipschitz: (N,) by set. works: by set, which attacks succeed;
    their tau is given apart too, under the set's name and " that work".
    """
    result: dict[str, Any] = {"tau": [], "tau_cosine": [], "separation": []}
    for layer in range(len(activations["safe"].hidden)):
        hidden = {name: found.hidden[layer] for name, found in activations.items()}
        safe, unsafe = hidden["safe"], hidden["unsafe"]
        tau = clusters.held_out(hidden)
        # split after the halves were told apart by the rows' order
        parts = {f"{name} that work": tau[name][torch.tensor(w)] for name, w in (works or {}).items() if any(w)}
        result["tau"].append({name: describe(values) for name, values in {**tau, **parts}.items()})
        cosine = clusters.held_out(hidden, clusters.tau_cosine)
        result["tau_cosine"].append({name: _mean_and_std(values) for name, values in cosine.items()})
        result["separation"].append(
            {
                "side_accuracy": clusters.side_accuracy(tau["safe"], tau["unsafe"]),
                "two_means_accuracy": clusters.two_means_accuracy(safe, unsafe),
                "fisher_ratio": clusters.fisher_ratio(safe, unsafe),
                "distance": float((safe.mean(0) - unsafe.mean(0)).norm()),
                "norm": float(torch.cat([safe, unsafe]).norm(dim=1).mean()),
                "concentration_safe": clusters.concentration(safe),
                "concentration_unsafe": clusters.concentration(unsafe),
            }
        )
    result["lipschitz"] = {name: describe(values) for name, values in lipschitz.items()}
    return result


def measure_update(
    before: PreTrainedModel,
    after: PreTrainedModel,
    activations_before: Mapping[str, Activations],
    activations_after: Mapping[str, Activations],
    *,
    energy: float = 0.99,
    bases: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """O2, O3 and App. C.1 of one update: null-space angles, row-space coefficients, angles of activation spans.

    The inputs of O3 are those of the model after the update. `bases` keeps the column spaces of `before`, so that
    several updates of one model need them once. MLP matrices that were not changed are left out.
    """
    bases = {} if bases is None else bases
    weight_before, weight_after = dict(before.named_parameters()), dict(after.named_parameters())
    result: dict[str, Any] = {"matrices": [], "rows": [], "angles": {}}
    squares = [0.0, 0.0]
    transposed = _transposed(before)
    for layer, mlp in enumerate(tracked(find_mlps(before), "weights")):
        rows: dict[str, Any] = {}
        for name in mlp.weight_names():
            W, W2 = weight_before[name].detach().float(), weight_after[name].detach().float()
            if transposed:
                W, W2 = W.T, W2.T
            squares[0] += float((W2 - W).square().sum())
            squares[1] += float(W.square().sum())
            if torch.equal(W, W2):
                continue
            # decomposed where the model is, compared on the CPU, where the activations are
            U, s, V = (part.cpu() for part in weights.update_svd(W, W2))
            if name not in bases:
                bases[name] = weights.leading_left(W, energy).cpu()
            kind = name.split(".")[-2]
            result["matrices"].append({"name": name, "layer": layer, "kind": kind, **_matrix(U, s, bases[name], W)})
            if kind in mlp.first:
                rows[kind] = _rows(s, V, {n: found.inputs[layer] for n, found in activations_after.items()})
        result["rows"].append(rows)
    result["relative_size"] = math.sqrt(squares[0] / squares[1])
    for name, found in activations_after.items():
        result["angles"][name] = [
            _angles(weights.principal_sines(X, X2, energy))
            for X, X2 in zip(activations_before[name].hidden, found.hidden, strict=True)
        ]
    return result


def _transposed(model: PreTrainedModel) -> bool:
    """GPT-2's Conv1D holds W^T."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(find_mlps(model)[0].second[1], Conv1D)


def _matrix(U: Tensor, s: Tensor, U_r: Tensor, W: Tensor) -> dict[str, Any]:
    sines = weights.null_space_sines(U, U_r).sort().values
    kept = torch.linspace(0, len(sines) - 1, min(SINES, len(sines))).round().long()
    chance = weights.chance_sine(len(W), U_r.shape[1])
    return {
        "shape": list(W.shape),
        "rank": len(s),
        "effective_rank": effective_rank(s),
        "cer@10": cumulative_energy_ratio(s, 10),
        "column_rank": U_r.shape[1],
        "sines": sines[kept].tolist(),
        "mean_sine": float(sines.mean()),
        "chance": chance,
        "share": weights.null_space_share(U, s, U_r),
        "chance_share": chance**2,
        "neuron_cosine": float(weights.neuron_cosines(U, s).mean()),
    }


def _rows(s: Tensor, V: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    sets = {}
    for name, A in inputs.items():
        coefficients = weights.row_coefficients(s, V, A, COEFFICIENTS)
        sets[name] = {
            "coefficients": coefficients.mean(0).tolist(),
            "gain": _mean_and_std(weights.gains(s, V, A)),
        }
    n = len(V)
    chance = weights.chance_coefficients(s, n, COEFFICIENTS).tolist()
    return {"sets": sets, "chance": chance, "chance_gain": float(s.norm()) / math.sqrt(n)}


def _angles(sines: Tensor) -> dict[str, Any]:
    return {"mean": float(sines.mean()), "max": float(sines.max()), "count": len(sines)}


def mean_gradients(model: PreTrainedModel, anchors: Sequence[Anchor], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Mean gradient (m, n) of the anchors' answer loss, of the MLP matrices of five layers evenly spaced, by name."""
    mlps = find_mlps(model)
    watched = {name for i in range(5) for name in mlps[round(i * (len(mlps) - 1) / 4)].weight_names()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    sums: dict[str, Tensor] = {}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in watched)
        probe = SafetyProbe(model, anchors, pad_token_id=pad_token_id)
        for start in range(0, len(anchors), 4):
            chunk = anchors[start : start + 4]
            for name, factors in probe.measure(chunk).factors.items():
                G = factors.dense().cpu() * (len(chunk) / len(anchors))
                sums[name] = sums[name] + G if name in sums else G
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
    return sums


def measure_gradients(
    base: PreTrainedModel,
    tuned: Mapping[str, PreTrainedModel],
    anchors: Mapping[str, Sequence[Anchor]],
    *,
    k: int = 10,
    pad_token_id: int = 0,
) -> dict[str, Any]:
    """The SPF paper's insights (arXiv 2601.10141) for each model: rank, sign and persistence of the safety gradient.

    anchors: `safety`, harmful prompts with refusals, and `utility`, harmless ones with answers; the same for every
    model. Of the update also: the share of its energy in the k leading left and right directions of the safety
    gradient of `base`. Means over the MLP matrices of five layers.
    """
    result: dict[str, Any] = {"k": k, "counts": {name: len(a) for name, a in anchors.items()}, "models": {}}
    first: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    transposed = _transposed(base)
    weight_before = dict(base.named_parameters())
    for name in tracked(["base", *tuned], "gradients"):
        model = base if name == "base" else tuned[name]
        found = {kind: mean_gradients(model, anchors[kind], pad_token_id) for kind in ("safety", "utility")}
        triplets = {matrix: svd_dense(G, k) for matrix, G in found["safety"].items()}
        first = first or triplets
        flat = {kind: torch.cat([G.flatten() for G in gradients.values()]) for kind, gradients in found.items()}
        entry: dict[str, Any] = {
            "cosine": float(torch.nn.functional.cosine_similarity(flat["safety"], flat["utility"], dim=0)),
            "norm": {kind: float(G.norm()) for kind, G in flat.items()},
        }
        for kind, gradients in found.items():
            spectra = [torch.linalg.svdvals(G) for G in gradients.values()]
            entry[f"effective_rank_{kind}"] = _average(effective_rank(s) for s in spectra)
            entry[f"cer_{kind}"] = _average(cumulative_energy_ratio(s, k) for s in spectra)
        if name != "base":
            updates = {}
            for matrix in first:
                dW = (dict(model.named_parameters())[matrix] - weight_before[matrix]).detach().float().cpu()
                updates[matrix] = dW.T if transposed else dW
            for axis, side in ((0, "left"), (2, "right")):
                bases = {matrix: (first[matrix][axis], triplets[matrix][axis]) for matrix in first}
                entry[f"overlap_{side}"] = _average(overlap(*pair) for pair in bases.values())
                entry[f"chance_{side}"] = _average(chance_overlap(k, k, len(U)) for U, _ in bases.values())
                entry[f"update_{side}"] = _average(
                    float(captured_energy(dW if side == "left" else dW.T, bases[matrix][0])[-1])
                    for matrix, dW in updates.items()
                    if bool(dW.any())
                )
        result["models"][name] = entry
    return result


def _average(values: Iterable[float]) -> float | None:
    kept = list(values)
    return sum(kept) / len(kept) if kept else None


def scale_curve(
    model: PreTrainedModel,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    evaluate: Evaluate,
    alphas: Sequence[float] = ALPHAS,
) -> list[dict[str, Any]]:
    """What `evaluate` finds at W_before + alpha (W_after - W_before), for each alpha. `model` is put back.

    before, after: the parameters to scale, by name; all others stay as they are in `model`.
    """
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in before}
    curve = []
    try:
        for alpha in tracked(alphas, "alpha"):
            weights.scale_update(model, before, after, alpha)
            curve.append({"alpha": alpha, **evaluate(model)})
    finally:
        weights.scale_update(model, kept, kept, 0.0)
    return curve


def check_pair(before: PreTrainedModel, after: PreTrainedModel, name: str) -> None:
    """Whether `after` can be a fine-tuned `before`.

    Raises:
        ValueError: a parameter is missing or has another shape, or nothing differs; names the first one.
    """
    first, second = dict(before.named_parameters()), dict(after.named_parameters())
    if alien := sorted(first.keys() ^ second.keys()):
        raise ValueError(f"{name}: {alien[0]} is in one of the two models only ({len(alien)} such parameters)")
    for key, parameter in first.items():
        if parameter.shape != second[key].shape:
            raise ValueError(
                f"{name}: {key} has shape {tuple(second[key].shape)}, and {tuple(parameter.shape)} before fine-tuning"
            )
    if all(torch.equal(parameter, second[key]) for key, parameter in first.items()):
        raise ValueError(f"{name}: no weight differs from the model before fine-tuning, so there is nothing to measure")


def measure_world(
    base: PreTrainedModel,
    tuned: Mapping[str, PreTrainedModel],
    sets: Mapping[str, Prompts],
    *,
    seed: int = 0,
    positions: int = 10,
    generated: int | None = None,
    attacked: Mapping[str, Mapping[str, Tensor]] | None = None,
    attacked_success: Mapping[str, Mapping[str, Sequence[bool]]] | None = None,
    evaluate: Evaluate | None = None,
    scaled: Sequence[str] | None = None,
    scaled_parts: Sequence[str] = ("mlp", "all"),
    alphas: Sequence[float] = ALPHAS,
    prompts: int = 256,
    lipschitz_prompts: int = 128,
    energy: float = 0.99,
    batch_size: int = 32,
    autocast: bool = False,
    anchors: Mapping[str, Sequence[Anchor]] | None = None,
    pad_token_id: int = 0,
) -> dict[str, Any]:
    """All measurements of a model `base` and of models fine-tuned from it; JSON-ready (see docs/study.md).

    sets: by name, `safe` and `unsafe` among them; the first `prompts` of each count. positions: tokens whose
    activations are averaged, of which `generated` (default: all but one) are the model's own greedy answer.
    attacked: inputs_embeds (N, L, d) by model and name, adversarial versions of the first N unsafe prompts;
    attacked_success: which of them work. evaluate: rates of a model, for the update scaled by `alphas`, of the models
    named in `scaled` (default: all). The results depend on nothing random; `seed` is recorded only.
    autocast: forward passes in bfloat16; weights are always compared in float32. anchors: see `measure_gradients`.

    Raises:
        ValueError: safe or unsafe is missing, a model does not fit to `base` or does not differ from it.
    """
    if missing := {"safe", "unsafe"} - sets.keys():
        raise ValueError(f"measure: the set {' and '.join(sorted(missing))} is missing")
    if "base" in tuned:
        raise ValueError("measure: a fine-tuned model cannot be called base")
    for name in tuned:
        check_pair(base, tuned[name], name)
    generated = positions - 1 if generated is None else generated
    used = {name: p[:prompts] for name, p in sets.items()}
    steep = {name: p[:lipschitz_prompts] for name, p in sets.items()}
    bases: dict[str, Tensor] = {}
    result: dict[str, Any] = {
        "config": {
            "seed": seed,
            "positions": positions,
            "generated": generated,
            "energy": energy,
            "counts": {name: len(p) for name, p in used.items()},
            "lipschitz_counts": {name: len(p) for name, p in steep.items()},
            "autocast": autocast,
        },
        "models": {},
        "updates": {},
        "alpha": {},
        "seconds": {},
    }
    before: dict[str, Activations] = {}
    with progress((1 + len(tuned)) * len(sets) * 2, "measuring") as bar:
        for name in ("base", *tuned):
            model = base if name == "base" else tuned[name]
            started = time.perf_counter()
            activations, lipschitz = {}, {}
            computing = torch.autocast(model.device.type, torch.bfloat16) if autocast else nullcontext()
            with computing:
                for set_name in sets:
                    bar.set_postfix_str(f"{name}, {set_name}")
                    activations[set_name] = capture(
                        model, used[set_name], positions=positions, generated=generated, batch_size=batch_size
                    )
                    bar.update()
                    lipschitz[set_name] = local_lipschitz(model, steep[set_name], batch_size=max(1, batch_size // 2))
                    bar.update()
                attacks = {
                    attack: capture(model, embeds, positions=positions, generated=generated, batch_size=batch_size)
                    for attack, embeds in (attacked or {}).get(name, {}).items()
                }
            works = (attacked_success or {}).get(name)
            result["models"][name] = measure_model({**activations, **attacks}, lipschitz, works)
            if name == "base":
                before = activations
            else:
                result["updates"][name] = measure_update(base, model, before, activations, energy=energy, bases=bases)
            result["seconds"][name] = time.perf_counter() - started
    if anchors is not None:
        result["gradients"] = measure_gradients(base, tuned, anchors, pad_token_id=pad_token_id)
    for name in tuned if scaled is None else scaled:
        if evaluate is not None:
            model = tuned[name]
            result["alpha"][name] = {
                part: scale_curve(model, *_parts(base, model, part), evaluate, alphas) for part in scaled_parts
            }
    return rounded(result)


def _parts(before: PreTrainedModel, after: PreTrainedModel, part: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters to scale, `mlp` (the MLPs' matrices: the paper) or `all` (its code), before and after (copies)."""
    names = [name for mlp in find_mlps(before) for name in mlp.weight_names()]
    first, second = dict(before.named_parameters()), dict(after.named_parameters())
    if part == "all":
        names = list(first)
    return {name: first[name].detach() for name in names}, {name: second[name].detach().clone() for name in names}


def measure_checkpoints(args: MeasureArguments) -> None:
    """`spf study measure`: any causal model before and after fine-tuning, on harmless and harmful prompts.

    Raises:
        ValueError: prompts that are missing or too few, models that do not belong together, a name used twice.
    """
    output = Path(args.output)
    with directory_lock(output), keeping(lambda: _kept(output)):
        _measure_checkpoints(args, output)


def _kept(output: Path) -> str:
    names = sorted(path.stem for path in (output / "parts").glob("*.json"))
    return f"finished parts are kept in {output / 'parts'} ({', '.join(names)})" if names else "nothing was written"


def _measure_checkpoints(args: MeasureArguments, output: Path) -> None:
    from rich.console import Console

    from spf.evaluation.run import parse_transforms
    from spf.lab.study.report import measure_table, write_report
    from spf.models import load_model, machine_device

    alphas = _parse_alphas(args.alphas)
    rows = {"safe": _load(args.benign, "benign_eval"), "unsafe": _load(args.harmful, "harmful_eval")}
    names = _names(args.tuned)
    versions = {name: version(name) for name in ("spf", "torch", "transformers", "peft")}
    # names tell neither weights nor prompts: both may have been replaced since a part was written
    loaded = {directory: weights_at(directory) for directory in (args.aligned, *names.values())}
    asked = {name: _hash(found) for name, found in rows.items()}
    transforms = parse_transforms(args.transforms)
    for name in transforms:
        rows[f"jailbreak: {name}"] = [_transformed(row, name) for row in rows["unsafe"]]
    for path in (output / "parts").glob("*.json"):
        Part.read(path)
    started = time.perf_counter()
    device = machine_device().type
    base, tokenizer = load_model(args.aligned, torch.float32)
    sets = {name: tokenise_prompts(found, tokenizer) for name, found in rows.items()}
    base.to(device).requires_grad_(False)  # type: ignore[arg-type]
    tuned = _Loaded(names, device)

    def refusals(model: PreTrainedModel) -> dict[str, Any]:
        found = {}
        for name in ("unsafe", "safe"):
            prompts = [row.messages for row in rows[name][: args.alpha_prompts]]
            with torch.autocast(device, torch.bfloat16, enabled=args.bfloat16):
                answers = generate_answers(model, tokenizer, prompts, max_new_tokens=20, progress=False)
            rate = Rate(sum(map(is_refusal, answers)), len(answers))
            found[f"{name}_refused"] = {"value": rate.value, "interval": rate.interval, "count": rate.count}
        return found

    settings = {**vars(args), "versions": versions, "weights": loaded, "asked": asked}

    def part(name: str, compute: Callable[..., dict[str, Any]], *given: Any, **more: Any) -> Any:
        return finished(output / "parts" / f"{name}.json", settings, partial(compute, *given, **more))

    measured = part(
        "models", measure_world, base, tuned, sets, positions=args.positions, generated=0, prompts=args.prompts,
        lipschitz_prompts=args.lipschitz_prompts, batch_size=args.batch_size, autocast=args.bfloat16,
    )  # fmt: skip
    if args.gradient_prompts:
        anchors = _anchors(rows, base, tokenizer, args.gradient_prompts)
        measured["gradients"] = part(
            "gradients", measure_gradients, base, tuned, anchors, pad_token_id=pad_id(tokenizer)
        )

    def scaled(name: str) -> dict[str, Any]:
        model = tuned[name]
        return {"all": scale_curve(model, *_parts(base, model, "all"), refusals, alphas)}

    if alphas:
        measured["alpha"] = {name: part(f"alpha-{i}", scaled, name) for i, name in enumerate(names)}
    results = {
        "kind": "measure",
        "aligned": args.aligned,
        "tuned": names,
        "safe": args.benign or "packaged benign_eval",
        "unsafe": args.harmful or "packaged harmful_eval",
        "command": " ".join(["spf", *sys.argv[1:]]),
        "versions": versions,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "seconds": round(time.perf_counter() - started, 1),
        "measurements": measured,
    }
    with working():
        write_json(output / "results.json", results)
        shutil.rmtree(output / "parts")
        console = Console()
        console.print(measure_table(results))
        report = write_report(results, output)
        console.print(f"Figures: {output / 'results.json'}\nReport:  {report}", soft_wrap=True)


class _Loaded(Mapping[str, PreTrainedModel]):
    """Models loaded each time they are asked for, so that one besides the first is in memory at a time."""

    def __init__(self, directories: Mapping[str, str], device: str):
        self.directories, self.device = directories, device

    def __getitem__(self, name: str) -> PreTrainedModel:
        from spf.models import load_model

        model = load_model(self.directories[name], torch.float32)[0]
        return model.to(self.device).requires_grad_(False)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[str]:
        return iter(self.directories)

    def __len__(self) -> int:
        return len(self.directories)


def tokenise_prompts(rows: Sequence[SafetyRow], tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Prompts in the model's chat template, left-padded, up to where the answer begins.

    Raises:
        SafetyDataError: the tokenizer has no chat template, or it refuses a row.
    """
    encoded = [tokenizer(render(row, tokenizer), add_special_tokens=False)["input_ids"] for row in rows]
    width = max(map(len, encoded))
    pad = pad_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(e)) + e for e in encoded])
    return Prompts(ids, torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded]))


def _anchors(
    rows: Mapping[str, Sequence[SafetyRow]], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int
) -> dict[str, list[Anchor]]:
    """Harmful prompts with refusals, harmless ones with answers: the files' own, or `spf align`'s and the model's."""
    from spf.lab.align import REFUSALS

    unsafe, safe = list(rows["unsafe"][:count]), list(rows["safe"][:count])
    refused = [SafetyRow(r.messages, r.refusal or REFUSALS[i % len(REFUSALS)], r.where) for i, r in enumerate(unsafe)]
    missing = [row for row in safe if row.refusal is None]
    own = generate_answers(base, tokenizer, [row.messages for row in missing], max_new_tokens=12) if missing else []
    answers = dict(zip((row.where for row in missing), own, strict=True))
    answered = [SafetyRow(r.messages, r.refusal or answers[r.where], r.where) for r in safe]
    answered = [row for row in answered if row.refusal]
    if not answered:
        raise ValueError(
            "the model answers no harmless prompt with any text; --gradient_prompts 0 leaves this part out"
        )
    limit = context_length(base, tokenizer)
    return {"safety": tokenise(refused, tokenizer, limit), "utility": tokenise(answered, tokenizer, limit)}


def _load(path: str | None, packaged: str) -> list[SafetyRow]:
    if path is None:
        return packaged_rows(packaged)
    rows = load_safety_rows(path)
    if len(rows) < 4:
        raise ValueError(f"{path}: {len(rows)} prompts; at least 4 are needed, half of them for the means")
    return rows


def _hash(rows: Sequence[SafetyRow]) -> str:
    said = json.dumps([[row.messages, row.refusal] for row in rows])
    return hashlib.sha256(said.encode("utf-8")).hexdigest()


def _transformed(row: SafetyRow, name: str) -> SafetyRow:
    if len(row.messages) != 1:
        raise ValueError(f"{row.where}: jailbreaks are made of single user messages, and this prompt has several")
    attack = TRANSFORMS[name].apply(row.messages[0]["content"])
    if attack.prefill:
        raise ValueError(f"jailbreak {name}: begins the answer, so it has no last prompt token to measure at")
    return SafetyRow(attack.messages, None, f"{row.where}, {name}")


def _names(tuned: Sequence[str]) -> dict[str, str]:
    """Directory by name; a directory's own name unless NAME=DIRECTORY."""
    found: dict[str, str] = {}
    for item in tuned:
        name, _, directory = item.rpartition("=")
        name = name or Path(directory).name
        if name in found or name == "base":
            raise ValueError(f"--tuned {item}: the name {name!r} is taken; give another as NAME=DIRECTORY")
        found[name] = directory
    return found


def _parse_alphas(text: str) -> list[float]:
    if text == "none":
        return []
    try:
        found = [float(part) for part in text.split(",")]
        if not all(map(math.isfinite, found)):
            raise ValueError
    except ValueError:
        raise ValueError(f"--alphas {text}: numbers separated by commas, or none") from None
    return found
