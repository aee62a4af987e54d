"""The optimizer, its schedule, the average of the weights, and mixed precision."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops._utils import split_normalization_params

from balanced_learning.training.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """The optimizer, of the fused kind: it can be told on the device to leave out a step (``found_inf``)."""
    if config.norm_weight_decay is None:
        groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    else:
        norm, other = split_normalization_params(model)
        groups = [{"params": other}, {"params": norm, "weight_decay": config.norm_weight_decay}]
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.opt == "adamw":
        optimizer: Optimizer = torch.optim.AdamW(groups, **options)
    else:
        nesterov = config.opt == "sgd_nesterov"
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # for schedules that begin in the middle
        for parameter in group["params"]:
            if config.opt != "adamw" and config.momentum:  # torch leaves it uninitialized if the first step is left out
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_scheduler(optimizer: Optimizer, config: TrainingConfig, iterations: int, done: int = 0) -> LRScheduler:
    """Stepped after each of the ``iterations`` of an epoch: linear warm-up times the decay.

    The learning rate follows from the number of steps alone.

    Args:
        optimizer: at the start of training.
        config: the settings.
        iterations: steps of an epoch.
        done: steps before the first one.
    """
    return LambdaLR(optimizer, lambda step: lr_factor(config, iterations, step), last_epoch=done - 1)


def lr_factor(config: TrainingConfig, iterations: int, step: int) -> float:
    """The factor of the learning rate at a step, counted from the start of training."""
    warmup_iters = max(1, min(config.warmup_iters, iterations))
    first_factor = config.warmup_factor if config.warmup_iters else 1.0
    warmup = first_factor + (1 - first_factor) * min(1.0, step / warmup_iters)
    if config.lr_scheduler == "multisteplr":
        return warmup * config.lr_gamma ** sum(step >= drop * iterations for drop in config.lr_steps)
    return warmup * (1 + math.cos(math.pi * step / (config.epochs * iterations))) / 2


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


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of the weights of a model, in evaluation mode."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()


def update_average(average: AveragedModel, model: nn.Module) -> None:
    """As :meth:`AveragedModel.update_parameters` of the weights, without its copy to the device, which waits for it."""
    if average.n_averaged == 0:
        average.update_parameters(model)
    else:
        average.multi_avg_fn(list(average.module.parameters()), list(model.parameters()), average.n_averaged)  # type: ignore[misc]
        average.n_averaged += 1


def update(model: nn.Module, optimizer: Optimizer, precision: Precision, clip_norm: float) -> Tensor:
    """One step of the optimizer along the gradients, clipped to ``clip_norm`` if > 0.

    If their norm is not finite, the optimizer leaves the step out, on the device: nobody waits.

    Returns:
        Tensor: the norm of the gradients, [].
    """
    precision.scaler.unscale_(optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
    is_finite = norm.isfinite()
    if clip_norm > 0:
        # Gradients that are not finite stay as they are, for the one that was first to be named.
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, torch.where(is_finite, norm, 0))
    optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]  # as GradScaler tells fused optimizers
    optimizer.step()  # not by the scaler, which knows nothing of a norm that overflows
    precision.scaler.update()
    return norm
