"""The demo over several seeds: mean and spread of every arm. Resumable; an arm that is done is kept.

python benchmarks/demo_seeds.py --seeds 0 1 2 --output demo-seeds
"""

import argparse
import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spf.files import write_json
from spf.lab.demo.run import DemoArguments, run_demo

METRICS = ("asr", "over_refusal", "utility", "seconds_per_step")


def summarise(runs: list[dict]) -> dict:
    """Per arm and metric: the values, their mean and their sample standard deviation (None for one run)."""
    summary: dict = {}
    for arm in runs[0]["arms"]:
        for metric in METRICS:
            values = [run["arms"][arm][metric] for run in runs]
            if values[0] is not None:
                summary.setdefault(arm, {})[metric] = {
                    "values": values,
                    "mean": statistics.mean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("demo-seeds"))
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        directory = args.output / f"seed-{seed}"
        finished = directory / "results.json"
        runs.append(
            json.loads(finished.read_text("utf-8"))
            if finished.is_file()
            else run_demo(DemoArguments(output=str(directory), seed=seed))
        )
        write_json(args.output / "summary.json", {"seeds": args.seeds[: len(runs)], "arms": summarise(runs)})
    table = Table("arm", *METRICS)
    for arm, metrics in summarise(runs).items():
        cells = []
        for metric in METRICS:
            found = metrics.get(metric)
            spread = "" if not found or found["std"] is None else f" ± {found['std']:.3f}"
            cells.append("" if not found else f"{found['mean']:.3f}{spread}")
        table.add_row(arm, *cells)
    Console().print(table)
    Console().print(f"Summary of {len(runs)} seeds: {args.output / 'summary.json'}")


if __name__ == "__main__":
    main()
