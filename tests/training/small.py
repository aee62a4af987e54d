"""A run that takes seconds: its flags, their settings, a checkpoint, and an evaluation that tells models apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from balanced_learning.training.checkpoint import Position, save
from balanced_learning.training.command_line import read_command_line
from balanced_learning.training.config import Config
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.evaluation import ErrorKind, Evaluation
from balanced_learning.training.flags import make_parser
from balanced_learning.training.model import build_model
from balanced_learning.training.tide import KINDS, SPECIAL_KINDS

FIRST_EPOCH = Position(epoch=1, step=0, iterations=1, images_per_step=2, sums=[], history=[{"epoch": 0}])  # is done
SMALL = ["--small", "--min-size", "64", "--max-size", "96", "-j", "0", "-b", "2", "--epochs", "1", "--device", "cpu"]


def config_of(*flags: object) -> Config:
    return read_command_line(make_parser().parse_args([str(flag) for flag in flags]))[0]


def save_untrained(path: Path, data_path: object = "-") -> Path:
    """Writes a checkpoint of random weights, with which a detector finds cats and dogs everywhere."""
    config = config_of("--data-path", data_path, *SMALL, "--output-dir", path.parent)
    labels = Labels({1: "cat", 2: "dog [old]"}, {1: 1, 2: 2}, num_classes=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(config, labels.num_classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, {"model": model}, config=config, labels=labels, position=FIRST_EPOCH)
    return path


def name_as_untrained(edit: Callable) -> None:
    """Gives the annotations of both splits the categories that the detector of :func:`save_untrained` knows."""

    def rename(content: dict[str, Any]) -> None:
        content["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog [old]"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 1

    edit(rename)
    edit(rename, "val")


def evaluation_of(**metrics: float) -> Evaluation:
    """An evaluation of these metrics, without errors and classes."""
    return Evaluation(metrics, {kind: ErrorKind(0, None) for kind in (*KINDS, *SPECIAL_KINDS)}, [])


def scripted(*aps: float) -> Callable[..., Evaluation]:
    """In place of ``evaluate_detections``: finds these APs one after the other."""
    left = iter(aps)
    return lambda *_, **__: evaluation_of(AP=next(left))


def fingerprint(split: Any, detections: dict[int, dict[str, Any]], *_: Any, limit: int) -> Evaluation:
    """Sums of the detections in place of COCO's metrics, of which a model that has hardly learned has none above 0."""
    assert sorted(detections) == sorted(image["id"] for image in split.images)
    outputs = [detections[image_id] for image_id in sorted(detections)]
    return evaluation_of(
        AP=sum(output["scores"].sum().item() for output in outputs),
        AP50=sum(output["boxes"].sum().item() for output in outputs) / 1e4,
    )
