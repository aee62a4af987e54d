"""The making of a file of proposals: begun with room for all of them, filled in any order, finished when it is full."""

import os
import shutil
import time
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from balanced_learning.training.data.coco import NAMES, Split
from balanced_learning.training.data.proposals import NOT_DONE, find_fault, map_rows, row_type
from balanced_learning.training.errors import UserError, printable, warn
from balanced_learning.training.files import cannot_write, make_folder, move, write_whole

FLUSH_SECONDS = 10.0  # of work at most that is done again after a kill
_ROWS_AT_ONCE = 256


def begin(path: Path, splits: Sequence[Split], limit: int, digest: str) -> Path:
    """Makes the unfinished file of ``path``, unless there is one of the same digest to go on with.

    All of it is written, so that there will be room for what is filled in.

    Args:
        path: of the file that is to be.
        splits: whose images all get a row.
        limit: the most proposals of an image.
        digest: of whatever the proposals depend on.

    Returns:
        The path of the unfinished file, beside ``path``.

    Raises:
        UserError: if ``path`` is there, the disk lacks room, or the file cannot be written or is damaged.
    """
    _refuse_what_is_there(path)
    make_folder(path.parent)
    stem = path.name[:60]  # a longer name could be too long with its ending
    unfinished = path.with_name(f"{stem}.{digest}.unfinished")
    for left in path.parent.glob(f"{escape(stem)}.????????.unfinished"):
        if left != unfinished:
            warn(f"{printable(left)}: begun with other weights, settings or data; remove it if nobody goes on with it")
    index = _index_of(splits)
    if not os.path.lexists(unfinished):
        size = index.shape[1] * row_type(limit).itemsize
        print(f"{index.shape[1]:,} images x {limit:,} proposals: {_in_words(size)}")
        if size > (free := shutil.disk_usage(path.parent).free):
            raise UserError(f"{printable(path)}: needs {_in_words(size)}, and {_in_words(free)} are free there")
        write_whole(unfinished, lambda file: _write_empty(file, index, limit))
    rows, found = map_rows(unfinished)
    if rows.dtype != row_type(limit) or not np.array_equal(found[:2], index):
        raise UserError(f"{printable(unfinished)}: damaged, its rows are of other images; remove it")
    return unfinished


def finish(unfinished: Path, path: Path) -> None:
    """Gives a file that is full its name.

    Raises:
        UserError: if it is not full, or something has that name meanwhile.
    """
    _, index = map_rows(unfinished)
    if left := int((index[2] == NOT_DONE).sum()):
        raise UserError(f"{printable(unfinished)}: {left:,} images have no proposals yet; the same command goes on")
    _refuse_what_is_there(path)
    move(unfinished, path)


class ProposalWriter:
    """Fills rows of an unfinished file, inside its ``with`` block; several processes may, each its own rows.

    Whenever the program or the machine stops, rows are done or not: the count, which says so, reaches the disk after
    the row.

    Attributes:
        index: split, image id and count of each row, int64 [3, N], as it was found.
    """

    def __init__(self, unfinished: Path) -> None:
        self.path = unfinished
        self.rows, self.index = map_rows(unfinished, to_fill=True)
        self._counts: dict[int, int] = {}  # of rows that may not be on the disk
        self._flushed_at = time.monotonic()

    def __enter__(self) -> "ProposalWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._sync()

    def left(self, split: Split) -> dict[int, int]:
        """The row of each image of a split that is not done, by its id."""
        of_split, image_ids, counts = self.index
        rows = np.flatnonzero((of_split == NAMES.index(split.name)) & (counts == NOT_DONE))
        return dict(zip(image_ids[rows].tolist(), rows.tolist(), strict=True))

    def put(self, row: int, boxes: np.ndarray, scores: np.ndarray) -> None:
        """Fills a row with the first boxes [P, 4] and scores [P], the best first, as many as it has places for.

        Raises:
            UserError: if they are no boxes and scores, or cannot be written.
        """
        here = self.rows[row]
        count = min(len(boxes), len(here["scores"]))
        fault = find_fault(boxes) or (None if np.isfinite(scores).all() else "a score is not finite")
        if fault:
            raise UserError(f"{printable(self.path)}: image {here['image_id']}: what the detector proposes: {fault}")
        for name, values in (("boxes", boxes), ("scores", scores)):
            here[name][:count] = values[:count]
            here[name][count:] = 0  # where a row was begun before
        self._counts[row] = count
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        self._sync()
        self.rows["count"][list(self._counts)] = list(self._counts.values())
        self._counts.clear()
        self._flushed_at = time.monotonic()

    def _sync(self) -> None:
        try:
            self.rows.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from None


def _refuse_what_is_there(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"{printable(path)}: is there already; name another file, or remove it")


def _index_of(splits: Sequence[Split]) -> np.ndarray:
    """Split and image id of the row of each image, int64 [2, N]."""
    in_order = sorted((NAMES.index(split.name), np.sort(split.columns.image_ids)) for split in splits)
    numbers = [np.full(len(image_ids), number) for number, image_ids in in_order]
    return np.stack([np.concatenate(numbers), np.concatenate([image_ids for _, image_ids in in_order])])


def _write_empty(file: BinaryIO, index: np.ndarray, limit: int) -> None:
    """Writes rows without proposals."""
    of_rows = row_type(limit)
    header: dict[str, Any] = {"shape": index.shape[1:], "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, header | {"descr": np.lib.format.dtype_to_descr(of_rows)})
    for start in range(0, index.shape[1], _ROWS_AT_ONCE):
        split, image_ids = index[:, start : start + _ROWS_AT_ONCE]
        rows = np.zeros(len(split), of_rows)
        rows["split"], rows["image_id"], rows["count"] = split, image_ids, NOT_DONE
        file.write(rows.tobytes())


def _in_words(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
