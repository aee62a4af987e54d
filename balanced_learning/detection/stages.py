"""The protocol of samplers and of box losses in the balanced stages of a detector."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..samplers import IoUBalancedSampler
from .matching import Matches

Masks = tuple[list[Tensor], list[Tensor]]


class BalancedStage:
    """A stage whose ``fg_bg_sampler`` is called as torchvision calls it, with labels alone, which are :class:`Matches`.

    A sampler that takes labels, IoUs and matched indices is adapted where it is assigned.
    """

    __jit_ignored_attributes__ = ("box_loss", "fg_bg_sampler")  # used in training, which TorchScript does not compile

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "fg_bg_sampler":
            vars(self)["_modules"].pop(name, None)  # torch lets nothing but a module take the place of a module
            value = taking_labels(value)
        super().__setattr__(name, value)


def taking_labels(sampler: Callable) -> Callable:
    """The sampler, or what makes a sampler of three lists callable with labels that are :class:`Matches`.

    An :class:`~balanced_learning.IoUBalancedSampler` stays the same object, and can still be called with three lists.
    """
    if type(sampler) is IoUBalancedSampler:
        object.__setattr__(sampler, "__class__", MatchesSampler)  # past the lock of a frozen dataclass
    elif not _is_callable_with_one(sampler):
        return ThreeListSampler(sampler)
    return sampler


class MatchesSampler(IoUBalancedSampler):
    """An :class:`~balanced_learning.IoUBalancedSampler` that can also be called with :class:`Matches` alone."""

    def __call__(
        self,
        labels: Matches | Sequence[Tensor],
        ious: Sequence[Tensor] = (),
        matched_idxs: Sequence[Tensor] = (),
    ) -> Masks:
        if isinstance(labels, Matches) and not ious:
            labels, ious, matched_idxs = _three_lists(labels)
        return super().__call__(labels, ious, matched_idxs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IoUBalancedSampler) and vars(self) == vars(other)

    __hash__ = IoUBalancedSampler.__hash__


class ThreeListSampler(nn.Module):
    """Calls ``sampler``, which takes labels, IoUs and matched indices, with those of :class:`Matches`."""

    def __init__(self, sampler: Callable) -> None:
        super().__init__()
        self.sampler = sampler

    def forward(self, labels: Matches) -> Masks:
        return self.sampler(*_three_lists(labels))


def _three_lists(labels: Matches) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [image.long() for image in labels], labels.ious, labels.matched_idxs


def _is_callable_with_one(sampler: Callable) -> bool:
    try:
        inspect.signature(sampler.forward if isinstance(sampler, nn.Module) else sampler).bind(None)
    except TypeError:
        return False
    except ValueError:  # a builtin that has no signature
        return True
    return True


class WeightedLoss(nn.Module):
    """``loss`` times ``weight``, with its reduction."""

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss = loss
        self.weight = weight
        self.reduction = loss.reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.weight * self.loss(input, target)


def has_reduction(box_loss: object) -> bool:
    """Whether it is a loss that says how it is reduced, for :func:`summed_loss`."""
    return getattr(box_loss, "reduction", None) in ("none", "mean", "sum")


def summed_loss(box_loss: nn.Module, input: Tensor, target: Tensor) -> Tensor:
    """The sum of a loss over all elements: what it is divided by is the model's affair, not the loss's."""
    if input.numel() == 0:
        return F.smooth_l1_loss(input, target, reduction="sum")  # 0 of the type that losses have under autocast
    loss = box_loss(input, target)
    return loss * input.numel() if box_loss.reduction == "mean" else loss.sum()
