"""TensorBoard's view of a run: the rows of metrics.jsonl, pictures, and the IoUs of the negatives that are sampled."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from balanced_learning.training.errors import UserError, warn
from balanced_learning.training.run import Run


class TensorBoard:
    """Writes event files into the folder of a run, and observes the sampler of its second stage, if it has one."""

    def __init__(self, run: Run) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard: the package is missing; pip install tensorboard") from None
        # What an earlier process wrote of epochs that are trained again is not to be shown.
        self.writer = SummaryWriter(str(run.folder), purge_step=run.epoch)
        self.sampler: ObservedSampler | None = None
        model: Any = run.model
        if hasattr(model, "roi_heads"):
            self.sampler = model.roi_heads.fg_bg_sampler = ObservedSampler(model.roi_heads.fg_bg_sampler)

    def write(self, row: dict[str, Any], picture: Path) -> None:
        """Writes an epoch: its metrics, the picture of its evaluation, and the IoUs of the negatives of its last batch.

        Where that fails, a warning says so.
        """
        try:
            for name, value in row.items():
                if name != "epoch" and isinstance(value, int | float):
                    self.writer.add_scalar(name, value, row["epoch"])
            if picture.exists():
                with Image.open(picture) as image:
                    self.writer.add_image("evaluation", np.asarray(image), row["epoch"], dataformats="HWC")
            if self.sampler and self.sampler.last:
                self.writer.add_histogram("IoU of sampled negatives", self.sampler.sampled_ious(), row["epoch"])
            self.writer.flush()
        except OSError as error:
            warn(f"{self.writer.log_dir}: TensorBoard lacks epoch {row['epoch']} ({error.strerror or error})")


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
