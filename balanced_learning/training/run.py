"""A run of training: the parts whose states its checkpoints hold, and how far it is."""

import math
import time
from dataclasses import replace
from typing import Any

from torch import nn

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import BEST, NEWEST, Checkpoint, Position, save, save_newest
from balanced_learning.training.config import Config, images_per_step
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError, warn
from balanced_learning.training.evaluation import key_metric
from balanced_learning.training.faults import Fault
from balanced_learning.training.optimization import (
    Precision,
    lr_factor,
    make_average,
    make_optimizer,
    make_scheduler,
)

_MOST_KEPT = 3  # checkpoints of steps that were left out
HINTS = "lower --lr, lengthen --warmup-iters or clip more (--clip-grad-norm). The last checkpoint is untouched"


class Run:
    """The parts of a run and its position, which checkpoints hold.

    Args:
        config: the settings.
        labels: of the model.
        model: on its device, with the weights to start from.
        precision: of the forward pass.
        iterations: steps of an epoch.
        checkpoint: what to continue, if anything.

    Attributes:
        epoch (int): the one that is trained, from 0.
        step (int): steps of it that are done; where it is ``iterations``, the evaluation is due.
        sums (dict): over the epoch's images on this process: the losses, and ``images``, their number.
        skipped_steps (int): steps of the epoch that were left out.
        seconds (float): of the epoch.
        history (list): the rows of the epochs that are over.
        ema (AveragedModel or None): the moving average of the weights.
        saved_at (float): when the last checkpoint was written, by ``time.perf_counter``.
    """

    def __init__(
        self,
        config: Config,
        labels: Labels,
        model: nn.Module,
        precision: Precision,
        iterations: int,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.config = config
        self.labels = labels
        self.model = model
        self.precision = precision
        self.iterations = iterations
        self.folder = config.run.output_dir
        self.optimizer = make_optimizer(model, config.training)
        self.ema = None if config.training.ema is None else make_average(model, config.training.ema)
        self.epoch, self.step = config.run.start_epoch, 0
        self._start_epoch()
        self.history: list[dict[str, Any]] = []
        self.saved_at = self._marked_at = time.perf_counter()
        if checkpoint:
            self._continue(checkpoint)
        done = self.epoch * iterations + self.step
        self.scheduler = make_scheduler(self.optimizer, config.training, iterations, done)

    def _start_epoch(self) -> None:
        self.sums: dict[str, float] = {}
        self.skipped_steps, self.seconds = 0, 0.0

    def _continue(self, checkpoint: Checkpoint) -> None:
        position = checkpoint.position
        checkpoint.restore({name: part for name, part in self._parts().items() if name != "model"})
        self.epoch, self.step, self.history = position.epoch, position.step, position.history
        self.skipped_steps, self.seconds = position.skipped_steps, position.seconds
        if len(position.sums) == distributed.world_size():
            self.sums = dict(position.sums[distributed.rank()])
        elif distributed.is_main():
            self.sums = _total(position.sums)

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.precision.scaler, "ema": self.ema}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate: the average, if there is one."""
        return self.model if self.ema is None else self.ema.module

    def start_clock(self) -> None:
        self._marked_at = time.perf_counter()

    def mark_time(self) -> None:
        """Adds the time since the clock was started, or marked last, to that of the epoch."""
        now = time.perf_counter()
        self.seconds += now - self._marked_at
        self._marked_at = now

    def save(self) -> None:
        """Writes checkpoint.pth; the one before stays as checkpoint_previous.pth.

        Raises:
            SharedError: if the weights are not finite, or the file cannot be written.
        """
        self._save(NEWEST)
        self.saved_at = time.perf_counter()

    def _save(self, name: str) -> None:
        position = self._position(distributed.gather(self.sums))
        write = save_newest if name == NEWEST else save
        about: dict[str, Any] = {"config": self.config, "labels": self.labels, "position": position}

        def work() -> None:
            states = [self.model.state_dict(), *self.optimizer.state.values()]
            if not all(tensor.isfinite().all() for state in states for tensor in state.values()):
                raise UserError(f"training diverged: in {self.place()}, weights are not finite; {HINTS}")
            write(self.folder / name, self._parts(), **about)

        distributed.in_main(work)

    def _position(self, sums: list[dict[str, float]]) -> Position:
        return Position(
            epoch=self.epoch,
            step=self.step,
            iterations=self.iterations,
            images_per_step=images_per_step(self.config),
            sums=sums,
            skipped_steps=self.skipped_steps,
            seconds=self.seconds,
            history=self.history,
        )

    def keep(self, fault: Fault) -> str | None:
        """Writes a checkpoint that ``--replay`` repeats the step from, of few epochs, and returns its path."""
        path = self.folder / f"skipped_{fault.epoch:02}.pth"
        if not path.exists() and len(list(self.folder.glob("skipped_*.pth"))) >= _MOST_KEPT:
            return None
        now = self._position([self.sums])
        position = replace(now, epoch=fault.epoch, step=fault.step, skipped_steps=now.skipped_steps - 1)
        try:
            save(path, self._parts(), config=self.config, labels=self.labels, position=position, fault=fault.content())
        except UserError as error:
            warn(str(error))
            return None
        return f"{path}"

    def means(self) -> dict[str, float]:
        """The means of the losses over the epoch's images so far, of all processes, and of their sum ``loss``.

        There are none where no step has been taken.
        """
        return _means(_total(distributed.gather(self.sums)))

    def lr(self) -> float:
        """The learning rate of the last step."""
        training, last_step = self.config.training, self.epoch * self.iterations + self.step - 1
        return training.lr * lr_factor(training, self.iterations, last_step)

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """Ends the epoch with a row of its losses and of these metrics, and saves; the best so far twice.

        An epoch that was not evaluated has no metrics.
        """
        total = _total(distributed.gather(self.sums))
        row: dict[str, Any] = {"epoch": self.epoch, **_means(total), "lr": self.lr()}
        if self.skipped_steps:
            row["skipped_steps"] = self.skipped_steps
        row |= {"images_per_second": total.get("images", 0.0) / max(self.seconds, 1e-9), "seconds": self.seconds}
        self.history.append(distributed.from_main(row | metrics))
        self.epoch, self.step = self.epoch + 1, 0
        self._start_epoch()
        if metrics and self.epochs_since_best() == 0:
            self._save(BEST)
        self.save()

    def is_evaluation_due(self) -> bool:
        """Whether the epoch is to be evaluated when it is trained."""
        training, done = self.config.training, self.epoch + 1
        return done % training.eval_interval == 0 or done >= training.epochs

    def epochs_since_best(self) -> int | None:
        """How many evaluated epochs ago the key metric was highest; None if there is none."""
        return epochs_since_best(self.history)

    def is_over(self) -> bool:
        """Whether all epochs are trained, or the key metric has not grown for too long."""
        return self.epoch >= self.config.training.epochs or self._is_patience_over()

    def _is_patience_over(self) -> bool:
        patience, waited = self.config.training.patience, self.epochs_since_best()
        return self.step == 0 and patience is not None and waited is not None and waited >= patience

    def outlook(self) -> str:
        """What is left to do, in words."""
        epochs = self.config.training.epochs
        if self.epoch >= epochs:
            return f"all {epochs} epochs are trained"
        if self._is_patience_over():
            key, waited = key_metric(self.history[-1]), self.epochs_since_best()
            return f"over, for {key} has not grown in {waited} evaluations, and --patience allows no more"
        return f"goes on in {self.place()}, to {epochs} epochs"

    def place(self) -> str:
        """Where the run is, in words."""
        return f"epoch {self.epoch} after {self.step} of {self.iterations} steps"


def epochs_since_best(history: list[dict[str, Any]]) -> int | None:
    """How many evaluated epochs before the last of them the key metric was highest; None if there is none."""
    values = [row[key_metric(row)] for row in history if key_metric(row) in row]
    known = [(value, -i) for i, value in enumerate(values) if value is not None]
    return len(values) - 1 + max(known)[1] if known else None


def _means(total: dict[str, float]) -> dict[str, float]:
    means = {name: value / total["images"] for name, value in total.items() if name != "images"}
    return {**means, "loss": math.fsum(means.values())} if means else {}


def _total(sums: list[dict[str, float]]) -> dict[str, float]:
    """The sums over processes by name, in the order of the processes."""
    total: dict[str, float] = {}
    for part in sums:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
