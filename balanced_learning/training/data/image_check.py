"""Looks at all images of a split before anything is done with them."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from balanced_learning.training.data.columns import Columns
from balanced_learning.training.data.file_names import find_file, tell_found
from balanced_learning.training.data.images import check_file
from balanced_learning.training.errors import UserError, printable, warn

_PIECE = 128  # images that a thread looks at before it is given more

Found = TypeVar("Found")


def for_every_image(look: Callable[[int], Found], count: int, title: str) -> list[Found]:
    """Calls ``look`` for the position of every image, in threads, behind a progress bar."""

    def look_at_piece(start: int) -> list[Found]:
        return [look(i) for i in range(start, min(start + _PIECE, count))]

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, which name no file
        pieces = pool.map(look_at_piece, range(0, count, _PIECE))
        bar = tqdm(total=count, desc=title, unit=" images", disable=None, delay=2, leave=False)
        found: list[Found] = []
        for piece in pieces:
            found += piece
            bar.update(len(piece))
        bar.close()
    return found


def check_images(columns: Columns, json_file: Path, image_dir: Path) -> Columns:
    """Finds every image and compares it with the JSON, without decoding it.

    Returns:
        The columns, with the names under which the files exist and the sizes that the boxes mean.

    Raises:
        UserError: if any is missing or cannot be used; for the first of them, with the number of all.
    """
    written = [columns.file_name(i) for i in range(len(columns))]

    def check(i: int) -> tuple[str, tuple[int, int] | None, str | None]:
        name = find_file(image_dir, written[i]) or written[i]
        size, fault = check_file(image_dir / name, (int(columns.widths[i]) or None, int(columns.heights[i]) or None))
        return name, size, fault

    found = for_every_image(check, len(columns), f"checking {image_dir.name}")
    names, sizes, faults = zip(*found, strict=True)
    faulty = [i for i, fault in enumerate(faults) if fault]
    if faulty:
        more = f" (and {len(faulty) - 1} more like it)" if len(faulty) > 1 else ""
        raise UserError(f"{json_file}: image {columns.image_ids[faulty[0]]}: {faults[faulty[0]]}{more}")
    tell_found(json_file, written, names)
    _tell_repeated(names, json_file)
    return columns.with_images(names, np.array(sizes))


def _tell_repeated(names: Sequence[str], json_file: Path) -> None:
    """Warns of files that belong to several images, each of which takes the objects of the others for background."""
    repeated = [name for name, count in Counter(map(os.path.normpath, names)).items() if count > 1]
    if repeated:
        warn(f"{json_file}: {len(repeated)} files belong to several images, such as {printable(repeated[0])}")
