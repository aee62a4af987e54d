"""Writes what the documentation shows of a report on imbalances: its page and its sentences.

    python benchmarks/imbalance_page.py runs/imbalance      # an output folder of examples/imbalance_report.py
    python benchmarks/imbalance_page.py                     # the picture and the sentences alone

Keeps the figures of imbalance.json, with device, versions and commit, in benchmarks/results/imbalance_report.json. From
that file come the picture docs/images/imbalance_report.svg and the sentences in docs/does_it_help.md.
"""

import argparse
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from _common import RESULTS, without_files
from balanced_learning.detection.imbalance.feature_level import FeatureLevel
from balanced_learning.detection.imbalance.objective_level import ObjectiveLevel
from balanced_learning.detection.imbalance.sample_level import SampleLevel
from balanced_learning.training.config import Config, LibraConfig, ModelConfig
from balanced_learning.training.endings import ends_in_one_line
from balanced_learning.training.evaluation import ErrorKind, Evaluation
from balanced_learning.training.files import write_text
from balanced_learning.training.imbalance.advice import Advice, advise
from balanced_learning.training.imbalance.gathering import Measurements
from balanced_learning.training.reporting.imbalance_figure import draw_imbalance
from docs.pictures import SVG, save
from study import ROOT, as_json, fill, read_json, without_folder

FILE = "imbalance_report.json"
LEFT_OUT = ("advice", "versions")  # what follows from the figures, and what has the folders of a machine


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="output folder of the report")
    with ends_in_one_line():
        update(parser.parse_args(words).folder, RESULTS / FILE, ROOT / "docs")


def update(folder: Path | None, file: Path, docs: Path) -> None:
    """Replaces the figures in the file by those of the folder, if any, and writes what follows from them."""
    if folder:
        write_text(file, as_json(kept(folder), levels=3) + "\n")
    content = json.loads(file.read_text(encoding="utf-8"))
    page = docs / "does_it_help.md"
    write_text(page, fill(page.read_text(encoding="utf-8"), {"imbalance": sentences(advices(content))}))
    draw(content, docs / "images" / "imbalance_report.svg")


def kept(folder: Path) -> dict[str, Any]:
    """What is kept of the report in a folder: all but what is of one machine, or follows from the rest.

    Raises:
        UserError: if there is none.
    """
    content = read_json(folder, "imbalance.json")
    content |= {
        part: {name: without_folder(value) for name, value in content[part].items()} for part in ("detector", "data")
    }
    return {name: value for name, value in content.items() if name not in LEFT_OUT} | {
        "versions": without_files(content["versions"])
    }


def measured(content: dict[str, Any]) -> Measurements:
    """The measurements that an imbalance.json has."""
    sample, objective = content["sample"] and dict(content["sample"]), content["objective"]
    bins = sample.pop("bins") if sample else []
    if sample:
        shares = {name: torch.tensor(values) for name, values in sample["shares"].items()}
        above = {name: _number(value) for name, value in sample["above"].items()}
        sample |= {"edges": torch.tensor(sample["edges"]), "shares": shares, "above": above}
    matrices = {
        name: torch.tensor([[_number(value) for value in row] for row in content["feature"][name]])
        for name in ("contribution", "likeness_before", "likeness_after")
    }
    return Measurements(
        images=content["data"]["images"],
        evaluated_images=content["data"]["evaluated_images"],
        bins=bins,
        sample=SampleLevel(**sample) if sample else None,
        feature=FeatureLevel(**content["feature"] | matrices),
        objective=ObjectiveLevel(**{each.name: _number(objective[each.name]) for each in fields(ObjectiveLevel)}),
        evaluation=Evaluation(
            {name: objective[name] for name in ("AP50", "AP75")},
            {kind: ErrorKind(0, cost) for kind, cost in objective["errors"].items()},
            [],
        ),
    )


def _number(value: Any) -> Any:
    return math.nan if value is None else value


def advices(content: dict[str, Any]) -> list[Advice]:
    """What is advised today with these figures."""
    names = {each.name for config in (ModelConfig, LibraConfig) for each in fields(config)}
    settings = {name: value for name, value in content["detector"].items() if name in names}
    return advise(measured(content), Config.of(settings))


def sentences(advices: list[Advice]) -> str:
    """A quotation of them, with the flags as code."""
    lines = (f"> **{each.level} level: {each.verdict}** ({each.strength:.2f}). {each.sentence}" for each in advices)
    return re.sub(r"--[\w-]+", r"`\g<0>`", "\n>\n".join(lines))


def draw(content: dict[str, Any], file: Path) -> None:
    """Writes the page of a report as SVG."""
    data = content["data"]
    title = (
        f"{Path(data['data_path']).name if data['data_path'] else 'drawn shapes'}: {data['images']} training images, "
        f"{data['evaluated_images']} evaluated"
    )
    with mpl.rc_context(SVG):
        save(draw_imbalance(title, measured(content), advices(content)), file)


if __name__ == "__main__":
    main()
