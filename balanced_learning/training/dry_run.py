"""All that a run does, once, on a few images: to find out within a minute what would fail after an epoch."""

import shutil
from collections.abc import Callable
from contextlib import suppress

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.config import Config
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.errors import UserError
from balanced_learning.training.inference import load_detector, predict_files
from balanced_learning.training.output_folder import run_folder

Start = Callable[[Config, Checkpoint | None], None]


def dry_run(config: Config, start: Start) -> None:
    """Trains a step, saves, evaluates, continues from the checkpoint for another epoch of a step, and predicts.

    It does so in a new folder in ``runs``, which it removes.

    Args:
        config: the settings of the run that is to be tried out.
        start: trains as the settings ask for, from a checkpoint if there is one.

    Raises:
        UserError: for whatever a run would raise.
    """
    short = config.values() | {"dry_run": False, "limit_batches": 1, "resume": None, "start_epoch": 0}
    distributed.start(config.run.device, config.run.dist_url)
    with run_folder(Config.of(short | {"output_dir": None}), None) as settled:
        folder = settled.run.output_dir
    try:
        start(Config.of(short | {"epochs": 1, "output_dir": folder}), None)
        longer = Config.of(short | {"epochs": 2, "output_dir": folder})
        start(longer, Checkpoint.load(folder / "checkpoint.pth"))
        _, val = read_splits(longer)
        if distributed.is_main():
            image = val.image_dir / val.images[0]["file_name"]
            (found,) = predict_files(load_detector(folder / "checkpoint.pth"), [image], score_thresh=0.5)
            if isinstance(found, UserError):
                raise found
            print("dry run: trained, saved, evaluated, continued and predicted; nothing of it is kept")
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # it holds other runs
                folder.parent.rmdir()
