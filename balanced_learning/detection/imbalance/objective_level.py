"""The objective level: whose gradient the box loss is, and how large the loss is beside that of classification."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.roi_heads import fastrcnn_loss

from ...losses import BalancedL1Loss
from ..roi_heads import LibraRoIHeads
from ..stages import summed_loss
from .step import Targets, check_detector, in_evaluation, positive_anchors, propose


def box_errors(model: Any, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """Finds the errors of the boxes that one training step learns from, as its box loss takes them.

    Of an R-CNN: of the positives that its second stage samples, proposals and ground truths; of a RetinaNet: of all
    positive anchors. Batch norm and dropout are as in evaluation, and the model is afterwards as before.

    Args:
        model (FasterRCNN or RetinaNet): torchvision's own, or after
            :func:`~balanced_learning.detection.apply_libra`.
        images (list[Tensor[3, H, W]]): in [0, 1], on the device of the model.
        targets (list[dict]): torchvision's, with ``boxes`` and ``labels``, and ``masks`` for a Mask R-CNN.

    Returns:
        Tensor[P, 4]: prediction minus target of each positive, in the units of the model's box coder, on the CPU.
    """
    return _learn(model, images, targets).errors


class _Lesson(NamedTuple):
    """What a training step learns from."""

    errors: Tensor  # [P, 4], on the CPU
    losses: tuple[float, float] | None  # of the classes and of the boxes; None without a box to learn from


@torch.no_grad()
def _learn(model: Any, images: list[Tensor], targets: list[dict[str, Tensor]]) -> _Lesson:
    with in_evaluation(model):
        batch, targets = model.transform(images, targets)
        features = model.backbone(batch.tensors)
        learn = _learn_of_anchors if isinstance(model, RetinaNet) else _learn_of_proposals
        return learn(model, batch, features, targets)


def _learn_of_anchors(model: RetinaNet, batch: Any, features: dict[str, Tensor], targets: Targets) -> _Lesson:
    maps = list(features.values())
    outputs, anchors = model.head(maps), model.anchor_generator(batch, maps)
    losses = model.compute_loss(targets, outputs, anchors)
    errors = []
    for deltas, boxes, target in zip(outputs["bbox_regression"], anchors, targets, strict=True):
        positive, matched_idxs = positive_anchors(model, boxes, target)
        wanted = model.box_coder.encode_single(target["boxes"][matched_idxs], boxes[positive])
        errors.append(deltas[positive] - wanted)
    return _Lesson(torch.cat(errors).cpu(), (losses["classification"].item(), losses["bbox_regression"].item()))


def _learn_of_proposals(model: Any, batch: Any, features: dict[str, Tensor], targets: Targets) -> _Lesson:
    heads = model.roi_heads
    sampled, _, *columns = heads.select_training_samples(propose(model, batch, features, targets), targets)
    pooled = heads.box_head(heads.box_roi_pool(features, sampled, batch.image_sizes))
    logits, deltas = heads.box_predictor(pooled)
    label, wanted = map(torch.cat, columns)
    positive = torch.where(label > 0)[0]
    errors = deltas.unflatten(1, (-1, 4))[positive, label[positive]] - wanted[positive]
    if not len(label):
        return _Lesson(errors.cpu(), None)
    if isinstance(heads, LibraRoIHeads):
        class_loss, box_loss = heads.box_losses(logits, deltas, label, wanted).values()
    else:
        class_loss, box_loss = fastrcnn_loss(logits, deltas, *columns)
    return _Lesson(errors.cpu(), (class_loss.item(), box_loss.item()))


class GradientShares(NamedTuple):
    """The inliers' part in the gradient of a box loss, from 0 to 1; NaN where there is nothing to divide by.

    An inlier is a coordinate of a box whose error is below beta. Gradients count by their magnitude, and that of a
    positive is the sum over its four coordinates.
    """

    inliers: float  # among all coordinates
    of_total: float  # their gradient in that of all positives together
    of_sample: float  # the same in each positive by itself, averaged
    to_outlier: float  # the mean gradient of an inlier, divided by that of an outlier: the paper's 30 %


def gradient_shares(errors: Tensor, loss: nn.Module, *, beta: float = 1.0) -> GradientShares:
    """Measures how much of a loss's gradient comes from inliers: section 3.3 of Libra R-CNN.

    Args:
        errors (Tensor[P, 4]): such as those of :func:`box_errors`.
        loss (nn.Module): with a ``reduction`` attribute, such as ``nn.SmoothL1Loss(beta=1.0)``.
        beta (float): the error that divides inliers from outliers.

    Example:
        >>> gradient_shares(torch.tensor([[0.5, 0.5, 0.0, 3.0]]), nn.SmoothL1Loss())  # gradients 0.5, 0.5, 0 and 1
        GradientShares(inliers=0.75, of_total=0.5, of_sample=0.5, to_outlier=0.3333333432674408)
    """
    size = gradients(errors, loss).abs()
    inlier = errors.abs() < beta
    of_inliers = size * inlier
    shares = (
        inlier.float().mean(),
        of_inliers.sum() / size.sum(),
        (of_inliers.sum(dim=1) / size.sum(dim=1)).nanmean(),
        size[inlier].mean() / size[~inlier].mean(),
    )
    return GradientShares(*(share.item() for share in shares))


def gradients(errors: Tensor, loss: nn.Module) -> Tensor:
    """The gradient of a loss, summed, at each error, by autograd. [the shape of ``errors``]"""
    with torch.enable_grad():
        leaf = errors.detach().requires_grad_()
        return torch.autograd.grad(summed_loss(loss, leaf, torch.zeros_like(leaf)), leaf)[0]


@dataclass(frozen=True)
class ObjectiveLevel:
    """Whose gradient the box loss is, and how large the loss is beside that of classification.

    The positives of all images count alike in the shares, though a RetinaNet divides the sum of each image by their
    number. NaN where there is nothing to divide by: of no positives the shares are, and of no images the losses;
    ``to_outlier`` is where there are no inliers or no outliers, too.
    """

    positives: int
    inliers: float  # as in GradientShares, as the following
    of_total: float
    of_sample: float
    to_outlier: float
    of_total_balanced: float  # of_total, were the loss balanced L1
    box_loss: float  # of the second stage (RetinaNet: of its only one), with the model's own loss; mean of the images
    class_loss: float
    ratio: float  # of the box loss to the classification loss
    growth: float  # of the gradient of all coordinates, were the loss balanced L1: its multiple


class ObjectiveMeter:
    """Measures :class:`ObjectiveLevel` of a detector, batch by batch, and leaves the model as it is.

    The losses are those of a training step of the model, but with batch norm and dropout as in evaluation.

    Args:
        model (FasterRCNN or RetinaNet): torchvision's own, or after
            :func:`~balanced_learning.detection.apply_libra`.
        loss (nn.Module): whose gradient is divided, with a ``reduction`` attribute.
        balanced (BalancedL1Loss): to compare it with. Its ``beta`` is the error that divides inliers from outliers.

    Raises:
        TypeError: for a model of another type.
    """

    def __init__(self, model: Any, loss: nn.Module, balanced: BalancedL1Loss) -> None:
        check_detector(model, FasterRCNN, RetinaNet)
        self.model, self.loss, self.balanced = model, loss, balanced
        self._errors = [torch.zeros(0, 4)]
        self._losses, self._num_images = torch.zeros(2, dtype=torch.float64), 0  # sums over images

    def add(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
        """Measures a batch: images in [0, 1], and torchvision's targets, on the device of the model."""
        errors, losses = _learn(self.model, images, targets)
        self._errors.append(errors)
        if losses:
            self._losses += len(images) * torch.tensor(losses)
            self._num_images += len(images)

    def result(self) -> ObjectiveLevel:
        """Of all batches so far."""
        errors = torch.cat(self._errors)
        class_loss, box_loss = (self._losses / self._num_images).tolist()
        size, balanced_size = (gradients(errors, loss).abs().sum() for loss in (self.loss, self.balanced))
        beta = self.balanced.beta
        return ObjectiveLevel(
            len(errors),
            *gradient_shares(errors, self.loss, beta=beta),
            of_total_balanced=gradient_shares(errors, self.balanced, beta=beta).of_total,
            box_loss=box_loss,
            class_loss=class_loss,
            ratio=box_loss / class_loss if class_loss else math.nan,
            growth=(balanced_size / size).item(),
        )
