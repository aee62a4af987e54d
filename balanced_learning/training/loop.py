"""One epoch of training and its evaluation, and what may come between two batches."""

import time
from contextlib import closing
from typing import Any

from torch import Tensor

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import NEWEST
from balanced_learning.training.config import images_per_step
from balanced_learning.training.data.batching import DetectionLoader
from balanced_learning.training.errors import SharedError, warn
from balanced_learning.training.exchange import Exchange
from balanced_learning.training.faults import Fault
from balanced_learning.training.inference import predict
from balanced_learning.training.reporting.progress import Progress
from balanced_learning.training.run import HINTS, Run
from balanced_learning.training.signals import StopSignals
from balanced_learning.training.step import Stepper


class Loop:
    """The loops over the batches of an epoch and of its evaluation.

    Between two batches it saves if that is due, ends the run on a signal, tells of images that could not be read and of
    steps that were left out, and counts them; all processes do so at the same batch.
    """

    def __init__(
        self, run: Run, train_loader: DetectionLoader, val_loader: DetectionLoader, signals: StopSignals
    ) -> None:
        self.run = run
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.stepper = Stepper(run, self._report)
        self.exchange = Exchange(signals, run.config.data.max_unreadable)
        self._is_save_asked = False

    def train_epoch(self) -> None:
        """Trains the rest of the epoch, and saves.

        Raises:
            Stopped: after a signal; what was trained is saved.
            SharedError: if too many images cannot be read, or too many steps were left out.
        """
        run = self.run
        run.model.train()
        run.start_clock()
        self.train_loader.set_epoch(run.epoch, run.step)
        progress = Progress(f"epoch {run.epoch}", run.config.run.print_freq, is_main=distributed.is_main())
        with closing(iter(self.train_loader)) as batches:
            images = images_per_step(run.config)
            for batch in progress.over(batches, run.iterations, self.stepper.status, done=run.step, images=images):
                self.stepper(batch)
                is_save_due = self._tell(batch.unreadable, save=self._is_late())
                every = run.config.run.checkpoint_steps
                is_save_due |= bool(every and (run.epoch * run.iterations + run.step) % every == 0)
                if run.step < run.iterations and (is_save_due or self.exchange.is_stopping):
                    # Weights after which a step goes wrong may be bad: they must not take the place of good ones.
                    if self.stepper.finish() or self.exchange.is_stopping:
                        self._save()
                    self._stop_if_asked()
        self._hear(self.exchange.finish())
        self._save()
        self._stop_if_asked()

    def detect(self) -> dict[int, dict[str, Tensor]]:
        """The detections of an evaluation, of all processes, by the id of the image.

        Raises:
            Stopped: after a signal. The evaluation is made up when the run goes on.
            SharedError: if too many images cannot be read.
        """
        model = self.run.evaluated
        distributed.share_buffers(model)
        run = self.run.config.run

        def hear(batch: Any) -> None:
            self._tell(batch.unreadable if batch else [])
            self._stop_if_asked()

        detections = predict(model, self.val_loader, self.run.precision, run.print_freq, after_batch=hear)
        self._hear(self.exchange.finish())
        self._stop_if_asked()
        return detections

    def _tell(self, unreadable: list[str], *, save: bool = False) -> bool:
        """Tells the other processes, and returns whether to save, as all know."""
        self._is_save_asked |= save
        return self._hear(self.exchange.tell(unreadable, save=save))

    def _hear(self, told: dict[str, float]) -> bool:
        is_save_due = bool(told.get("save"))
        self._is_save_asked &= not is_save_due
        return is_save_due

    def _stop_if_asked(self) -> None:
        if self.run.config.run.test_only:
            self.exchange.stop_if_asked("in the evaluation; start it again")
        self.exchange.stop_if_asked(f"in {self.run.place()}; go on with --resume {self.run.folder}/{NEWEST}")

    def _is_late(self) -> bool:
        minutes = self.run.config.run.checkpoint_minutes
        if minutes is None or self._is_save_asked or not distributed.is_main():
            return False
        return time.perf_counter() - self.run.saved_at >= 60 * minutes

    def _save(self) -> None:
        self.stepper.finish()
        self.run.mark_time()
        self.run.save()

    def _report(self, fault: Fault) -> None:
        """Tells of a step that was left out, of which the first of an epoch is kept."""
        run = self.run
        run.skipped_steps += 1
        kept = None
        if run.skipped_steps == 1 and distributed.rank() == (fault.rank or 0):
            kept = run.keep(fault)
        kept = next(filter(None, distributed.gather(kept)), None)
        if distributed.is_main():
            warn(fault.describe(self.train_loader.dataset.split) + (f"; --replay {kept} repeats it" if kept else ""))
        limit = run.config.training.max_skipped_steps
        if run.skipped_steps > limit:
            raise SharedError(
                f"training diverged: more than --max-skipped-steps {limit} of epoch {run.epoch} are left out; {HINTS}"
            )
