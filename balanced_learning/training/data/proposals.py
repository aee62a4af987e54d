"""Proposals for the images of a data set: one ``.npy`` file with a row for each image, which is mapped into memory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from balanced_learning.training.data.coco import NAMES, Split
from balanced_learning.training.errors import UserError, printable
from balanced_learning.training.files import map_array, reason_of
from balanced_learning.training.opening import open_file

NOT_DONE = -1  # in place of the count


def row_type(limit: int) -> np.dtype:
    """The type of a row: of which half of the data its image is, the id, how many proposals there are, and those.

    Boxes (xyxy in pixels of the upright image) and scores, the best first, have ``limit`` places, the last ones empty.
    No number lies across the bounds of its type.
    """
    index = [("image_id", "<i8"), ("split", "<i4"), ("count", "<i4")]
    return np.dtype([*index, ("boxes", "<f4", (limit, 4)), ("scores", "<f4", (limit,))])


@dataclass(frozen=True)
class ProposalFile:
    """A finished file of proposals, mapped for reading. It is sent to another process as the path to map.

    Attributes:
        path: of the file.
        rows: of :func:`row_type`, in the order of split and image id.
        index: split, image id and count of each row, int64 [3, N], in memory.
    """

    path: Path
    rows: np.ndarray
    index: np.ndarray

    @classmethod
    def open(cls, path: Path) -> "ProposalFile":
        """Maps a file.

        Raises:
            UserError: if it cannot be read, or is no finished file of proposals.
        """
        rows, index = map_rows(path)
        if left := int((index[2] == NOT_DONE).sum()):
            raise UserError(
                f"{printable(path)}: not finished, {left:,} of {len(rows):,} images have no proposals yet; the "
                "--dump-proposals that began it goes on with it"
            )
        return cls(path, np.asarray(rows), index)

    def __reduce__(self) -> Any:
        return ProposalFile.open, (self.path,)

    @property
    def limit(self) -> int:
        """The most proposals that an image can have."""
        return int(self.rows["scores"].shape[1])

    def boxes(
        self, split: str, image_id: int, limit: int | None = None, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """The best proposals for an image, float32 [P, 4], xyxy in pixels of the upright image: a view of the map.

        Args:
            split: ``"train2017"`` or ``"val2017"``.
            image_id: of the image.
            limit: how many at most.
            size: width and height of the image, if they are to be boxes in it.

        Raises:
            UserError: if the image is not in the file, or they are no boxes, or none in the image.
        """
        row = self._find(split, image_id)
        boxes: np.ndarray = self.rows["boxes"][row, : self.index[2, row]][:limit]
        if fault := find_fault(boxes, size):
            raise UserError(f"{printable(self.path)}: image {image_id} of {split}: {fault}")
        return boxes

    def _find(self, split: str, image_id: int) -> int:
        of_split, image_ids, _ = self.index
        first, last = np.searchsorted(of_split, (NAMES.index(split), NAMES.index(split) + 1))
        row = int(first + np.searchsorted(image_ids[first:last], image_id))
        if row == last or image_ids[row] != image_id:
            raise UserError(f"{printable(self.path)}: has no proposals for image {image_id} of {split}")
        return row

    def require(self, split: Split, positions: Sequence[int] | np.ndarray | None = None) -> None:
        """Makes sure that there are proposals for the images of a split at these positions, by default for all.

        Raises:
            UserError: otherwise.
        """
        wanted = split.columns.image_ids if positions is None else split.columns.image_ids[positions]
        of_split, image_ids, _ = self.index
        missing = wanted[~np.isin(wanted, image_ids[of_split == NAMES.index(split.name)])]
        if len(missing):
            raise UserError(
                f"{printable(self.path)}: has no proposals for {len(missing):,} of {len(wanted):,} images of "
                f"{split.json_file}, the first is image {missing[0]}; --dump-proposals makes them of all images"
            )


def map_rows(path: Path, *, to_fill: bool = False) -> tuple[np.memmap, np.ndarray]:
    """Maps the rows of a file, and reads their index (split, image id and count, int64 [3, N]).

    Raises:
        UserError: if the file cannot be read, or is none of proposals.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
        rows = map_array(path, to_fill=to_fill)
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read ({reason_of(error)})") from None
    except Exception as error:  # what numpy stumbles over
        reason = printable(str(error).partition("\n")[0] or type(error).__name__)
        raise UserError(f"{printable(path)}: no file of proposals, or a damaged one ({reason})") from None
    if fault := _find_fault_of_file(rows, size):
        raise UserError(f"{printable(path)}: {fault}")
    index = np.stack([rows[name].astype(np.int64) for name in ("split", "image_id", "count")])
    if fault := _find_fault_of_index(index, rows["scores"].shape[1]):
        raise UserError(f"{printable(path)}: damaged, {fault}")
    return rows, index


def _find_fault_of_file(rows: np.memmap, size: int) -> str | None:
    shape = rows.dtype["boxes"].shape if "boxes" in (rows.dtype.names or ()) else ()
    if not shape or rows.dtype != row_type(max(1, shape[0])) or rows.ndim != 1 or not rows.size:
        return "no file of proposals, but an array of something else"
    expected = rows.offset + rows.nbytes
    return None if size == expected else f"damaged, it has {size:,} bytes in place of {expected:,}"


def _find_fault_of_index(index: np.ndarray, limit: int) -> str | None:
    split, image_ids, counts = index
    wrong = (split < 0) | (split >= len(NAMES)) | (counts < NOT_DONE) | (counts > limit)
    is_later = (split[1:] > split[:-1]) | ((split[1:] == split[:-1]) & (image_ids[1:] > image_ids[:-1]))
    wrong[1:] |= ~is_later
    if not wrong.any():
        return None
    row = int(wrong.argmax())
    return f"row {row} cannot be split {split[row]}, image {image_ids[row]} with {counts[row]} of {limit} proposals"


def find_fault(boxes: np.ndarray, size: tuple[int, int] | None = None) -> str | None:
    """Says which of some boxes [P, 4] is none, if there is one, or that some lie beyond an image of this size."""
    are_ordered = boxes[:, 2:] >= boxes[:, :2]
    if not (are_ordered.all() and np.isfinite(boxes).all()):
        number = int((are_ordered.all(1) & np.isfinite(boxes).all(1)).argmin())
        return f"proposal {number} is no box: {boxes[number].tolist()}"
    if size and len(boxes) and (boxes.min() < -1 or (boxes[:, 2:].max(0) > np.add(size, 1)).any()):
        return f"proposals reach beyond it, which has {size[0]} x {size[1]} pixels; they are of other images"
    return None
