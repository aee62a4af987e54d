"""One step of the optimizer, which the host does not wait for, and which changes nothing if its numbers go wrong."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from balanced_learning.training import distributed, randomness
from balanced_learning.training.data.dataset import Batch
from balanced_learning.training.errors import UserError
from balanced_learning.training.faults import Fault, bad_gradients
from balanced_learning.training.optimization import update, update_average
from balanced_learning.training.run import Run


@dataclass
class _Step:
    """A step whose outcome is on its way from the device."""

    epoch: int
    step: int
    batch: Batch
    names: list[tuple[str, int]]  # of the losses, with the images of the part of the batch that they are from
    values: Tensor  # the losses, the norm of the gradients, and the scale of the loss
    copied: Any  # the event after which the values are on the host
    statistics: list[Tensor]  # of batch norm, before the step


class Stepper:
    """Takes steps of the optimizer of a run.

    The losses of a global batch are means over its images: each process weights its part with its share of the images,
    and so does each part with ``--accumulation-steps``. That gives the gradient of one big batch, but for what depends
    on the images that are padded or sampled together.

    Whether losses and gradients are finite is known on the device, where the optimizer leaves the step out if they are
    not. The host hears of it at the next step, after its forward pass, for whose proposals it waits anyway; then the
    statistics of batch norm are put back as well, and the run is as it was before the step that was left out.

    Args:
        run: whose model, optimizer and sums change.
        report: is told of a step that was left out, equally often on every process, before anything else is done.
    """

    def __init__(self, run: Run, report: Callable[[Fault], None]) -> None:
        self.run = run
        self.report = report
        self.losses = Losses(run.model)
        self.parallel = distributed.parallel(self.losses)
        norms = [module for module in run.model.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self._last: _Step | None = None

    def __call__(self, batch: Batch) -> None:
        """Takes the next step of the run.

        Raises:
            UserError: if batch norm cannot train on the batch.
        """
        run = self.run
        batch = batch.to(run.precision.device)
        parts = batch.parts(run.config.training.batch_size)
        statistics = [buffer.clone() for buffer in self._statistics]
        losses = self._forward(parts, 0)
        if not self._hear():
            statistics = [buffer.clone() for buffer in self._statistics]
            losses = self._forward(parts, 0)
        run.optimizer.zero_grad()
        all_losses = []
        for number, part in enumerate(parts):
            losses = losses if number == 0 else self._forward(parts, number)
            with self._sending(parts, number):
                self._backward(losses, len(part.images) * (not batch.is_filler) / batch.of)
            all_losses.append({name: value.detach() for name, value in losses.items()})
        norm = update(run.model, run.optimizer, run.precision, run.config.training.clip_grad_norm)
        run.scheduler.step()
        self._remember(batch, parts, all_losses, norm, statistics)
        run.step += 1

    def finish(self) -> bool:
        """Waits for the last step, and returns whether it was taken rather than left out."""
        is_taken = self._hear()
        self._settle_average()
        return is_taken

    def status(self) -> str:
        """The learning rate and the mean losses of the epoch so far, in words; waits for the last step."""
        self.finish()
        losses = "  ".join(f"{name} {value:.4g}" for name, value in self.run.means().items())
        return f"lr {self.run.lr():.4g}  {losses}"

    def _settle_average(self) -> None:
        """Gives the average the statistics of batch norm, of which it follows the weights alone."""
        if self.run.ema is not None:
            for average, current in zip(self.run.ema.module.buffers(), self.run.model.buffers(), strict=True):
                average.copy_(current)

    def _forward(self, parts: list[Batch], number: int) -> dict[str, Tensor]:
        run, part = self.run, parts[number]
        randomness.seed_all(run.config.training.seed, "step", run.epoch, run.step, distributed.rank(), number)
        with self._sending(parts, number), run.precision():
            return self.parallel(part.images, part.targets)

    def _sending(self, parts: list[Batch], number: int) -> AbstractContextManager:
        """Gradients are exchanged with the other processes in the last part of a batch."""
        is_last = number == len(parts) - 1
        return nullcontext() if is_last or self.parallel is self.losses else self.parallel.no_sync()  # type: ignore[operator]

    def _backward(self, losses: dict[str, Tensor], share: float) -> None:
        total = torch.stack(list(losses.values())).sum()
        # A loss that is not finite spoils all gradients, so that every process sees it.
        weight = torch.where(total.detach().isfinite(), share * distributed.world_size(), math.nan)
        self.run.precision.scaler.scale(total * weight).backward()

    def _remember(
        self,
        batch: Batch,
        parts: list[Batch],
        losses: list[dict[str, Tensor]],
        norm: Tensor,
        statistics: list[Tensor],
    ) -> None:
        scale = self.run.precision.scaler.scale(torch.ones_like(norm))
        values = torch.stack(
            [value.float() for part in losses for value in part.values()] + [norm.float(), scale.float()]
        )
        weights = [0 if batch.is_filler else len(part.images) for part in parts]
        names = [(name, images) for part, images in zip(losses, weights, strict=True) for name in part]
        on_host = values.to("cpu", non_blocking=True)
        event = torch.Event(values.device) if values.device.type != "cpu" else None
        if event:
            event.record()
        self._last = _Step(self.run.epoch, self.run.step, batch, names, on_host, event, statistics)

    def _hear(self) -> bool:
        """Hears of the last step, and adds up its losses; or undoes what is left of it, and returns False."""
        last, self._last = self._last, None
        if last is None:
            return True
        if last.copied:
            last.copied.synchronize()
        *losses, norm, scale = last.values.tolist()
        if not math.isfinite(norm) and (fault := self._find_fault(last, losses, scale)):
            for buffer, before in zip(self._statistics, last.statistics, strict=True):
                buffer.copy_(before)
            self._settle_average()
            self.report(fault)
            return False
        sums = self.run.sums
        for (name, images), value in zip(last.names, losses, strict=True):
            sums[name] = sums.get(name, 0.0) + images * value
        sums["images"] = sums.get("images", 0.0) + sum(
            images for name, images in last.names if name == last.names[0][0]
        )
        if self.run.ema is not None and math.isfinite(norm):
            update_average(self.run.ema, self.run.model)
        return True

    def _find_fault(self, last: _Step, losses: list[float], scale: float) -> Fault | None:
        """What was wrong with a step that was left out; nothing, if float16 was only scaled too much."""
        pairs = zip(last.names, losses, strict=True)
        own = next((f"{name} is {value:g}" for (name, _), value in pairs if not math.isfinite(value)), None)
        told = distributed.gather((own, last.batch.image_ids()))
        rank = next((rank for rank, (cause, _) in enumerate(told) if cause), None)
        if rank is None:
            names = bad_gradients(self.run.model)  # of the last step still
            if names and self.run.precision.dtype is torch.float16 and scale >= 1:
                return None
            image_ids = [image_id for _, ids in told for image_id in ids]
            cause = f"the gradient of {(names or ['all weights, taken together,'])[0]} is not finite"
            return Fault(last.epoch, last.step, cause, None, image_ids, last.batch)
        cause, image_ids = told[rank]
        return Fault(last.epoch, last.step, cause, rank, image_ids, last.batch)


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
