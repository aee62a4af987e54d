"""Gathers what came out of the study's runs, and writes the tables and pictures that the documentation has of it.

    python benchmarks/study.py runs/bccd_finetuned runs/bccd_scratch ...
    python benchmarks/study.py                                              # the tables and pictures alone

Takes output folders of `examples/reproduce.py --table study`. The name of a folder is that of its situation: the data,
and what the detector starts from, as in bccd_finetuned or deeppcb_scratch. Writes benchmarks/results/study.json, with
the metrics of each finished run, its AP over the epochs, versions, device and commit. What is not in the folders stays
as it is in it: other situations, and other seeds that were trained with the same settings. From that file come the
parts of docs/study.md, docs/does_it_help.md and README.md between markers, and the pictures docs/images/study_*.svg.
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from _common import RESULTS, without_files
from _study_pictures import draw
from _study_results import SIZES
from _study_tables import COSTS, METRICS, blocks, table
from balanced_learning.training.data import coco_json
from balanced_learning.training.data.report import AREA_EDGES
from balanced_learning.training.endings import ends_in_one_line
from balanced_learning.training.errors import UserError
from balanced_learning.training.files import write_text
from balanced_learning.training.flags import as_typed
from balanced_learning.training.reproduction.folders import has_finished, read_rows, read_settings
from balanced_learning.training.reproduction.results import device_of, distinct

ROOT = Path(__file__).resolve().parents[1]
FILE = "study.json"
# The rows differ in none of them.
SETTINGS = (
    *(
        "backbone",
        "weights_backbone",
        "fpn_channels",
        "anchor_size",
        "box_batch_size_per_image",
        "min_size",
        "max_size",
    ),
    *("batch_size", "epochs", "opt", "lr", "weight_decay", "lr_scheduler"),
)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="output folder of a situation")
    with ends_in_one_line():
        update(parser.parse_args(words).folders, RESULTS / FILE, ROOT)


def update(folders: list[Path], file: Path, root: Path) -> None:
    """Takes the runs of the folders into the file, and writes what follows from it below ``root``."""
    results = read_results(file)
    for folder in folders:
        name = folder.resolve().name
        results[name] = joined(results.get(name), gather(folder))
    results = {name: results[name] for name in sorted(results) if results[name]["rows"]}
    if folders:
        write_text(file, as_json(results, levels=5) + "\n")
    for page in (root / "docs" / "study.md", root / "docs" / "does_it_help.md", root / "README.md"):
        text = page.read_text(encoding="utf-8")
        write_text(page, fill(text, {**blocks(results), "study": table(results)}))
    draw(results, root / "docs")
    for name, situation in results.items():
        print(f"{name}: {sum(len(row['seeds']) for row in situation['rows'].values())} runs")


def read_results(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """What a program has written to its output folder.

    Raises:
        UserError: if it is not there, or no JSON.
    """
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: holds no {name} that can be read ({error})") from None


def gather(folder: Path) -> dict[str, Any]:
    """What came out of the finished runs of a folder.

    Raises:
        UserError: if something is missing.
    """
    study = read_json(folder, "table_study.json")
    rows: dict[str, Any] = {}
    runs: list[Path] = []
    for row in study["rows"]:  # whatever seeds the last call was about
        done = {run.name.removeprefix("seed_"): run for run in _finished(folder / "runs" / row["recipe"])}
        if done:
            seeds = {seed: read_run(run) for seed, run in done.items()}
            rows[row["name"]] = {"label": row["label"], "baseline": row["baseline"], "seeds": seeds}
            runs += done.values()
    made = [read_settings(run) for run in runs]
    return {
        "data": Path(study["data"]).name,
        "images": study["images"],
        "boxes": boxes_by_size(Path(study["data"])),
        "options": [without_folder(word) for word in study["options"]],
        "is_whole": len(rows) == len(study["rows"]),
        "settings": shared_settings(runs, made),
        "versions": distinct([without_files(each["versions"]) for each in made]),
        "devices": distinct([device_of(each) for each in made]),
        "commits": [study["commit"]],
        "rows": rows,
    }


def boxes_by_size(data: Path) -> dict[str, int]:
    """The boxes to evaluate on by their size, as COCO's metrics have it; empty if the data are elsewhere."""
    file = data / "annotations" / "instances_val2017.json"
    if not file.exists():
        return {}
    columns, _ = coco_json.read_json(file)
    sizes = np.searchsorted(AREA_EDGES, columns.areas[~columns.crowds], side="right")
    return dict(zip(SIZES.values(), np.bincount(sizes, minlength=3).tolist(), strict=True))


