"""The subspace of a safety gradient from its factors against torch.svd_lowrank of the dense gradient.

python benchmarks/factored_subspace.py --output benchmarks/results/overhead/factored_subspace.json

In alternation in one run. The dense gradient is given to svd_lowrank for free. Exactness: the factored triplets
against numpy's SVD in float64 of the T x T core of exact QRs, and their product against the dense gradient.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from spf.files import write_json
from spf.models import machine_device
from spf.subspace import Factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="m = n")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("factored_subspace.json"))
    args = parser.parse_args()
    device = machine_device().type
    torch.manual_seed(0)
    # a decaying spectrum, as gradients have
    scale = torch.logspace(0, -2, args.tokens, device=device)[:, None]
    factors = Factors(
        torch.randn(args.tokens, args.size, device=device) * scale, torch.randn(args.tokens, args.size, device=device)
    )
    dense = factors.dense()
    seconds: dict[str, list[float]] = {"factored": [], "svd_lowrank": []}
    for _ in range(args.rounds + 1):
        for name, work in (
            ("factored", lambda: factors.svd(args.rank)),
            ("svd_lowrank", lambda: torch.svd_lowrank(dense, q=args.rank)),
        ):
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    ratios = [slow / fast for slow, fast in zip(seconds["svd_lowrank"][1:], seconds["factored"][1:], strict=True)]
    U, s, V = factors.svd(args.tokens)
    rebuilt = float((U * s[: U.shape[1]] @ V.T - dense).norm() / dense.norm())
    X, D = factors.X.double().cpu().numpy(), factors.D.double().cpu().numpy()
    Qd, Rd = np.linalg.qr(D.T)
    Qx, Rx = np.linalg.qr(X.T)
    left, exact, right = np.linalg.svd(Rd @ Rx.T)
    U, s, V = (part.double().cpu().numpy() for part in factors.svd(args.rank))
    k = args.rank

    def sine(basis: np.ndarray, other: np.ndarray) -> float:
        return float(np.linalg.norm(basis - other @ (other.T @ basis), 2))

    result = {
        "command": " ".join(["python", *sys.argv]),
        **{key: getattr(args, key) for key in ("size", "tokens", "rank", "rounds")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}",
        "versions": {name: version(name) for name in ("torch", "numpy", "spf")},
        "load": os.getloadavg()[0],
        "seconds": {name: values[1:] for name, values in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "error": {
            "singular_values": float(np.abs(s[:k] - exact[:k]).max() / exact[0]),
            "left_sine": sine(U, Qd @ left[:, :k]),
            "right_sine": sine(V, Qx @ right[:k].T),
            "product": rebuilt,
        },
    }
    write_json(args.output, result)
    median = {name: statistics.median(values) for name, values in result["seconds"].items()}
    print(f"factored {median['factored'] * 1e3:.1f} ms, svd_lowrank {median['svd_lowrank'] * 1e3:.1f} ms")
    print("{median:.1f} times as fast ({low:.1f} to {high:.1f})".format(**result["ratio"]))
    print("errors: " + ", ".join(f"{name} {value:.1e}" for name, value in result["error"].items()))
    print(f"Figures: {args.output}")


if __name__ == "__main__":
    main()
