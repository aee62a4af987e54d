"""Reads data in COCO layout and finds its faults before training does.

data/annotations/instances_train2017.json    data/train2017/*.jpg
data/annotations/instances_val2017.json      data/val2017/*.jpg
"""

import json
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from balanced_learning.training.data.file_names import find_file, tell_found
from balanced_learning.training.data.images import check_file
from balanced_learning.training.errors import UserError

Entry = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """One half of a data set, checked.

    Attributes:
        json_file: where it was read from.
        image_dir: the folder of its images.
        images: entries with ``id``, ``file_name``, ``width`` and ``height``.
        annotations: by image id, entries with ``bbox`` (x, y, width, height in pixels), ``category_id``, ``iscrowd``
            and ``area``; crowds and boxes without area are among them.
        categories: name by id.
    """

    json_file: Path
    image_dir: Path
    images: list[Entry]
    annotations: dict[int, list[Entry]]
    categories: dict[int, str]

    def boxes(self, image: Entry) -> list[Entry]:
        """The annotations of an image that can be learned: no crowds, and some area inside the image."""
        return [a for a in self.annotations[image["id"]] if not a["iscrowd"] and _area_inside(a["bbox"], image) > 0]

    def first(self, count: int) -> "Split":
        """The same split with its first images alone."""
        images = self.images[:count]
        annotations = {image["id"]: self.annotations[image["id"]] for image in images}
        return replace(self, images=images, annotations=annotations)


def read_split(root: Path, name: str, *, limit: int | None = None) -> Split:
    """Reads and checks ``train2017`` or ``val2017`` of the data in ``root``.

    Raises:
        UserError: for whatever makes training or evaluation impossible. Boxes without area are only told of.
    """
    for folder in (root, root / "annotations", root / name):
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; --data-path needs annotations/instances_{name}.json and {name}/ in it"
            )
    json_file = root / "annotations" / f"instances_{name}.json"
    content = _load(json_file)
    categories = {}
    for category in _entries(content, "categories", json_file, {"id": int, "name": str}):
        if category["id"] in categories:
            raise UserError(f"{json_file}: category {category['id']}: the id is used twice")
        categories[category["id"]] = category["name"]
    if not categories:
        raise UserError(f"{json_file}: 'categories' is empty")

    images = _entries(content, "images", json_file, {"id": int, "file_name": str})
    annotations: dict[int, list[Entry]] = {}
    for image in images:
        if image["id"] in annotations:
            raise UserError(f"{json_file}: image {image['id']}: the id is used twice")
        annotations[image["id"]] = []
    if not images:
        raise UserError(f"{json_file}: 'images' is empty")

    for annotation in _entries(content, "annotations", json_file, {"image_id": int, "category_id": int, "bbox": list}):
        where = f"{json_file}: annotation {annotation.get('id', '(without id)')}"
        if annotation["image_id"] not in annotations:
            raise UserError(f"{where}: image_id {annotation['image_id']} is not among 'images'")
        if annotation["category_id"] not in categories:
            raise UserError(f"{where}: category_id {annotation['category_id']} is not among 'categories'")
        box = annotation["bbox"]
        if len(box) != 4 or not all(isinstance(x, int | float) and math.isfinite(x) for x in box):
            raise UserError(f"{where}: bbox must be four finite numbers [x, y, width, height], got {box}")
        area = box[2] * box[3] if annotation.get("area") is None else annotation["area"]
        if not isinstance(area, int | float):
            raise UserError(f"{where}: area must be a number, got {area!r}")
        annotations[annotation["image_id"]].append(
            {**annotation, "iscrowd": annotation.get("iscrowd") or 0, "area": area}
        )

    split = Split(json_file, root / name, images, annotations, categories)
    split = split if limit is None else split.first(limit)
    _check_images(split)
    _tell_empty_boxes(split)
    return split


def _load(json_file: Path) -> Entry:
    try:
        content = json.loads(json_file.read_bytes())
    except OSError as error:
        raise UserError(f"{json_file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{json_file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{json_file}: not a COCO file, which is an object with 'images', 'annotations', 'categories'")
    return content


def _entries(content: Entry, key: str, json_file: Path, needs: dict[str, type]) -> list[Entry]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise UserError(f"{json_file}: not a COCO file: it has no list '{key}'")
    for i, entry in enumerate(entries):
        for name, kind in needs.items():
            value = entry.get(name) if isinstance(entry, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{json_file}: {key}[{i}]: '{name}' must be a {kind.__name__}, got {value!r}")
    return entries


def _check_images(split: Split) -> None:
    """Finds every file, and compares its size with the JSON, whose boxes depend on it, without decoding it."""

    def check(image: Entry) -> str | None:
        written = image["file_name"]
        found = find_file(split.image_dir, written)
        size, fault = check_file(split.image_dir / (found or written), (image["width"], image["height"]))
        if size is None:
            return f"{split.json_file}: image {image['id']}: {fault}"
        image["file_name"], (image["width"], image["height"]) = found, size
        return None

    for image in split.images:
        image |= {side: _pixels(split.json_file, image, side) for side in ("width", "height")}
    names = [image["file_name"] for image in split.images]
    with ThreadPoolExecutor() as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, which name no file
        faults = [fault for fault in pool.map(check, split.images) if fault]
    if faults:
        more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
        raise UserError(faults[0] + more)
    tell_found(split.json_file, names, [image["file_name"] for image in split.images])


def _pixels(json_file: Path, image: Entry, side: str) -> int | None:
    value = image.get(side)
    try:
        if value is None or (int(value) == float(value) and not isinstance(value, bool)):
            return value if value is None else int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{json_file}: image {image['id']}: {side} must be a whole number, got {value!r}")


def _tell_empty_boxes(split: Split) -> None:
    empty = [a for i in split.images for a in split.annotations[i["id"]] if _area_inside(a["bbox"], i) <= 0]
    if empty:
        print(
            f"warning: {split.json_file}: {len(empty)} boxes have no area inside their image and are not trained on; "
            f"the first is annotation {empty[0].get('id')}, bbox {empty[0]['bbox']}",
            file=sys.stderr,
        )


def _area_inside(box: list[float], image: Entry) -> float:
    x, y, width, height = box
    inside_x = min(x + width, image["width"]) - max(x, 0)
    inside_y = min(y + height, image["height"]) - max(y, 0)
    return max(inside_x, 0) * max(inside_y, 0)
