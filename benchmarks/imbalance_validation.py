"""Measures whether the report on imbalances predicts which part of Libra R-CNN helped in the study.

    python benchmarks/imbalance_validation.py runs/bccd_finetuned runs/bccd_scratch ...
    python benchmarks/imbalance_validation.py                                           # the page's table alone

Takes output folders of `examples/reproduce.py --table study`, as benchmarks/study.py does. Calls
examples/imbalance_report.py on the checkpoint of each plain detector whose run is finished, with either beta. Writes
benchmarks/results/imbalance_validation.json after every report; what is in there is not measured again. From that file,
and from what benchmarks/study.py has written of how the parts changed AP, come the tables in docs/study.md.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from _common import RESULTS
from _validation import BASELINES, Validation, block
from balanced_learning.training.endings import ends_in_one_line
from balanced_learning.training.files import write_text
from balanced_learning.training.imbalance.advice import approach, likeness, lost_share, raised_share, unevenness
from balanced_learning.training.settings import positive
from examples import imbalance_report
from imbalance_page import measured
from study import FILE as STUDY
from study import ROOT, as_json, fill, gather, read_results

FILE = "imbalance_validation.json"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="output folder of a situation")
    parser.add_argument("--batches", type=positive, default=50, metavar="N", help="of images, of each report")
    given = parser.parse_args(words)
    with ends_in_one_line():
        update(given.folders, given.batches, RESULTS / FILE, ROOT / "docs" / "study.md")


def update(folders: list[Path], batches: int, file: Path, page: Path) -> None:
    """Measures what is not measured yet, and writes the file and the page."""
    results: Validation = read_results(file)
    for folder in folders:
        rows, name = gather(folder)["rows"], folder.resolve().name
        of_name = results.setdefault(name, {})
        done = {row: rows.get(row, {}).get("seeds", {}) for row in BASELINES}
        left = [(row, seed) for row in done for seed in done[row] if seed not in of_name.get(row, {})]
        for number, (row, seed) in enumerate(left, 1):
            print(f"{name}: report {number} of {len(left)}, {row} with seed {seed}", flush=True)
            content = report(folder / "runs" / "study" / row / f"seed_{seed}" / "checkpoint.pth", batches)
            of_name.setdefault(row, {})[seed] = predictions(content, BASELINES[row])
            results = dict(sorted(results.items()))
            write_text(file, as_json(results, levels=4) + "\n")
    text = block(results, read_results(file.with_name(STUDY)))
    write_text(page, fill(page.read_text(encoding="utf-8"), {"validation": text}))
    print(text)


def report(checkpoint: Path, batches: int) -> dict[str, Any]:
    """The report on a checkpoint, as the program writes it."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--resume", f"{checkpoint}", "--batches", f"{batches}", "--output-dir", folder]
        imbalance_report.main(options)
        return json.loads((Path(folder) / "imbalance.json").read_text(encoding="utf-8"))


def predictions(content: dict[str, Any], levels: dict[str, str]) -> dict[str, Any]:
    """What a report says of parts, by their levels, and the figures that this rests on."""
    advice, figures = {each["level"]: each for each in content["advice"]}, figures_of(content)
    data = {name: content["data"][name] for name in ("images", "evaluated_images")}
    parts = {
        part: {
            "strength": _rounded(advice[level]["strength"]),
            "verdict": advice[level]["verdict"],
            "figures": {name: _rounded(value) for name, value in figures[level].items()},
        }
        for part, level in levels.items()
    }
    return {**data, **parts}


def figures_of(content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures that the strength of each level rests on, and others that it could rest on."""
    of = measured(content)
    sample, objective, metrics = of.sample, of.objective, of.evaluation.metrics
    return {
        "sample": {
            "changed": sample.changed,
            "approach": approach(sample),
            "hard minus random": sample.above["hard"] - sample.above["random"],
        }
        if sample
        else {},
        "feature": {"unevenness": unevenness(of.feature), "likeness": likeness(of.feature.likeness_before)},
        "objective": {
            "inliers' gain": raised_share(objective),
            "growth": objective.growth,
            "lost": lost_share(metrics["AP50"], metrics["AP75"]),
        },
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


if __name__ == "__main__":
    main()
