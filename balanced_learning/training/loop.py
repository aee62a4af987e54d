"""One epoch of training."""

import math
import time
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from balanced_learning.training import distributed, randomness
from balanced_learning.training.config import Config
from balanced_learning.training.data.batching import DetectionLoader
from balanced_learning.training.errors import UserError, warn
from balanced_learning.training.optimization import Precision, update
from balanced_learning.training.reporting.progress import Progress


def train_one_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loader: DetectionLoader,
    precision: Precision,
    config: Config,
    epoch: int,
) -> dict[str, float]:
    """Trains on every batch of the loader once.

    Losses stay on the device between two reports, so that the GPU is not waited for.

    Returns:
        dict: the mean of each loss and of their sum ``loss``, the last ``lr``, ``images_per_second`` and ``seconds``.

    Raises:
        UserError: if a loss or a weight is not finite, or batch norm cannot train on a batch.
    """
    model.train()
    loader.set_epoch(epoch)
    progress = Progress(f"epoch {epoch}", config.run.print_freq, is_main=distributed.is_main())
    start, num_images = time.perf_counter(), 0
    total: dict[str, Tensor] = {}
    batches = progress.over(loader, status=lambda: _status(total, optimizer))
    for batch in batches:
        for line in batch.replaced:
            warn(line)
        randomness.seed_all(config.training.seed, "step", epoch, batch.step, distributed.rank())
        images = [image.to(precision.device, non_blocking=True) for image in batch.images]
        targets = [
            {k: v.to(precision.device, non_blocking=True) for k, v in target.items() if isinstance(v, Tensor)}
            for target in batch.targets
        ]
        with precision():
            losses = _losses(model, images, targets)
        losses["loss"] = sum(losses.values())
        lr = optimizer.param_groups[0]["lr"]
        weight = 0.0 if batch.is_filler else len(images) * distributed.world_size() / batch.of
        update(losses["loss"] * weight, model, optimizer, scheduler, precision, config.training.clip_grad_norm)
        for name, value in [*losses.items(), ("batches", losses["loss"].new_ones(()))]:
            total[name] = total.get(name, 0) + value.detach() * weight
        num_images += 0 if batch.is_filler else len(images)

    means = _means(total)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise _diverged(["weights"])
    seconds = time.perf_counter() - start
    return means | {"lr": lr, "images_per_second": num_images / seconds, "seconds": seconds}


def _losses(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Any]:
    try:
        return model(images, targets)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"batch norm cannot train on {len(images)} image so small that its coarsest map is one pixel; pass a "
            "--min-size and --max-size above 32, or --weights-backbone IMAGENET1K_V1, whose batch norm is frozen"
        ) from None


def _means(total: dict[str, Tensor]) -> dict[str, float]:
    """The means since the epoch began, over all processes; if one is not finite, every process raises."""
    sums = distributed.mean_over_processes(total)
    means = {name: value / sums["batches"] for name, value in sums.items() if name != "batches"}
    wrong = [name for name, value in means.items() if not math.isfinite(value)]
    if wrong:
        raise _diverged(wrong)
    return means


def _diverged(names: list[str]) -> UserError:
    return UserError(
        f"training diverged: {', '.join(names)} not finite; lower --lr, lengthen --warmup-iters or clip more "
        "(--clip-grad-norm). The last checkpoint is untouched"
    )


def _status(total: dict[str, Tensor], optimizer: Optimizer) -> str:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in _means(total).items())
    return f"lr {optimizer.param_groups[0]['lr']:.6f}  {losses}"
