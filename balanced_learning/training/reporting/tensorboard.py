"""TensorBoard's view of a run: the rows of metrics.jsonl, and the IoUs of the negatives that are sampled."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from balanced_learning.training.errors import UserError


class TensorBoard:
    """Writes event files into ``folder``, and observes the second stage's sampler of ``model``, if it has one."""

    def __init__(self, folder: Path, model: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard: the package is missing; pip install tensorboard") from None
        self.writer = SummaryWriter(str(folder))
        self.sampler: ObservedSampler | None = None
        if hasattr(model, "roi_heads"):
            self.sampler = model.roi_heads.fg_bg_sampler = ObservedSampler(model.roi_heads.fg_bg_sampler)

    def write(self, row: dict[str, Any]) -> None:
        """Writes the metrics of an epoch, and the IoUs of the negatives sampled in its last batch."""
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["epoch"])
        if self.sampler and self.sampler.last:
            self.writer.add_histogram("IoU of sampled negatives", self.sampler.sampled_ious(), row["epoch"])
        self.writer.flush()


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
