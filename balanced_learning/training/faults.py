"""Steps whose losses or gradients were not finite: what is told and kept of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.dataset import Batch
from balanced_learning.training.errors import printable

_SHOWN_IMAGES = 8


def bad_gradients(model: nn.Module) -> list[str]:
    """The names of the weights whose gradients are not finite, those nearest to the losses first."""
    return [
        name
        for name, parameter in reversed(list(model.named_parameters()))
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]


@dataclass(frozen=True)
class Fault:
    """A step that was left out.

    Attributes:
        epoch: of the step.
        step: of the epoch.
        cause: the first loss that was not finite, or the first gradient if all losses were.
        rank: of the process that met it; None if all losses were finite, and only the gradient of all was not.
        image_ids: of the images of that process, or of all.
        batch: of this process.
    """

    epoch: int
    step: int
    cause: str
    rank: int | None
    image_ids: list[int]
    batch: Batch

    def describe(self, split: Split) -> str:
        """One line for the user, with the files of the images."""
        files = {image_id: split.file_of(image_id) for image_id in self.image_ids[:_SHOWN_IMAGES]}
        shown = [f"{image_id} ({printable(_short(file, split.image_dir))})" for image_id, file in files.items()]
        more = f" and {len(self.image_ids) - len(shown)} more" if len(self.image_ids) > len(shown) else ""
        where = "over all processes" if self.rank is None else f"on process {self.rank}"
        return (
            f"step {self.step} of epoch {self.epoch} is left out: {self.cause} {where}, "
            f"images {', '.join(shown)}{more} in {printable(split.image_dir)}"
        )

    def content(self) -> dict[str, Any]:
        """What a checkpoint needs to repeat the step, in plain values."""
        batch = self.batch.to(torch.device("cpu"))
        return {"cause": self.cause, "rank": self.rank or 0, "images": batch.images, "targets": batch.targets}


def _short(file: Path, folder: Path) -> Path:
    """Without the folder, unless the file lies elsewhere, as an absolute name in the JSON may have it."""
    return file.relative_to(folder) if file.is_relative_to(folder) else file
