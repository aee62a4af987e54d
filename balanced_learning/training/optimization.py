"""The optimizer, its schedule, and mixed precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR
from torchvision.ops._utils import split_normalization_params

from balanced_learning.training.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    if config.norm_weight_decay is None:
        groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    else:
        norm, other = split_normalization_params(model)
        groups = [{"params": other}, {"params": norm, "weight_decay": config.norm_weight_decay}]
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups, config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.opt == "sgd_nesterov"
    )


def make_scheduler(optimizer: Optimizer, config: TrainingConfig, iterations: int) -> LRScheduler:
    """Stepped after each of the ``iterations`` of an epoch: linear warm-up times the decay."""
    first_factor = config.warmup_factor if config.warmup_iters else 1.0
    warmup = LinearLR(optimizer, first_factor, total_iters=max(1, min(config.warmup_iters, iterations)))
    if config.lr_scheduler == "multisteplr":
        decay: LRScheduler = MultiStepLR(optimizer, [step * iterations for step in config.lr_steps], config.lr_gamma)
    else:
        decay = CosineAnnealingLR(optimizer, config.epochs * iterations)
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


def update(
    loss: Tensor,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    precision: Precision,
    clip_norm: float,
) -> None:
    """One step of the optimizer and of its schedule along the gradient of the loss, clipped to ``clip_norm`` if > 0."""
    optimizer.zero_grad()
    precision.scaler.scale(loss).backward()
    if clip_norm > 0:
        precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    precision.scaler.step(optimizer)
    precision.scaler.update()
    scheduler.step()
