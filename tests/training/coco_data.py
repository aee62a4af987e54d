"""Data sets in COCO layout: a tiny one drawn for the tests, and real ones where BALANCED_LEARNING_DATA has them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    """Two images to train on, one to evaluate, with sparse category ids; small enough to be spoilt by every test."""
    root = tmp_path / "data"
    for split, ids in (("train2017", (11, 12)), ("val2017", (21,))):
        (root / split).mkdir(parents=True)
        for image_id in ids:
            Image.new("RGB", (64, 48), "navy").save(root / split / f"{image_id}.png")
        content = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in ids],
            "annotations": [
                {"id": 10 * i, "image_id": i, "category_id": 90, "bbox": [4, 4, 30, 20], "area": 600, "iscrowd": 0}
                for i in ids
            ],
            "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def edit(coco_root: Path) -> Callable:
    """Changes the training JSON of ``coco_root``, or that of "val", through a function of its content."""

    def change(spoil: Callable[[dict], object], part: str = "train") -> Path:
        file = coco_root / "annotations" / f"instances_{part}2017.json"
        content = json.loads(file.read_text())
        spoil(content)
        file.write_text(json.dumps(content))
        return file

    return change


def add_images(root: Path, split: str, count: int) -> None:
    """Adds copies of the first image of "train" or "val", with its first box, and ids from 31 on."""
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    for image_id in range(31, 31 + count):
        source = root / f"{split}2017" / content["images"][0]["file_name"]
        source.with_name(f"{image_id}.png").write_bytes(source.read_bytes())
        content["images"].append({"id": image_id, "file_name": f"{image_id}.png"})
        content["annotations"].append({**content["annotations"][0], "id": image_id, "image_id": image_id})
    file.write_text(json.dumps(content))


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    def folder(name: str) -> Path:
        root = os.environ.get("BALANCED_LEARNING_DATA")
        if root is None or not Path(root, name).is_dir():
            pytest.skip(f"real data {name} is not in BALANCED_LEARNING_DATA={root}")
        return Path(root, name)

    return folder
