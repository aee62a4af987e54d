"""Reads data in COCO layout and finds its faults before training does.

data/annotations/instances_train2017.json    data/train2017/*.jpg
data/annotations/instances_val2017.json      data/val2017/*.jpg
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from balanced_learning.training.data.coco_json import read_json
from balanced_learning.training.data.columns import Columns
from balanced_learning.training.data.image_check import check_images
from balanced_learning.training.data.images import load_image
from balanced_learning.training.data.index import LARGE, load_index, save_index
from balanced_learning.training.data.left_out import Cause, count_in_words, find_causes, find_clipped
from balanced_learning.training.errors import UserError, warn

Entry = dict[str, Any]

NAMES = ("train2017", "val2017")  # of the halves


@dataclass(frozen=True)
class Split:
    """One half of a data set, checked.

    Attributes:
        json_file: where it was read from.
        image_dir: the folder of its images.
        categories: name by id.
        columns: images and boxes.
        causes (uint8 [M]): why each box is left out of training, a
            :class:`~balanced_learning.training.data.left_out.Cause`; 0 for those that can be learned.
    """

    json_file: Path
    image_dir: Path
    categories: dict[int, str]
    columns: Columns
    causes: np.ndarray

    @property
    def name(self) -> str:
        """``train2017`` or ``val2017``."""
        return self.image_dir.name

    @property
    def images(self) -> Sequence[Entry]:
        """Entries with ``id``, ``file_name``, ``width`` and ``height``, made when they are asked for."""
        return _Images(self.columns)

    @property
    def annotations(self) -> Mapping[int, list[Entry]]:
        """By image id, entries with ``bbox``, ``category_id``, ``iscrowd`` and ``area``; none is left out."""
        return _Annotations(self.columns)

    def boxes(self, image: Entry) -> list[Entry]:
        """The annotations of an image that can be learned."""
        causes = self.causes[self.columns.boxes_of(self.columns.position(image["id"]))]
        return [a for a, cause in zip(self.annotations[image["id"]], causes, strict=True) if cause == Cause.NONE]

    def has_boxes(self) -> np.ndarray:
        """Whether an image has a box that can be learned, bool [N]."""
        before = np.concatenate(([0], np.cumsum(self.causes == Cause.NONE)))
        return before[self.columns.first_boxes[1:]] > before[self.columns.first_boxes[:-1]]

    def truth(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The objects of an image that can be learned: boxes [n, 4] (x, y, width, height), and category ids [n]."""
        rows = self.columns.boxes_of(position)
        learned = self.causes[rows] == Cause.NONE
        return self.columns.boxes[rows][learned], self.columns.category_ids[rows][learned]

    def file_of(self, image_id: int) -> Path:
        """The file of an image."""
        (position,) = np.flatnonzero(self.columns.image_ids == image_id)
        return self.image_dir / self.images[int(position)]["file_name"]

    def load_image(self, position: int) -> Image.Image:
        """An image as its annotations see it, RGB.

        Raises:
            UserError: if it cannot be decoded, or has changed since it was checked.
        """
        entry = self.images[position]
        return load_image(self.image_dir / entry["file_name"], (entry["width"], entry["height"]))

    def as_one_category(self) -> "Split":
        """The same split for detectors that tell objects from the background alone."""
        category_ids = np.ones_like(self.columns.category_ids)
        return replace(
            self, categories={1: "object"}, columns=replace(self.columns, category_ids=category_ids, folder=None)
        )

    def take(self, positions: np.ndarray) -> "Split":
        """The same split with these images alone."""
        return replace(self, columns=self.columns.take(positions), causes=self.causes[self.columns.rows_of(positions)])

    def first(self, count: int) -> "Split":
        """The same split with its first images alone."""
        return self if count >= len(self.columns) else self.take(np.arange(count))


