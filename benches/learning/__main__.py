"""What the learned layers learn: `python benches/learning planted` and `… classify`.

Every seed is fixed and everything runs on one thread, so a run repeats itself on the same kind of
processor. Leaves NAME.json with every single run, NAME.md with the tables and NAME.png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import methods
import pictures
import planted
import tables
import torch

SEEDS = range(5)


def run_planted() -> list[dict[str, Any]]:
    runs = []
    for name, experiment in (("FLGC", planted.flgc), ("DGConv", planted.dgconv)):
        for seed in SEEDS:
            runs.append({"layer": name, **experiment(seed)})
            print(runs[-1], flush=True)
    return runs


def run_classify(task: str) -> list[dict[str, Any]]:
    runs = []
    for seed in SEEDS:
        for method in methods.METHODS:
            runs.append(methods.run(method, task, seed))
            print(runs[-1], flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(prog="benches/learning", description=__doc__)
    parser.add_argument("experiment", choices=("planted", "classify"))
    parser.add_argument("--task", choices=("strokes", "digits"), default="strokes")
    parser.add_argument("--out", type=Path, default=Path("build/learning"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    if chosen.experiment == "planted":
        name, runs = "planted", run_planted()
        table, figure = tables.planted(runs), pictures.planted(runs)
    else:
        name, runs = chosen.task, run_classify(chosen.task)
        table, figure = tables.classify(runs), pictures.classify(runs, name)
    seconds = time.perf_counter() - start
    chosen.out.mkdir(parents=True, exist_ok=True)
    about = {"torch": torch.__version__, "seconds": round(seconds), "runs": runs}
    (chosen.out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    (chosen.out / f"{name}.md").write_text(table)
    figure.savefig(chosen.out / f"{name}.png", dpi=100)
    print(f"\n{table}\n{seconds:.0f} s; everything lies in {chosen.out}")


main()
