"""Average precision of the training script on a CPU, over several seeds: on the shapes it draws, and on real images.

    python benchmarks/training.py shapes
    python benchmarks/training.py bccd --data-path data/bccd
    python benchmarks/training.py shapes --jobs 2 --threads 1

Trains Libra Faster R-CNN and the plain one alike. Writes benchmarks/results/training_<case>.json with the last row of
each run's metrics, the seconds it took, from start to end, and the device, versions and commit it ran with, and prints
the table that the documentation has of it. A measurement that was stopped goes on where it was, if nothing has changed
since.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean

import torch

from _common import RESULTS, environment, markdown, write
from _intervals import of_difference
from balanced_learning.training.reproduction.spreads import interval

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"Libra": [], "plain": ["--no-sampler", "--no-pyramid", "--no-box-loss"]}
BCCD = ["--recipe", "shapes", "--min-size", "160", "--max-size", "240", "--epochs", "12"]
CASES = {"shapes": ([], 3), "bccd": (BCCD, 2)}  # options and number of seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--data-path", type=Path, help="the data of the case, if it is not drawn")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    unfinished = RESULTS / f"training_{args.case}.unfinished.json"  # untracked: it makes no commit dirty
    results = _begun(unfinished, environment("cpu") | {"runs_at_a_time": args.jobs})
    options = _options(args.case)
    done = results["runs"]
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = {
            pool.submit(run, options[name], args.data_path, args.threads): name for name in options if name not in done
        }
        try:
            for future in as_completed(todo):
                done[todo[future]] = future.result()
                write(unfinished, results)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else the others would be run first
            raise
    results["runs"] = {name: done[name] for name in options}
    write(RESULTS / f"training_{args.case}.json", results)
    unfinished.unlink(missing_ok=True)
    print(f"\n{table(results)}")


def _options(case: str) -> dict[str, list[str]]:
    options, num_seeds = CASES[case]
    return {
        _run_name(name, seed): [*options, *parts, "--seed", str(seed)]
        for seed in range(num_seeds)
        for name, parts in PARTS.items()
    }


def _begun(unfinished: Path, surroundings: dict) -> dict:
    """The results of a stopped measurement with the same device, versions and commit."""
    begun = json.loads(unfinished.read_text()) if unfinished.exists() else {}
    is_same = not surroundings["commit"].endswith("-dirty") and surroundings.items() <= begun.items()
    return surroundings | {"runs": begun["runs"] if is_same else {}}


def run(options: list[str], data_path: Path | None, threads: int) -> dict:
    """The options, the last row of metrics, and the seconds of the whole run: starting, drawing, training, reports."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "examples" / "train_torchvision_libra.py"), *options]
        command += ["--data-path", str(data_path)] if data_path else []
        environ = os.environ | {"XDG_CACHE_HOME": folder, "OMP_NUM_THREADS": str(threads)}
        start = time.perf_counter()
        subprocess.run([*command, "--device", "cpu", "--output-dir", str(out)], check=True, env=environ)
        seconds = time.perf_counter() - start
        row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return {"options": " ".join(options), "total_seconds": seconds, **row}


def table(results: dict) -> str:
    """As Markdown: average precision in percent, and the minutes of the whole run, of each seed and their mean."""
    runs = results["runs"]
    seeds = range(len(runs) // len(PARTS))
    measures = {"AP": ("AP", 100), "AP50": ("AP50", 100), "AP75": ("AP75", 100), "minutes": ("total_seconds", 1 / 60)}
    rows = []
    for label, of in {**{str(seed): [seed] for seed in seeds}, "mean": seeds}.items():
        row = {"seed": label}
        for measure, (key, factor) in measures.items():
            for name in PARTS:
                row[f"{measure} {name}"] = f"{factor * fmean(runs[_run_name(name, seed)][key] for seed in of):.1f}"
        rows.append(row)
    pairs = [100 * (runs[_run_name("Libra", seed)]["AP"] - runs[_run_name("plain", seed)]["AP"]) for seed in seeds]
    how = ", with the 95 % interval" if interval(pairs) else ""
    return f"{markdown(rows)}\n\nLibra minus plain, AP{how}: {of_difference(pairs)}."


def _run_name(name: str, seed: int) -> str:
    return f"{name} Faster R-CNN, seed {seed}"


if __name__ == "__main__":
    main()
