"""Step time and peak memory of every rule against plain fine-tuning, in alternation in one run.

python benchmarks/overhead.py --size 135M --tuning lora --output benchmarks/results/overhead/135M-lora.json

Random weights of the named size, random tokens, 4 anchors of 40 tokens a probe. Each rule is timed
against its own copy of plain fine-tuning, step by step in turn. Ratios on a CPU are of processor time, which other
programs on the machine disturb less than the clock; the clock's are beside it. Beside them stand the limits: what
the rule has to compute and to keep, over what plain fine-tuning does (operations), and the bytes it adds.
Then the same with `--memory` adds each arm's peak memory, in a process of its own. `--monitored` measures something
else: the peak of
steps, after set-up and the first one, of plain fine-tuning and of the null space with and without asking the watched
prompts at
each of them; with `--checkpointing` under gradient checkpointing.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from torchjd.aggregation import PCGrad
from torchjd.autojac import backward, jac_to_grad
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from spf.data import Anchor
from spf.files import write_json
from spf.lab.report.tables import of_text, rich_table
from spf.lab.trainer import IGNORED, answer_logits
from spf.models import cpu_dtype, machine_device, peak_memory_mb
from spf.optimizer import SafetyOptimizer
from spf.probe import SafetyProbe
from spf.rules import SPF, Mix, NullSpace, Rank1, Rule, SafeGrad

# hidden, layers, heads, key-value heads, intermediate, vocabulary: SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B and -3B,
# Llama-3.1-8B
SIZES = {
    "tiny": (64, 2, 4, 2, 128, 512),
    "135M": (576, 30, 9, 3, 1536, 49152),
    "0.5B": (896, 24, 14, 2, 4864, 151936),
    "1B": (2048, 16, 32, 8, 8192, 128256),
    "3B": (3072, 28, 24, 8, 8192, 128256),
    "8B": (4096, 32, 32, 8, 14336, 128256),
}
RULES = {
    "null-space": NullSpace(),
    "null-space with feedback": NullSpace(feedback=Mix()),
    "spf": SPF(),
    "rank1": Rank1(),
    "mix": Mix(),
    "safegrad": SafeGrad(),
}
MONITORED = ["plain", "null-space, not monitored", "null-space, monitored"]
OTHERS = ["released-code style", "torchjd pcgrad"]
ANCHOR = 40
SETTINGS = {"size": "135M", "tuning": "lora", "batch": 8, "tokens": 512, "answer": 128, "rank": None, "accumulation": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--tuning", choices=["lora", "full"])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--answer", type=int, help="tokens of each sequence that have a loss")
    parser.add_argument("--rank", type=int, help="of the null space and of spf; their defaults if left out")
    parser.add_argument("--accumulation", type=int, help="parts the batch is taken in, to fit in memory")
    parser.set_defaults(**SETTINGS)
    parser.add_argument(
        "--rounds", type=int, default=8, help="pairs of steps after one that warms up; processes an arm with --memory"
    )
    parser.add_argument("--rules", nargs="+", choices=[*RULES, *OTHERS], default=[*RULES, *OTHERS])
    parser.add_argument("--memory", action="store_true", help="add peak memory to the file of a timed run")
    parser.add_argument("--monitored", action="store_true", help="peak memory of monitored steps, in a file of its own")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("overhead.json"))
    args = parser.parse_args()
    if args.batch % args.accumulation:
        parser.error(f"--batch {args.batch} is not a multiple of --accumulation {args.accumulation}")
    if args.rank is not None and not all(isinstance(RULES.get(name), NullSpace | SPF) for name in args.rules):
        parser.error("--rank is for the --rules null-space, null-space with feedback and spf")
    if args.accumulation > 1 and "torchjd pcgrad" in args.rules:
        parser.error("torchjd pcgrad cannot be accumulated; choose other --rules")
    if args.peak_of:
        print(json.dumps(peak(args)))
        return
    if args.memory:
        measure_memory(args)
        return
    if args.monitored:
        measure_monitored(args)
        return
    result = {
        "command": " ".join(["python", *sys.argv]),
        **{key: getattr(args, key) for key in (*SETTINGS, "rounds")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "torchjd", "spf")},
        "arms": {},
    }
    for name in args.rules:
        result["arms"][name] = timed(name, args) | limits(name, args)
        write_json(args.output, result)
    show(result)
    print(f"Figures: {args.output}")


def measure_memory(args: argparse.Namespace) -> None:
    """Add each arm's peak, in a process of its own, to the file of an earlier run without --memory."""
    result = json.loads(args.output.read_text("utf-8"))
    for key in SETTINGS:
        made = result.get(key, SETTINGS[key])  # older files do not name all
        if made != getattr(args, key):
            raise ValueError(f"{args.output} was made with {key} {made}, not {getattr(args, key)}")
    names = [name for name in args.rules if name in result["arms"]]
    peaks: dict[str, list[float]] = {name: [] for name in ["plain", *names]}
    for name in tqdm(list(peaks) * args.rounds, desc="peak memory"):
        done = subprocess.run(
            [sys.executable, *sys.argv, "--peak-of", name], capture_output=True, text=True, check=True
        )
        peaks[name].append(json.loads(done.stdout.splitlines()[-1]))
    result["memory_command"] = " ".join(["python", *sys.argv])
    result["peak_mb_plain"] = peaks["plain"]
    plain = statistics.median(peaks["plain"])
    for name in names:
        result["arms"][name] |= {"peak_mb": peaks[name], "peak_ratio": statistics.median(peaks[name]) / plain}
    write_json(args.output, result)
    show(result)


