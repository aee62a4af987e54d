"""One epoch of training, and the predictions on a data set."""

import math
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR
from torch.utils.data import DataLoader
from torchvision.ops._utils import split_normalization_params

from distributed import mean_over_processes
from errors import UserError
from report import Progress


def make_optimizer(model: nn.Module, args: Namespace) -> Optimizer:
    if args.norm_weight_decay is None:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    else:
        norm, other = split_normalization_params(model)
        groups = [{"params": other}, {"params": norm, "weight_decay": args.norm_weight_decay}]
    if args.opt == "adamw":
        return torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay)
    return torch.optim.SGD(
        groups, args.lr, args.momentum, weight_decay=args.weight_decay, nesterov=args.opt == "sgd_nesterov"
    )


def make_scheduler(optimizer: Optimizer, args: Namespace, iterations: int) -> LRScheduler:
    """Stepped after each of the ``iterations`` of an epoch: linear warm-up times the decay."""
    first_factor = args.warmup_factor if args.warmup_iters else 1.0
    warmup = LinearLR(optimizer, first_factor, total_iters=max(1, min(args.warmup_iters, iterations)))
    if args.lr_scheduler == "multisteplr":
        decay: LRScheduler = MultiStepLR(optimizer, [step * iterations for step in args.lr_steps], args.lr_gamma)
    else:
        decay = CosineAnnealingLR(optimizer, args.epochs * iterations)
    return ChainedScheduler([warmup, decay], optimizer)


class Precision:
    """Automatic mixed precision, or none: ``"fp16"``, ``"bf16"`` or ``None``."""

    def __init__(self, name: str | None, device: torch.device) -> None:
        self.device = device
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, None: None}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            yield


def train_one_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loader: DataLoader,
    precision: Precision,
    *,
    clip_norm: float,
    progress: Progress,
) -> dict[str, float]:
    """Trains on every batch of the loader once.

    Losses stay on the device between two reports, so that the GPU is not waited for.

    Returns:
        dict: the mean of each loss and of their sum ``loss``, the last ``lr``, ``images_per_second`` and ``seconds``.

    Raises:
        UserError: if a loss or a weight is not finite.
    """
    model.train()
    start, num_images = time.perf_counter(), 0
    total: dict[str, Tensor] = {}
    for images, targets in progress.over(loader, status=lambda: _status(total, optimizer)):
        images = [image.to(precision.device, non_blocking=True) for image in images]
        targets = [
            {k: v.to(precision.device, non_blocking=True) for k, v in target.items() if isinstance(v, Tensor)}
            for target in targets
        ]
        with precision():
            losses = model(images, targets)
        losses["loss"] = sum(losses.values())
        lr = optimizer.param_groups[0]["lr"]
        _update(losses["loss"], model, optimizer, scheduler, precision, clip_norm)
        for name, value in [*losses.items(), ("batches", losses["loss"].new_ones(()))]:
            total[name] = total.get(name, 0) + value.detach()
        num_images += len(images)

    means = _means(total)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise _diverged(["weights"])
    seconds = time.perf_counter() - start
    return means | {
        "lr": lr,
        "images_per_second": num_images / seconds,
        "seconds": seconds,
    }


def _update(
    loss: Tensor,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    precision: Precision,
    clip_norm: float,
) -> None:
    optimizer.zero_grad()
    precision.scaler.scale(loss).backward()
    if clip_norm > 0:
        precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    precision.scaler.step(optimizer)
    precision.scaler.update()
    scheduler.step()


def _means(total: dict[str, Tensor]) -> dict[str, float]:
    """The means since the epoch began, over all processes; if one is not finite, every process raises."""
    sums = mean_over_processes(total)
    means = {name: value / sums["batches"] for name, value in sums.items() if name != "batches"}
    wrong = [name for name, value in means.items() if not math.isfinite(value)]
    if wrong:
        raise _diverged(wrong)
    return means


def _diverged(what: list[str]) -> UserError:
    return UserError(
        f"training diverged: {', '.join(what)} not finite; lower --lr, lengthen --warmup-iters or clip more "
        "(--clip-grad-norm). The last checkpoint is untouched"
    )


def _status(total: dict[str, Tensor], optimizer: Optimizer) -> str:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in _means(total).items())
    return f"lr {optimizer.param_groups[0]['lr']:.6f}  {losses}"


@torch.inference_mode()
def predict(
    model: nn.Module, loader: DataLoader, precision: Precision, progress: Progress
) -> dict[int, dict[str, Tensor]]:
    """The detections of each image, by image id, on the CPU."""
    model.eval()
    detections = {}
    for images, targets in progress.over(loader, status=lambda: ""):
        with precision():
            outputs = model([image.to(precision.device) for image in images])
        for target, output in zip(targets, outputs, strict=True):
            detections[target["image_id"]] = {name: value.float().cpu() for name, value in output.items()}
    return detections
