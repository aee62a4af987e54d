"""Looks at all images of a split before anything is done with them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from balanced_learning.training.data.columns import Columns
from balanced_learning.training.data.images import check_file, find_file
from balanced_learning.training.errors import UserError, warn

_PIECE = 128  # images that a thread looks at before it is given more

Found = TypeVar("Found")


def for_every_image(look: Callable[[int], Found], count: int, title: str) -> list[Found]:
    """Calls ``look`` for the position of every image, in threads, behind a progress bar."""

    def look_at_piece(start: int) -> list[Found]:
        return [look(i) for i in range(start, min(start + _PIECE, count))]

    with ThreadPoolExecutor() as pool:
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

    def check(i: int) -> tuple[str, tuple[int, int] | None, str | None]:
        written = columns.file_name(i)
        name = find_file(image_dir, written) or written
        size, fault = check_file(image_dir / name, (int(columns.widths[i]) or None, int(columns.heights[i]) or None))
        return name, size, fault

    names, sizes, faults = zip(*for_every_image(check, len(columns), f"checking {image_dir.name}"), strict=True)
    faulty = [i for i, fault in enumerate(faults) if fault]
    if faulty:
        more = f" (and {len(faulty) - 1} more like it)" if len(faulty) > 1 else ""
        raise UserError(f"{json_file}: image {columns.image_ids[faulty[0]]}: {faults[faulty[0]]}{more}")
    _tell_other_names(columns, names, json_file)
    return columns.with_images(names, np.array(sizes))


def _tell_other_names(columns: Columns, found: tuple[str, ...], json_file: Path) -> None:
    """Says which files were found under other names than they have in the JSON.

    Raises:
        UserError: if two names of the JSON lead to one file.
    """
    others = [i for i, name in enumerate(found) if name != columns.file_name(i)]
    if not others:
        return
    written_as: dict[str, str] = {}
    for i, name in enumerate(found):
        written = columns.file_name(i)
        if written_as.setdefault(name, written) != written:
            raise UserError(f"{json_file}: {written_as[name]!r} and {written!r} both lead to the file {name!r}")
    example = f"{columns.file_name(others[0])!r} as {found[others[0]]!r}"
    warn(f"{json_file}: {len(others)} images are found under other names, such as {example}")
