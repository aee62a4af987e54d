"""Average precision of the training script on a CPU, over several seeds: on the shapes it draws, and on real images.

    python benchmarks/training.py shapes
    python benchmarks/training.py bccd --data-path data/bccd

Writes benchmarks/results/training_<case>.json with the last row of each run's metrics, the seconds it took, and the
device, versions and commit it ran with, and prints the table that the README has of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import RESULTS, environment, markdown, write

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ["--no-sampler", "--no-pyramid", "--no-box-loss"]
BCCD = ["--small", "-b", "4", "--min-size", "160", "--max-size", "240", "--epochs", "5", "-j", "0", "--opt", "adamw"]
BCCD += ["--lr", "0.001", "--lr-scheduler", "cosineannealinglr", "--warmup-iters", "60", "--print-freq", "50"]
RUNS = {
    "shapes": {f"Libra Faster R-CNN, seed {seed}": ["--seed", str(seed)] for seed in range(3)},
    "bccd": {
        f"{name}, seed {seed}": [*BCCD, *parts, "--seed", str(seed)]
        for seed in range(2)
        for name, parts in (("Libra Faster R-CNN", []), ("plain Faster R-CNN", PLAIN))
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(RUNS))
    parser.add_argument("--data-path", type=Path, help="the data of the case, if it is not drawn")
    args = parser.parse_args()
    results = environment("cpu")
    results["runs"] = {name: run(options, args.data_path) for name, options in RUNS[args.case].items()}
    write(RESULTS / f"training_{args.case}.json", results)
    print(f"\n{table(results)}")


def run(options: list[str], data_path: Path | None) -> dict:
    """The options, the last row of metrics, and the seconds of the whole run, start-up and reports included."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "examples" / "train_torchvision_libra.py"), *options]
        command += ["--data-path", str(data_path)] if data_path else []
        start = time.perf_counter()
        subprocess.run([*command, "--device", "cpu", "--output-dir", str(out)], check=True)
        seconds = time.perf_counter() - start
        row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return {"options": " ".join(options), "total_seconds": seconds, **row}


def table(results: dict) -> str:
    """The runs as Markdown: average precision in percent, and the minutes of the whole run."""
    rows = []
    for name, row in results["runs"].items():
        precision = {metric: f"{100 * row[metric]:.1f}" for metric in ("AP", "AP50", "AP75")}
        rows.append({"": name, **precision, "minutes": f"{row['total_seconds'] / 60:.1f}"})
    return markdown(rows)


if __name__ == "__main__":
    main()
