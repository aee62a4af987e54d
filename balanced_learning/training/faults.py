"""Steps whose losses or gradients were not finite: what is told and kept of them, and how they are repeated."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from balanced_learning.training import randomness
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.data.batching import Batch
from balanced_learning.training.data.coco import Split
from balanced_learning.training.errors import UserError, printable
from balanced_learning.training.optimization import Precision

_SHOWN_IMAGES = 8


class Losses(nn.Module):
    """The losses of a detector in training; where it stumbles over a NaN inside, one that is NaN."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: list[Tensor], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        try:
            losses: dict[str, Tensor] = self.detector(images, targets)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise UserError(
                    f"batch norm cannot train on {len(images)} image so small that its coarsest map is one pixel; pass "
                    "a --min-size and --max-size above 32, or --weights-backbone IMAGENET1K_V1, whose batch norm is "
                    "frozen"
                ) from None
            if "NaN" not in str(error):
                raise
            # With a graph to every weight: the other processes wait for all gradients.
            weights = [parameter.sum() for parameter in self.parameters() if parameter.requires_grad]
            losses = {str(error): torch.stack(weights).sum() * math.nan}
        return losses


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
        shown = [f"{image_id} ({printable(file.relative_to(split.image_dir))})" for image_id, file in files.items()]
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


def replay(checkpoint: Checkpoint, model: nn.Module, precision: Precision) -> str:
    """Repeats the step of a file that was kept of one, and says in some lines where its numbers go wrong.

    Args:
        checkpoint: of the file.
        model: with its weights, on the device of ``precision``.
        precision: of its run.

    Raises:
        UserError: if the file is a checkpoint of another kind.
    """
    fault = checkpoint.fault
    if fault is None:
        raise UserError(f"--replay {checkpoint.path}: a checkpoint, but not of a step that was left out")
    training, position = checkpoint.config.training, checkpoint.position
    batch = Batch(fault["images"], fault["targets"], of=len(fault["images"]), is_filler=False, unreadable=[], step=0)
    place = f"step {position.step} of epoch {position.epoch}, process {fault['rank']}"
    lines = [f"{place}; in the run, {printable(fault['cause'])}"]
    checkpoint.restore({"scaler": precision.scaler})
    model.train()
    for number, part in enumerate(batch.to(precision.device).parts(training.batch_size)):
        model.zero_grad()
        randomness.seed_all(training.seed, "step", position.epoch, position.step, fault["rank"], number)
        with _watched(model) as seen, precision():
            losses = Losses(model)(part.images, part.targets)
        lines.append(f"images {part.image_ids()}: " + "  ".join(f"{name} {loss:g}" for name, loss in losses.items()))
        lines += [f"the first output that is not finite is that of {name}" for name in seen[:1]]
        precision.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        names = bad_gradients(model)[:1]
        lines += [f"of the gradients that are not finite, that of {name} is nearest to the losses" for name in names]
    if not any("not finite" in line for line in lines[1:]):
        lines.append(
            "all numbers are finite here: threads, kernels or versions are others than then, or the fault was in the "
            "batch of another process"
        )
    return "\n".join(lines)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that give what is not finite, in the order in which they do."""
    seen: list[str] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                seen.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
