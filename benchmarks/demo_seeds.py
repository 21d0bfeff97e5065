"""The demo over several seeds: mean and spread of every arm. Resumable; an arm that is done is kept.

python benchmarks/demo_seeds.py --seeds 0 1 2 --output demo-seeds
"""

import argparse
import json
from pathlib import Path

from rich.console import Console

from spf.files import write_json
from spf.lab.demo.run import DemoArguments, run_demo
from spf.lab.report.stats import spread
from spf.lab.report.tables import of_text, rich_table

METRICS = ("asr", "over_refusal", "utility", "seconds_per_step")


def summarise(runs: list[dict]) -> dict:
    """Per arm and metric: the values, their mean and their sample standard deviation (None for one run)."""
    summary: dict = {}
    for arm in runs[0]["arms"]:
        for metric in METRICS:
            values = [run["arms"][arm][metric] for run in runs]
            if found := spread(values):
                summary.setdefault(arm, {})[metric] = {"values": values, "mean": found.mean, "std": found.sd}
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
    rows = []
    for arm, metrics in summarise(runs).items():
        found = [metrics.get(metric) for metric in METRICS]
        spreads = ["" if not f or f["std"] is None else f" ± {f['std']:.3f}" for f in found]
        rows.append([arm, *(f"{f['mean']:.3f}{sd}" if f else "" for f, sd in zip(found, spreads, strict=True))])
    Console().print(rich_table(of_text(["arm", *METRICS], rows)))
    Console().print(f"Summary of {len(runs)} seeds: {args.output / 'summary.json'}")


if __name__ == "__main__":
    main()