def read_split(
    root: Path, name: str, *, limit: int | None = None, resized: tuple[int, int] | None = None, anew: bool = False
) -> Split:
    """Reads and checks ``train2017`` or ``val2017`` of the data in ``root``.

    Of a large data set, later calls map an index of it into memory, without looking at JSON and images again.

    Args:
        root: the folder.
        name: of the half.
        limit: take the first images alone.
        resized: the shorter side that images are resized to and the longest that they may have, in pixels; what gets
            smaller than a pixel by it is left out of training.
        anew: take no index.

    Raises:
        UserError: for whatever makes training or evaluation impossible. Boxes that are left out are only told of.
    """
    for folder in (root, root / "annotations", root / name):
        if not os.path.isdir(folder):  # False as well where it cannot be looked for
            raise UserError(
                f"{folder}: no such folder; --data-path needs annotations/instances_{name}.json and {name}/ in it"
            )
    json_file, image_dir = root / "annotations" / f"instances_{name}.json", root / name
    index = None if anew else load_index(json_file, image_dir)
    if index:
        columns, categories = index
        columns = columns if limit is None else columns.first(limit)
    else:
        columns, categories = read_json(json_file)
        columns = columns if limit is None else columns.first(limit)
        columns = check_images(columns, json_file, image_dir)
        if limit is None and json_file.stat().st_size >= LARGE:
            columns = save_index(json_file, image_dir, columns, categories)
    _check_units(columns, json_file)
    split = Split(json_file, image_dir, categories, columns, find_causes(columns, resized))
    _tell_left_out(split, trained="train" in name)
    _tell_clipped(split)
    return split


def _check_units(columns: Columns, json_file: Path) -> None:
    """Refuses boxes in shares of the image's sides, which are all smaller than a pixel."""
    ends = columns.boxes[:, :2] + columns.boxes[:, 2:]
    rounding = 1e-3
    if ends.size and 0 < ends.max() <= 1 + rounding and columns.boxes.min() >= -rounding and columns.widths.max() > 1:
        raise UserError(
            f"{json_file}: all coordinates are from 0 to 1, such as {_plain(columns.boxes[0])}; bbox must be "
            "[x, y, width, height] in pixels"
        )


def _tell_left_out(split: Split, trained: bool) -> None:
    causes = split.causes
    if not trained:  # crowds are what evaluation knows how to treat
        causes = np.where(causes == Cause.CROWD, Cause.NONE, causes)
    rows = np.flatnonzero(causes)
    if not rows.size:
        return
    consequence = "left out of training" if trained else "in AP all the same, as missed: nothing can find them"
    warn(
        f"{split.json_file}: {len(rows)} of {len(causes)} boxes are {consequence}: {count_in_words(causes)}; "
        f"{_first(split.columns, rows)}"
    )


def _tell_clipped(split: Split) -> None:
    rows = np.flatnonzero(find_clipped(split.columns, margin=1) & (split.causes == Cause.NONE))
    if rows.size:
        warn(
            f"{split.json_file}: {len(rows)} boxes reach more than a pixel beyond their image and are clipped; bbox is "
            f"[x, y, width, height]; {_first(split.columns, rows)}"
        )


def _first(columns: Columns, rows: np.ndarray) -> str:
    """Names the first in the JSON of some boxes."""
    first = rows[np.argmin(columns.entries[rows])]
    return f"the first is annotations[{columns.entries[first]}], bbox {_plain(columns.boxes[first])}"


class _Images(Sequence):
    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        columns = self._columns
        return {
            "id": int(columns.image_ids[index]),
            "file_name": columns.file_name(index),
            "width": int(columns.widths[index]),
            "height": int(columns.heights[index]),
        }


class _Annotations(Mapping):
    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns)

    def __iter__(self) -> Iterator[int]:
        return iter(self._columns.image_ids.tolist())

    def __getitem__(self, image_id: int) -> list[Entry]:
        columns = self._columns
        rows = columns.boxes_of(columns.position(image_id))
        return [
            {"image_id": image_id, "bbox": _plain(box), "category_id": category_id, "iscrowd": int(crowd), "area": area}
            for box, category_id, crowd, area in zip(
                columns.boxes[rows],
                columns.category_ids[rows].tolist(),
                columns.crowds[rows],
                _plain(columns.areas[rows]),
                strict=True,
            )
        ]


def _plain(numbers: np.ndarray) -> list[float]:
    """Whole numbers as integers, as they are written in the JSON."""
    return [int(number) if number.is_integer() else number for number in numbers.tolist()]
