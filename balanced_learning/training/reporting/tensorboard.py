"""TensorBoard's view of a run: the rows of metrics.jsonl, pictures, and the IoUs of the negatives that are sampled."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from balanced_learning.training.errors import UserError, warn
from balanced_learning.training.files import reason_of
from balanced_learning.training.run import Run


class TensorBoard:
    """Writes event files into the folder of a run, and observes the sampler of its second stage, or of an RPN alone."""

    def __init__(self, run: Run) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard: the package is missing; pip install tensorboard") from None
        self._open = partial(SummaryWriter, str(run.folder))
        for earlier in run.folder.glob("events.out.tfevents.*"):  # what is in them is written again, or not true
            with suppress(OSError):
                earlier.unlink()
        self.writer: Any = self._open()
        self.sampler: ObservedSampler | None = None
        model: Any = run.model
        for stage in (getattr(model, "roi_heads", None), getattr(model, "rpn", None)):
            if stage is not None and hasattr(stage, "fg_bg_sampler"):
                self.sampler = stage.fg_bg_sampler = ObservedSampler(stage.fg_bg_sampler)
                break

    def write(self, row: dict[str, Any], picture: Path) -> None:
        """Writes an epoch: its metrics, the picture of its evaluation, and the IoUs of the negatives of its last batch.

        Where that fails, a warning says so.
        """
        with _silent_threads():
            try:
                if self.writer is None:
                    picture.parent.stat()  # a folder that was removed is not made anew
                    self.writer = self._open()
                self._write(self.writer, row, picture)
            except OSError as error:
                warn(f"{picture.parent}: TensorBoard lacks epoch {row['epoch']} ({reason_of(error)})")
                self._close()

    def _close(self) -> None:
        """Waits for the end of the writer's thread, which its first error has ended."""
        if self.writer:
            with suppress(OSError):
                self.writer.file_writer.close()
        self.writer = None

    def _write(self, writer: Any, row: dict[str, Any], picture: Path) -> None:
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                writer.add_scalar(name, value, row["epoch"])
        if picture.exists():
            with Image.open(picture) as image:
                writer.add_image("evaluation", np.asarray(image), row["epoch"], dataformats="HWC")
        if self.sampler and self.sampler.last:
            writer.add_histogram("IoU of sampled negatives", self.sampler.sampled_ious(), row["epoch"])
        writer.flush()


@contextmanager
def _silent_threads() -> Iterator[None]:
    """Keeps the thread of a writer from telling of an error that it also passes on."""
    tell = threading.excepthook
    threading.excepthook = lambda of: None if isinstance(of.exc_value, OSError) else tell(of)
    try:
        yield
    finally:
        threading.excepthook = tell


class ObservedSampler:
    """A sampler that draws as the one it holds, and remembers its last batch where the labels come with IoUs."""

    def __init__(self, sampler: Callable) -> None:
        self.sampler = sampler
        self.last: list[tuple[Tensor, Tensor]] = []  # IoUs and mask of the negatives of each image

    def __call__(self, labels: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        positives, negatives = self.sampler(labels)
        ious = getattr(labels, "ious", None)  # torchvision's own stage keeps none
        if ious is not None:
            self.last = list(zip(ious, negatives, strict=True))
        return positives, negatives

    def sampled_ious(self) -> Tensor:
        return torch.cat([ious[mask.bool()] for ious, mask in self.last])
