"""The boxes of a data set that no detector can be trained on, by cause."""

from collections.abc import Iterator
from enum import IntEnum

import numpy as np

from balanced_learning.training.data.columns import Columns

_PART = 1 << 20  # boxes looked at together, so that little memory is needed


class Cause(IntEnum):
    """Why a box is left out of training; each box has the first that holds."""

    NONE = 0
    CROWD = 1
    NO_AREA = 2
    OUTSIDE = 3
    TINY = 4


WORDS = {
    Cause.CROWD: "of a crowd",
    Cause.NO_AREA: "without area",
    Cause.OUTSIDE: "outside their image",
    Cause.TINY: "narrower than a pixel, as they are or after resizing",
}


def find_causes(columns: Columns, resized: tuple[int, int] | None = None) -> np.ndarray:
    """The :class:`Cause` of each box, uint8 [M].

    Args:
        columns: images and boxes.
        resized: the shorter side that images are resized to and the longest that they may have, in pixels.
    """
    causes = np.empty(len(columns.boxes), np.uint8)
    scales = np.ones(len(columns)) if resized is None else np.minimum(1, resize_factors(columns, *resized))
    for part, box, image, sizes in _parts(columns):
        inside = np.minimum(box[:, :2] + box[:, 2:], sizes) - np.maximum(box[:, :2], 0)
        conditions = {
            Cause.CROWD: columns.crowds[part],
            Cause.NO_AREA: (box[:, 2:] <= 0).any(axis=1),
            Cause.OUTSIDE: (inside <= 0).any(axis=1),
            Cause.TINY: (inside * scales[image, None] < 1).any(axis=1),
        }
        causes[part] = np.select(list(conditions.values()), [int(cause) for cause in conditions], Cause.NONE)
    return causes


def find_clipped(columns: Columns, margin: float = 0) -> np.ndarray:
    """Whether a box reaches more than ``margin`` pixels beyond its image, bool [M]."""
    clipped = np.empty(len(columns.boxes), bool)
    for part, box, _, sizes in _parts(columns):
        clipped[part] = ((box[:, :2] < -margin) | (box[:, :2] + box[:, 2:] > sizes + margin)).any(axis=1)
    return clipped


def _parts(columns: Columns) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """The rows of some boxes at a time, the boxes, the positions of their images, and the sizes of these [P, 2]."""
    for start in range(0, len(columns.boxes), _PART):
        part = slice(start, start + _PART)
        image = columns.image_of_boxes(part.start, part.stop)
        yield part, columns.boxes[part], image, np.stack([columns.widths[image], columns.heights[image]], axis=1)


def resize_factors(columns: Columns, min_size: int, max_size: int) -> np.ndarray:
    """The factor by which torchvision's detectors resize each image, float64 [N]."""
    shorter = np.minimum(columns.widths, columns.heights)
    longer = np.maximum(columns.widths, columns.heights)
    return np.minimum(min_size / shorter, max_size / longer)


def count_in_words(causes: np.ndarray) -> str:
    """As in ``"2 of a crowd, 1 without area"``."""
    counts = np.bincount(causes, minlength=len(Cause))
    return ", ".join(f"{counts[cause]} {words}" for cause, words in WORDS.items() if counts[cause])
