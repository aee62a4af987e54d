"""A short training in memory, for a detector whose weights say nothing yet of the data."""

import math
from collections.abc import Generator
from contextlib import closing
from itertools import count, islice
from typing import Any

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.config import Config, images_per_step
from balanced_learning.training.data.batching import DetectionLoader
from balanced_learning.training.data.dataset import Batch
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError, warn
from balanced_learning.training.faults import Fault
from balanced_learning.training.optimization import Precision
from balanced_learning.training.reporting.progress import Progress
from balanced_learning.training.run import Run
from balanced_learning.training.step import Stepper
from balanced_learning.training.weights import DetectorWeights

STEPS = 300


def steps_to_warm_up(config: Config, checkpoint: Checkpoint | None, labels: Labels, asked: int | None) -> int:
    """How many steps a detector is to be trained before it is measured.

    Args:
        config: the settings.
        checkpoint: that the detector is of, if any.
        labels: of the detector.
        asked: for so many; None: those that it needs, if its weights know nothing of these labels yet.

    Raises:
        UserError: if a checkpoint is to be trained.
    """
    if checkpoint:
        if asked:
            raise UserError(f"--warm-up-steps {asked}: the detector of {checkpoint.path} is measured as it is")
        return 0
    if asked is not None:
        return asked
    knows_labels = config.model.weights and not DetectorWeights.read(config.model).unknown(labels.names.values())
    return 0 if knows_labels else STEPS


def warm_up(
    config: Config, labels: Labels, model: Any, precision: Precision, loader: DetectionLoader, steps: int
) -> None:
    """Trains a model as the first steps of a run do, and writes nothing.

    Raises:
        UserError: if more steps have to be left out than the settings allow of an epoch.
    """
    epochs = max(config.training.epochs, math.ceil(steps / len(loader)))  # behind its end, a cosine would rise again
    run = Run(Config.of(config.values() | {"epochs": epochs}), labels, model, precision, len(loader))

    def report(fault: Fault) -> None:
        run.skipped_steps += 1
        warn(fault.describe(loader.dataset.split))
        if run.skipped_steps > config.training.max_skipped_steps:
            raise UserError("the warm-up diverged: lower --lr, lengthen --warmup-iters or clip more (--clip-grad-norm)")

    stepper = Stepper(run, report)
    progress = Progress("warm-up", config.run.print_freq, is_main=distributed.is_main())
    model.train()
    with closing(_epochs(run, loader)) as batches:
        of_steps = islice(batches, steps)
        for batch in progress.over(of_steps, steps, stepper.status, images=images_per_step(config)):
            for line in batch.unreadable:
                warn(line)
            stepper(batch)
    stepper.finish()
    model.eval()


def _epochs(run: Run, loader: DetectionLoader) -> Generator[Batch, None, None]:
    """The batches of one epoch after the other, each of which the run begins."""
    for epoch in count():
        run.epoch, run.step = epoch, 0
        loader.set_epoch(epoch)
        with closing(iter(loader)) as batches:
            yield from batches
