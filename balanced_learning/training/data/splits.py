"""The two halves of the data that a run trains on and evaluates."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from balanced_learning.training import distributed
from balanced_learning.training.config import Config, ModelConfig
from balanced_learning.training.data.augmentation import fault_when_resized
from balanced_learning.training.data.coco import NAMES, Split, read_split
from balanced_learning.training.data.left_out import Cause
from balanced_learning.training.data.report import decode_all, describe
from balanced_learning.training.data.shapes import shapes_dataset
from balanced_learning.training.errors import UserError, printable, warn


def read_splits(config: Config) -> tuple[Split, Split]:
    """Reads the images to train on and those to evaluate; without ``data_path`` they are drawn.

    With ``limit_batches``, the images to evaluate are the first ones, as many as its batches of all processes hold.
    With ``check_data``, every image is decoded, and a report is printed.

    For an RPN alone, all categories are one.

    Raises:
        UserError: for whatever makes training or evaluation impossible.
    """
    root = config.data.data_path or _drawn()
    read = partial(
        read_split,
        root,
        limit=config.data.limit,
        resized=(config.model.min_size, config.model.max_size),
        anew=config.run.check_data,
    )
    train, val = _read_and_report(read) if config.run.check_data else map(read, NAMES)
    if train.categories != val.categories:
        odd = set(train.categories.items()) ^ set(val.categories.items())
        raise UserError(f"{val.json_file}: other categories than in {train.json_file.name}, such as {min(odd)}")
    if config.model.is_rpn:
        train, val = train.as_one_category(), val.as_one_category()
    _check_resizing(train, train.has_boxes() | config.data.keep_empty, config.model, config.data.data_augmentation)
    _check_resizing(val, np.ones(len(val.images), bool), config.model)
    _tell_unlearned_categories(train, val)
    if config.run.limit_batches is not None:
        val = val.first(config.run.limit_batches * distributed.world_size())
    return train, val


def _read_and_report(read: Callable[[str], Split]) -> list[Split]:
    splits: list[Split] = []
    errors = []
    for name in NAMES:
        try:
            splits.append(read(name))
            print(describe(splits[-1]), end="\n\n")
        except UserError as error:
            errors.append(str(error))
    try:
        print(decode_all(splits))
    except UserError as error:
        errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))
    return splits


def _check_resizing(split: Split, used: np.ndarray, options: ModelConfig, policy: str = "none") -> None:
    columns = split.columns
    widths, heights = torch.from_numpy(columns.widths[used]), torch.from_numpy(columns.heights[used])
    sizes = {"min_size": options.min_size, "max_size": options.max_size}
    faults = np.flatnonzero(used)[fault_when_resized(widths, heights, **sizes, policy=policy).numpy()]
    if len(faults):
        image = split.images[faults[0]]
        flags = f"--min-size {options.min_size} --max-size {options.max_size}"
        flags += f" --data-augmentation {policy}" if policy != "none" else ""
        more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
        raise UserError(
            f"{split.json_file}: image {image['id']}: {printable(split.image_dir / image['file_name'])} of "
            f"{image['width']} x {image['height']} shrinks to nothing with {flags}{more}"
        )


def _tell_unlearned_categories(train: Split, val: Split) -> None:
    learned = np.unique(train.columns.category_ids[train.causes == Cause.NONE])
    scored = np.unique(val.columns.category_ids[~val.columns.crowds])
    if not len(scored):
        warn(f"{val.json_file}: no box to evaluate with, so there will be no AP")
    names = [val.categories[category_id] for category_id in np.setdiff1d(scored, learned).tolist()]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warn(
            f"{val.json_file}: categories without a box to train on have boxes that count in AP: "
            f"{', '.join(map(repr, names[:3]))}{more}",
        )


def _drawn() -> Path:
    """The folder of the shapes, which the main process alone draws."""
    try:
        if distributed.is_main():
            shapes_dataset()
    finally:
        distributed.barrier()  # the others wait there, whatever becomes of the drawing
    return shapes_dataset()