def joined(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """The runs of both, where the settings are the same; otherwise those of now alone."""
    if not before or any(before[name] != now[name] for name in ("data", "images", "options", "settings")):
        return now
    rows = {}
    for name in before["rows"] | now["rows"]:
        old, new = (each["rows"].get(name, {"seeds": {}}) for each in (before, now))
        seeds = old["seeds"] | new["seeds"]
        rows[name] = old | new | {"seeds": {seed: seeds[seed] for seed in sorted(seeds, key=int)}}
    lists = {name: distinct([*before[name], *now[name]]) for name in ("versions", "devices", "commits")}
    either = {name: now[name] or before[name] for name in ("boxes", "is_whole")}
    return now | lists | either | {"rows": rows}


def _finished(folder: Path) -> list[Path]:
    """The folders of a row's runs that are over, by seed."""
    runs = sorted(folder.glob("seed_*"), key=lambda run: int(run.name.removeprefix("seed_")))
    return [run for run in runs if has_finished(run)]


def shared_settings(runs: list[Path], made: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all runs have in common.

    Raises:
        UserError: if one of them has another, which would be compared with the others.
    """
    for run, settings in zip(runs, made, strict=True):
        for name in SETTINGS:
            if settings[name] != made[0][name]:
                here, there = as_typed(name, settings[name]), as_typed(name, made[0][name])
                raise UserError(f"{run}: was made with {here}, and {runs[0]} with {there}")
    return {name: without_folder(made[0][name]) for name in SETTINGS} if made else {}


def read_run(folder: Path) -> dict[str, Any]:
    """The last metrics of a run, and its AP over the number of epochs trained, in percent.

    Raises:
        UserError: if the run has none.
    """
    evaluated = [row for row in read_rows(folder) if "AP" in row]
    if not evaluated:
        raise UserError(f"{folder}: no epoch in metrics.jsonl was evaluated")
    values = {name: in_percent(evaluated[-1].get(name)) for name in (*METRICS, *COSTS)}
    return values | {"curve": [[row["epoch"] + 1, in_percent(row["AP"])] for row in evaluated]}


def in_percent(value: float | None) -> float | None:
    """Rounded; a metric is not defined where there is nothing to find."""
    return None if value is None or not math.isfinite(value) else round(100 * value, 4)


def without_folder(word: Any) -> Any:
    """A word of a command without the place of a file on the machine that it was typed on."""
    return re.sub(r"(^|=)/.*/", r"\1", word) if isinstance(word, str) else word


def as_json(value: Any, levels: int, depth: int = 0) -> str:
    """JSON whose outer levels have an entry a line, so that a run is a line."""
    if not levels or not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False)
    entries = [
        f"{' ' * (depth + 1)}{json.dumps(key)}: {as_json(each, levels - 1, depth + 1)}" for key, each in value.items()
    ]
    return "{\n" + ",\n".join(entries) + f"\n{' ' * depth}}}"


def fill(text: str, parts: dict[str, str]) -> str:
    """Puts each part between its markers, where the text has them."""
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, has_both, after = rest.partition(end)
        if has_both:
            text = f"{before}{start}{part}\n{end}{after}"
    return text


if __name__ == "__main__":
    main()
