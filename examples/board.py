"""What TensorBoard shows of a run: the rows of metrics.jsonl, and which negatives are sampled."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from errors import UserError


class Board:
    """Writes event files into ``folder``, and watches what the second stage of ``model`` samples, if there is one."""

    def __init__(self, folder: Path, model: Any) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard: the package is missing; pip install tensorboard") from None
        self.writer = SummaryWriter(str(folder))
        self.sampler: WatchedSampler | None = None
        if hasattr(model, "roi_heads"):
            self.sampler = model.roi_heads.fg_bg_sampler = WatchedSampler(model.roi_heads.fg_bg_sampler)

    def write(self, row: dict[str, Any]) -> None:
        """The metrics of an epoch, and the IoUs of the negatives sampled in its last batch."""
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["epoch"])
        if self.sampler and self.sampler.last:
            self.writer.add_histogram("IoU of sampled negatives", self.sampler.sampled_ious(), row["epoch"])
        self.writer.flush()


class WatchedSampler:
    """A sampler that remembers its last batch; torchvision's random one is given the labels alone."""

    def __init__(self, sampler: Callable) -> None:
        self.sampler = sampler
        self.last: list[tuple[Tensor, Tensor]] = []  # IoUs and mask of the negatives of each image

    def __call__(
        self, labels: Sequence[Tensor], *matches: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        is_random = isinstance(self.sampler, BalancedPositiveNegativeSampler)
        positives, negatives = self.sampler(labels) if is_random else self.sampler(labels, *matches)
        if matches:  # not from a stage of torchvision's own, which keeps no IoU
            self.last = list(zip(matches[0], negatives, strict=True))
        return positives, negatives

    def sampled_ious(self) -> Tensor:
        return torch.cat([ious[mask.bool()] for ious, mask in self.last])
