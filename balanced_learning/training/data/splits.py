"""The two halves of the data that a run trains on and evaluates."""

from pathlib import Path

from balanced_learning.training import distributed
from balanced_learning.training.config import Config
from balanced_learning.training.data.coco import Split, read_split
from balanced_learning.training.data.shapes import shapes_dataset
from balanced_learning.training.errors import UserError


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
    return train, val


def _drawn() -> Path:
    """The folder of the shapes, which the main process alone draws."""
    if distributed.is_main():
        shapes_dataset()
    distributed.barrier()
    return shapes_dataset()