def measure_monitored(args: argparse.Namespace) -> None:
    """Peak memory of plain steps, of the null space's, and of these with the watched prompts asked at each."""
    peaks: dict[str, list[float]] = {name: [] for name in MONITORED}
    for name in tqdm(list(peaks) * args.rounds, desc="peak memory"):
        done = subprocess.run(
            [sys.executable, *sys.argv, "--peak-of", name],
            # glibc gives large pieces back when they are freed, and what is seen is what is in use
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[name].append(json.loads(done.stdout.splitlines()[-1]))
        result = {
            "command": " ".join(["python", *sys.argv]),
            **{key: getattr(args, key) for key in (*SETTINGS, "rounds", "checkpointing")},
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "spf")},
            "peak_mb": peaks,
        }
        write_json(args.output, result)
    plain = statistics.median(peaks["plain"])
    for name, values in peaks.items():
        print(f"{name}: {statistics.median(values):.0f} MiB, {statistics.median(values) / plain:.3f} x plain")


def make_rule(name: str, rank: int | None) -> Rule:
    """The rule of an arm; a rank only for those that have one."""
    return RULES[name] if rank is None else replace(RULES[name], rank=rank)


def build(name: str, args: argparse.Namespace) -> tuple[Callable[[], None], dict[str, float]]:
    """A training step of an arm, and the seconds its set-up took."""
    hidden, layers, heads, kv_heads, inner, vocabulary = SIZES[args.size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        max_position_embeddings=max(2048, args.tokens),
        tie_word_embeddings=args.size != "8B",
    )
    device = machine_device()
    lora, half = args.tuning == "lora", cpu_dtype() == torch.bfloat16
    with device:
        # full fine-tuning keeps fp32 masters under autocast, LoRA a frozen base in the machine's type
        model = AutoModelForCausalLM.from_config(config, dtype=cpu_dtype() if lora else torch.float32)
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0))
    if args.checkpointing:
        model.gradient_checkpointing_enable()
        if lora:
            model.enable_input_require_grads()
    if half:
        # as accelerate does it, so that the probe's passes are in bfloat16 too
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    model.train()
    ids = torch.randint(0, vocabulary, (args.batch, args.tokens), device=device)
    labels = torch.where(torch.arange(args.tokens, device=device) < args.tokens - args.answer, IGNORED, ids)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    parts = [
        {key: value[start :: args.accumulation] for key, value in inputs.items()} for start in range(args.accumulation)
    ]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    started = time.perf_counter()
    anchors = [
        Anchor(row[:-12], row[-12:], f"random {i}")
        for i, row in enumerate(torch.randint(0, vocabulary, (144, ANCHOR)).tolist())
    ]
    probe = SafetyProbe(model, anchors)
    if name in RULES or name in MONITORED[1:]:
        # the null space alone asks its watched prompts every 10 steps, as SafetyCallback does
        monitor_steps = {"null-space": 10, "null-space, monitored": 1}.get(name, 0)
        correction = torch.bfloat16 if half else torch.float32
        optimizer = SafetyOptimizer(
            optimizer,
            probe,
            make_rule(name.partition(",")[0], args.rank),
            monitor_steps=monitor_steps,
            correction_dtype=correction,
        )
    seconds = {"setup": time.perf_counter() - started}

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits, targets, _ = answer_logits(model, batch)
        return nn.functional.cross_entropy(logits, targets)

    def utility_backward() -> None:
        for part in parts:
            (loss_of(part) / len(parts)).backward()

    def safety_batch() -> dict[str, torch.Tensor]:
        rows = next(probe.rotation)
        ids = torch.tensor([anchor.prompt_ids + anchor.refusal_ids for anchor in rows], device=device)
        labels = torch.where(torch.arange(ANCHOR, device=device) < ANCHOR - 12, IGNORED, ids)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def step() -> None:
        if name == "torchjd pcgrad":
            backward([loss_of(inputs), loss_of(safety_batch())], inputs=trainable)
            jac_to_grad(trainable, PCGrad())
        elif name == "released-code style":
            # two whole backward passes and two copies of all gradients, a rank-1 correction a parameter
            loss_of(safety_batch()).backward()
            safety = [p.grad.clone() for p in trainable]
            optimizer.zero_grad()
            utility_backward()
            utility = [p.grad.clone() for p in trainable]
            for p, u, s in zip(trainable, utility, safety, strict=True):
                inner, norm = (u * s).sum(), s.square().sum()
                p.grad = u - torch.where((inner < 0) & (norm > 1e-8), inner / norm, 0.0) * s
        else:
            utility_backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step, seconds


