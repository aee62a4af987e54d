"""The report of ``--check-data``: what is in a data set, and what of it cannot be used."""

import hashlib
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.image_check import for_every_image
from balanced_learning.training.data.left_out import Cause, count_in_words, find_clipped
from balanced_learning.training.errors import UserError, printable

AREA_EDGES = (32**2, 96**2)  # between small, medium and large, as in COCO's evaluation


def describe(split: Split) -> str:
    """Counts images and boxes of a split, and the boxes of each category by size."""
    columns = split.columns
    name = split.image_dir.name
    num_empty = len(columns) - int(split.has_boxes().sum())
    num_clipped = int((find_clipped(columns) & (split.causes == Cause.NONE)).sum())
    lines = [
        f"{name}: {len(columns)} images, {len(columns.boxes)} boxes, {len(split.categories)} categories",
        f"  sizes: {_sizes(columns.widths, columns.heights)}",
        f"  images without a box to train on: {num_empty}",
        f"  boxes left out of training: {count_in_words(split.causes) or 'none'}",
        f"  boxes that reach beyond their image, and are clipped: {num_clipped}",
        f"  boxes that are there twice: {_num_twice(split)}",
        "",
        *_category_table(split),
    ]
    return "\n".join(lines)


def _sizes(widths: np.ndarray, heights: np.ndarray) -> str:
    pairs, counts = np.unique(np.stack([widths, heights], axis=1), axis=0, return_counts=True)
    most = pairs[counts.argmax()]
    text = f"{most[0]} x {most[1]} ({counts.max()} images)"
    if len(pairs) > 1:
        text += (
            f" and {len(pairs) - 1} others, widths from {widths.min()} to {widths.max()}, heights from {heights.min()} "
            f"to {heights.max()}"
        )
    return text


def _num_twice(split: Split) -> int:
    columns = split.columns
    rows = np.column_stack([columns.image_of_boxes(), columns.category_ids, columns.boxes.view(np.int64)])
    return len(rows) - len(np.unique(rows, axis=0))


def _category_table(split: Split) -> list[str]:
    columns = split.columns
    ids = sorted(split.categories)
    category = np.searchsorted(ids, columns.category_ids)
    learned = split.causes == Cause.NONE
    size = np.searchsorted(AREA_EDGES, columns.areas, side="right")
    by_size = np.bincount(3 * category[learned] + size[learned], minlength=3 * len(ids)).reshape(-1, 3)
    left_out = np.bincount(category[~learned], minlength=len(ids))
    pairs = np.unique(columns.image_of_boxes()[learned] * len(ids) + category[learned])
    num_images = np.bincount(pairs % len(ids), minlength=len(ids))

    names = [printable(split.categories[category_id]) for category_id in ids]
    width = max(8, *map(len, names))
    heads = ("images", "boxes", "small", "medium", "large", "left out")
    rows = zip(names, np.column_stack([num_images, by_size.sum(axis=1), by_size, left_out]).tolist(), strict=True)
    return [
        f"  {name:<{width}}  " + "".join(f"{cell:>10}" for cell in cells)
        for name, cells in (("category", heads), *rows)
    ]


def decode_all(splits: list[Split]) -> str:
    """Decodes every image of the splits, and tells which files are there more than once.

    Raises:
        UserError: with a line for every image that cannot be decoded.
    """
    copies = defaultdict(list)
    faults = []
    for split in splits:
        for path, digest, fault in for_every_image(partial(_decode, split), len(split.columns), "decoding"):
            if fault:
                faults.append(fault)
            else:
                copies[digest].append(path)
    if faults:
        raise UserError("\n".join(faults))
    groups = [paths for paths in copies.values() if len(paths) > 1]
    if not groups:
        return "all images can be decoded, and none is there twice"
    example = " and ".join(f"{path.parent.name}/{printable(path.name)}" for path in groups[0][:2])
    num_across = sum(len({path.parent for path in paths}) > 1 for paths in groups)
    return (
        f"all images can be decoded; {len(groups)} are there more than once, {num_across} of them in both splits, "
        f"such as {example}"
    )


def _decode(split: Split, position: int) -> tuple[Path, bytes, str | None]:
    """The path of an image, a hash of its file, and the reason why it cannot be decoded."""
    columns = split.columns
    path = split.image_dir / columns.file_name(position)
    try:
        split.load_image(position)
        return path, hashlib.blake2b(path.read_bytes(), digest_size=16).digest(), None
    except UserError as error:
        return path, b"", f"{split.json_file}: image {columns.image_ids[position]}: {error}"
