"""The two halves of the data that a run trains on and evaluates."""

from pathlib import Path

import torch

from balanced_learning.training import distributed
from balanced_learning.training.config import Config, ModelConfig
from balanced_learning.training.data.augmentation import fault_when_resized
from balanced_learning.training.data.coco import Entry, Split, read_split
from balanced_learning.training.data.shapes import shapes_dataset
from balanced_learning.training.errors import UserError, printable


def read_splits(config: Config) -> tuple[Split, Split]:
    """Reads the images to train on and those to evaluate; without ``data_path`` they are drawn.

    Raises:
        UserError: for whatever makes training or evaluation impossible.
    """
    root = config.data.data_path or _drawn()
    train, val = (read_split(root, name, limit=config.data.limit) for name in ("train2017", "val2017"))
    if train.categories != val.categories:
        odd = set(train.categories.items()) ^ set(val.categories.items())
        raise UserError(f"{val.json_file}: other categories than in {train.json_file.name}, such as {min(odd)}")
    used = train.images if config.data.keep_empty else [image for image in train.images if train.boxes(image)]
    _check_resizing(train, used, config.model, config.data.data_augmentation)
    _check_resizing(val, val.images, config.model)
    return train, val


def _check_resizing(split: Split, images: list[Entry], options: ModelConfig, policy: str = "none") -> None:
    widths, heights = (torch.tensor([image[side] for image in images]) for side in ("width", "height"))
    sizes = {"min_size": options.min_size, "max_size": options.max_size}
    faults = fault_when_resized(widths, heights, **sizes, policy=policy).nonzero()
    if len(faults):
        image = images[int(faults[0])]
        path = printable(split.image_dir / image["file_name"])
        flags = f"--min-size {options.min_size} --max-size {options.max_size}"
        flags += f" --data-augmentation {policy}" if policy != "none" else ""
        more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
        raise UserError(
            f"{split.json_file}: image {image['id']}: {path} of {image['width']} x {image['height']} shrinks to "
            f"nothing with {flags}{more}"
        )


def _drawn() -> Path:
    """The folder of the shapes, which the main process alone draws."""
    if distributed.is_main():
        shapes_dataset()
    distributed.barrier()
    return shapes_dataset()
