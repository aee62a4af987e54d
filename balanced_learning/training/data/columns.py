"""Images and boxes of a data set as arrays: a tenth of the memory of dicts, and nothing that a fork would copy."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from balanced_learning.training.files import write_new


@dataclass(frozen=True)
class Columns:
    """A row for each of N images and of M boxes. The boxes of an image lie together, in the order of the images.

    Attributes:
        image_ids (int64 [N]): as in the JSON.
        widths, heights (int32 [N]): of the images, in pixels.
        names (uint8): the names of the files, one after the other, in UTF-8.
        name_ends (int64 [N]): the end of each name.
        first_boxes (int64 [N + 1]): the first box of each image, and M.
        boxes (float64 [M, 4]): x, y, width and height, in pixels.
        areas (float64 [M]): of the objects, in square pixels.
        category_ids (int64 [M]): as in the JSON.
        crowds (bool [M]): whether a box holds a crowd.
        entries (int32 [M]): the place of each box in the JSON's list.
        folder: where the arrays are mapped from, if they are.
    """

    image_ids: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    names: np.ndarray
    name_ends: np.ndarray
    first_boxes: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    category_ids: np.ndarray
    crowds: np.ndarray
    entries: np.ndarray
    folder: Path | None = None

    @classmethod
    def map(cls, folder: Path) -> "Columns":
        """Maps the arrays that :meth:`write` left in a folder."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.array_names()}
        return cls(**arrays, folder=folder)

    def write(self, folder: Path) -> None:
        """Writes the arrays into a new folder."""
        for name in self.array_names():
            write_new(folder / f"{name}.npy", partial(np.save, arr=getattr(self, name)))

    @classmethod
    def array_names(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name != "folder"]

    def __reduce__(self) -> Any:
        """Mapped arrays are sent to another process as the folder to map."""
        if self.folder:
            return Columns.map, (self.folder,)
        return Columns, tuple(getattr(self, name) for name in self.array_names())

    def __len__(self) -> int:
        """The number of images."""
        return len(self.image_ids)

    def file_name(self, position: int) -> str:
        start = self.name_ends[position - 1] if position else 0
        return self.names[start : self.name_ends[position]].tobytes().decode("utf-8", "surrogatepass")

    def boxes_of(self, position: int) -> slice:
        """The rows of an image's boxes."""
        return slice(int(self.first_boxes[position]), int(self.first_boxes[position + 1]))

    def image_of_boxes(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The position of each box's image, int64, for all boxes or for the rows from ``start`` to ``stop``."""
        stop = len(self.boxes) if stop is None else min(stop, len(self.boxes))
        first, last = np.searchsorted(self.first_boxes, (start, stop), side="right") - 1
        edges = self.first_boxes[first : last + 2].clip(start, stop)
        return np.repeat(np.arange(first, first + len(edges) - 1), np.diff(edges))

    def position(self, image_id: int) -> int:
        """The position of an image.

        Raises:
            KeyError: if there is none of that id.
        """
        order = self._order
        found = np.searchsorted(self.image_ids, image_id, sorter=order)
        if found == len(order) or self.image_ids[order[found]] != image_id:
            raise KeyError(image_id)
        return int(order[found])

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.image_ids, kind="stable")

    def rows_of(self, positions: np.ndarray) -> np.ndarray:
        """The rows of the boxes of several images, image by image, int64."""
        starts, counts = self.first_boxes[positions], np.diff(self.first_boxes)[positions]
        return np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)

    def take(self, positions: np.ndarray) -> "Columns":
        """These images alone, with their boxes."""
        rows, counts = self.rows_of(positions), np.diff(self.first_boxes)[positions]
        per_image = {name: getattr(self, name)[positions] for name in ("image_ids", "widths", "heights")}
        per_box = {name: getattr(self, name)[rows] for name in ("boxes", "areas", "category_ids", "crowds", "entries")}
        names, name_ends = pack([self.file_name(position) for position in positions])
        first_boxes = np.concatenate(([0], np.cumsum(counts)))
        return Columns(**per_image, **per_box, names=names, name_ends=name_ends, first_boxes=first_boxes)

    def first(self, count: int) -> "Columns":
        """The first images alone, with their boxes."""
        return self if count >= len(self) else self.take(np.arange(count))

    def with_images(self, names: Sequence[str], sizes: np.ndarray) -> "Columns":
        """The same with other names of files, and sizes [N, 2] of images."""
        bytes_of_names, name_ends = pack(names)
        sizes = sizes.astype(np.int32)
        return replace(self, widths=sizes[:, 0], heights=sizes[:, 1], names=bytes_of_names, name_ends=name_ends)


def pack(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ``names`` and ``name_ends`` of :class:`Columns`."""
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), ends
