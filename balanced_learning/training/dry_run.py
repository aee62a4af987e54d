"""All that a run does, once, on a few images: to find out within a minute what would fail after an epoch."""

import io
import secrets
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import NEWEST, Checkpoint
from balanced_learning.training.config import Config
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.errors import UserError
from balanced_learning.training.inference import load_detector, predict_files

Start = Callable[[Config, Checkpoint | None], None]


def dry_run(config: Config, start: Start) -> None:
    """Trains a step, saves, evaluates, continues from the checkpoint for another epoch of a step, and predicts.

    It does so in a new folder in ``runs``, or in that of the settings, and removes it. Of what a run prints, only the
    warnings are to be seen.

    Args:
        config: the settings of the run that is to be tried out.
        start: trains as the settings ask for, from a checkpoint if there is one.

    Raises:
        UserError: for whatever a run would raise.
    """
    short = config.values() | {"dry_run": False, "limit_batches": 1, "resume": None, "start_epoch": 0}
    distributed.start(config.run.device, config.run.dist_url)
    name = f"dry_run-{secrets.token_hex(4)}"
    folder = distributed.from_main((config.run.output_dir or Path("runs")) / name)
    try:
        distributed.say("dry run: training a step, saving, evaluating")
        with redirect_stdout(io.StringIO()):
            start(Config.of(short | {"epochs": 1, "output_dir": folder}), None)
        distributed.say("dry run: continuing from the checkpoint for another step, predicting")
        longer = Config.of(short | {"epochs": 2, "output_dir": folder})
        with redirect_stdout(io.StringIO()):
            start(longer, Checkpoint.load(folder / NEWEST))
            _, val = read_splits(longer)
            if distributed.is_main() and not config.model.is_fast_rcnn:
                image = val.image_dir / val.images[0]["file_name"]
                (found,) = predict_files(load_detector(folder / NEWEST), [image], score_thresh=0.5)
                if isinstance(found, UserError):
                    raise found
        distributed.say("dry run: all of it works; nothing is kept")
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # it holds other runs
                folder.parent.rmdir()