def timed(name: str, args: argparse.Namespace) -> dict:
    """Seconds a step of the arm and of plain fine-tuning beside it, and the ratios of the pairs."""
    ours, setup = build(name, args)
    plain, _ = build("plain", args)
    clock: dict[str, list[float]] = {"ours": [], "plain": []}
    processor: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in tqdm(range(args.rounds + 1), desc=name):
        # the order changes, so that neither always runs behind the other
        for key, step in [("ours", ours), ("plain", plain)][:: 1 if number % 2 else -1]:
            started, spent = time.perf_counter(), time.process_time()
            step()
            clock[key].append(time.perf_counter() - started)
            processor[key].append(time.process_time() - spent)
    result: dict = {"setup_seconds": setup["setup"]}
    for label, seconds in (("seconds", clock), ("processor_seconds", processor)):
        pairs = [a / b for a, b in zip(seconds["ours"][1:], seconds["plain"][1:], strict=True)]
        result[label] = {key: values[1:] for key, values in seconds.items()}
        result[label + "_ratio"] = {"median": statistics.median(pairs), "low": min(pairs), "high": max(pairs)}
    return result


def limits(name: str, args: argparse.Namespace) -> dict:
    """The extra operations over those of a plain step, and the extra bytes kept: what no code can go below."""
    hidden, layers, heads, kv_heads, inner, vocabulary = SIZES[args.size]
    kv = hidden // heads * kv_heads
    layer = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (inner, hidden), (inner, hidden)]
    layer.append((hidden, inner))
    bases = layers * sum(m * n for m, n in layer)
    tokens, answers = args.batch * args.tokens, args.batch * args.answer
    lora = args.tuning == "lora"
    # forward, gradients of activations, and of weights where they are trained
    step = (4 if lora else 6) * tokens * bases + 6 * answers * hidden * vocabulary
    matrices = layers * [part for m, n in layer for part in ([(8, n), (m, 8)] if lora else [(m, n)])]
    probe = 4 * ANCHOR
    held = [(m, n) for m, n in matrices if not lora or m == 8]
    null_space_rule, spf = make_rule("null-space", args.rank), make_rule("spf", args.rank)
    null_space = sum(4 * m * n * null_space_rule.limit(n) for m, n in held)
    shared = layers * [hidden, hidden, hidden, inner]  # q, k, v and gate, up read the same inputs
    kept = 4 * (sum(n * null_space_rule.limit(n) for n in shared) + sum(m * null_space_rule.limit(n) for m, n in held))
    # the probe: forward and gradients of activations; inner products and dense corrections from T-token factors
    probing = 4 * probe * bases + 4 * 4 * 12 * hidden * vocabulary
    factored = sum(2 * probe * m * n for m, n in matrices)
    kept_factors = 4 * probe * sum(m + n for m, n in matrices)
    extra, held_bytes = {
        "null-space": (null_space + probing / 10, kept),
        "null-space with feedback": (null_space + probing + 2 * factored, kept + kept_factors),
        "spf": (probing + factored + sum(4 * m * n * spf.rank for m, n in matrices), kept_factors),
        "rank1": (probing + 2 * factored, kept_factors),
        "mix": (probing + 2 * factored, kept_factors),
        "safegrad": (probing + 2 * factored, kept_factors),
        "released-code style": ((4 if lora else 6) * probe * bases, 8 * sum(m * n for m, n in matrices)),
        "torchjd pcgrad": ((4 if lora else 6) * probe * bases, 8 * sum(m * n for m, n in matrices)),
    }[name]
    return {"operations_limit": 1 + extra / step, "extra_mb_limit": held_bytes / 2**20}


def peak(args: argparse.Namespace) -> float:
    """Peak memory of one arm, MiB, of the GPU or this process: of set-up and three steps, or of later steps alone."""
    step, _ = build(args.peak_of, args)
    step()
    if args.monitored:
        forget_peak()
    for _ in range(2):
        step()
    return peak_memory_mb() if not args.monitored or torch.cuda.is_available() else peak_since_mb()


def forget_peak() -> None:
    """Have the peaks count from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what set-up has freed, which would count with the steps
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def peak_since_mb() -> float:
    """The largest resident size since `forget_peak`, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10


def show(result: dict) -> None:
    head = ["rule", "time x plain", "range", "by operations", "memory x plain", "MiB kept, at least", "set-up s"]
    rows = []
    for name, arm in result["arms"].items():
        ratio = arm["seconds_ratio" if torch.cuda.is_available() else "processor_seconds_ratio"]
        row = [name, f"{ratio['median']:.3f}", f"{ratio['low']:.3f} to {ratio['high']:.3f}"]
        row += [f"{arm['operations_limit']:.4f}", f"{arm['peak_ratio']:.3f}" if "peak_ratio" in arm else "-"]
        rows.append([*row, f"{arm['extra_mb_limit']:.0f}", f"{arm['setup_seconds']:.1f}"])
    title = f"{result['size']}, {result['tuning']}, {result['batch']} x {result['tokens']} tokens"
    Console().print(rich_table(of_text(head, rows), title))


if __name__ == "__main__":
    main()
