"""Every recipe trains, evaluates and goes on, on real images at reduced size."""

import json
import os
from pathlib import Path

import pytest

from balanced_learning.training.data.proposals import ProposalFile
from balanced_learning.training.recipe import list_recipes
from balanced_learning.training.reporting import reports
from examples import train_torchvision_libra

NAMES = [line.split()[0] for line in list_recipes().splitlines()]
TOY = ["--small", "--min-size", "64", "--max-size", "96", "--limit", "4", "--limit-batches", "1", "-b", "2", "-j", "0"]
TOY += ["--lr-scheduler", "multisteplr"]  # which leaves the number of epochs open


@pytest.fixture(scope="module")
def coco_tiny():
    root = Path(os.environ.get("BALANCED_LEARNING_DATA", ""), "coco_tiny")
    if not root.is_dir():
        pytest.skip("BALANCED_LEARNING_DATA names no folder with coco_tiny")
    return root


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(reports, "save_curves", lambda *_: None)
    monkeypatch.setattr(train_torchvision_libra, "save_evaluation", lambda *_: None)


@pytest.fixture(scope="module")
def proposals(coco_tiny, tmp_path_factory):
    """Of an RPN that has learned for a step."""
    folder = tmp_path_factory.mktemp("rpn")
    run("paper/rpn_r50_1x", coco_tiny, folder, "--epochs", "1")
    file = folder / "proposals.npy"
    train_torchvision_libra.main(["--resume", str(folder / "checkpoint.pth"), "--dump-proposals", str(file)])
    return file


def run(recipe, root, folder, *more):
    options = [*TOY, "--backbone", "resnet50", "--data-path", str(root), "--output-dir", str(folder), *more]
    train_torchvision_libra.main(["--recipe", recipe, *options])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_trains_evaluates_and_goes_on(recipe, coco_tiny, proposals, tmp_path):
    more = ["--proposals", str(proposals)] if "fast_rcnn" in recipe else []
    run(recipe, coco_tiny, tmp_path, "--epochs", "1", *more)
    run(recipe, coco_tiny, tmp_path, "--epochs", "2", "--resume", str(tmp_path / "checkpoint.pth"), *more)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert all(0 < row["loss"] < 100 for row in rows)
    metric = "AR1000" if "rpn" in recipe else "AP"
    assert all(row[metric] is not None and 0 <= row[metric] <= 1 for row in rows)


@pytest.mark.slow
def test_the_proposals_of_an_rpn_are_of_all_images(proposals, coco_tiny):
    file = ProposalFile.open(proposals)
    for split in ("train2017", "val2017"):
        images = json.loads((coco_tiny / "annotations" / f"instances_{split}.json").read_text())["images"][:4]
        assert all(len(file.boxes(split, image["id"], 10)) for image in images)
