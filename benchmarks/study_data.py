"""How fast the controlled world's samples are drawn, on one core: python benchmarks/study_data.py --output FILE"""

import argparse
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from spf.files import write_json
from spf.lab.study.data import Sampler, WorldSettings

WORLDS = {
    "paper": WorldSettings(),
    "released": WorldSettings(level5="parity", window=(25, 34), pairs=2, null="2a"),
    "tiny": WorldSettings(leaf=1, window=(12, 12), pcfgs=(1,), branches=("base", "safe", "id_mg")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/study/data_speed.json"))
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict = {"batch": args.batch, "repeats": args.repeats, "platform": platform.platform(), "worlds": {}}
    results["versions"] = {name: version(name) for name in ("spf", "numpy", "torch")}
    unsafe = np.arange(args.batch) % 2 == 0
    for name, world in WORLDS.items():
        speeds: dict[str, list[float]] = {"pretraining": [], "safety": []}
        for repeat in range(args.repeats + 1):
            sampler = Sampler(world, (0, repeat))
            for kind, draw in (
                ("pretraining", lambda s=sampler: s.pretraining(args.batch)),
                ("safety", lambda s=sampler: s.safety(unsafe)),
            ):
                # Processor time: other work on the machine does not count.
                start = time.process_time()
                draw()
                if repeat:  # the first builds the tables
                    speeds[kind].append(args.batch / (time.process_time() - start))
        results["worlds"][name] = {
            kind: {"median": round(float(np.median(v))), "min": round(min(v)), "max": round(max(v))}
            for kind, v in speeds.items()
        }
        for kind, found in results["worlds"][name].items():
            print(f"{name:9} {kind:12} {found['median']:8} samples/s (min {found['min']}, max {found['max']})")
    write_json(args.output, results)
    print(f"Figures: {args.output}")


if __name__ == "__main__":
    main()
