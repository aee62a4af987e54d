"""The objective level: whose gradient the box loss is."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.ops import box_iou

from ..stages import summed_loss
from .step import propose


@torch.no_grad()
def box_errors(model: Any, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
    """Finds the errors of the boxes that one training step learns from, as its box loss takes them.

    Of an R-CNN: of the positives that its second stage samples, proposals and ground truths; of a RetinaNet: of all
    positive anchors.

    Args:
        model (FasterRCNN or RetinaNet): in evaluation mode; torchvision's own, or after
            :func:`~balanced_learning.detection.apply_libra`.
        images (list[Tensor[3, H, W]]): in [0, 1], on the device of the model.
        targets (list[dict]): torchvision's, with ``boxes`` and ``labels``.

    Returns:
        Tensor[P, 4]: prediction minus target of each positive, in the units of the model's box coder, on the CPU.
    """
    batch, targets = model.transform(images, targets)
    features = model.backbone(batch.tensors)
    if isinstance(model, RetinaNet):
        maps = list(features.values())
        rows = zip(model.head(maps)["bbox_regression"], model.anchor_generator(batch, maps), targets, strict=True)
        return torch.cat([_anchor_errors(model, *row) for row in rows]).cpu()
    heads = model.roi_heads
    sampled, _, labels, wanted = heads.select_training_samples(propose(model, batch, features, targets), targets)
    pooled = heads.box_head(heads.box_roi_pool(features, sampled, batch.image_sizes))
    deltas = heads.box_predictor(pooled)[1].unflatten(1, (-1, 4))  # [S, classes, 4]
    label = torch.cat(labels)
    positive = torch.where(label > 0)[0]
    return (deltas[positive, label[positive]] - torch.cat(wanted)[positive]).cpu()


def _anchor_errors(model: RetinaNet, deltas: Tensor, anchors: Tensor, target: dict[str, Tensor]) -> Tensor:
    matched_idxs = model.proposal_matcher(box_iou(target["boxes"], anchors))
    positive = torch.where(matched_idxs >= 0)[0]
    wanted = model.box_coder.encode_single(target["boxes"][matched_idxs[positive]], anchors[positive])
    return deltas[positive] - wanted


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
    """Whose gradient the box loss is, and how large it is beside the classification loss.

    The shares are those of :class:`GradientShares`; NaN where there is nothing to divide by.
    """

    positives: int
    inliers: float
    of_total: float
    of_sample: float
    to_outlier: float
    of_total_balanced: float  # of_total under the paper's balanced L1 loss of the same beta
    box_loss: float  # of the second stage (RetinaNet: of its only one), as the model weights it, mean of the images
    class_loss: float
    ratio: float  # box_loss / class_loss
    growth: float  # the gradient of all coordinates under balanced L1, as a multiple of that under the loss


class ObjectiveMeter:
    """Measures :class:`ObjectiveLevel` of a detector, batch by batch.

    Args:
        model (FasterRCNN or RetinaNet): torchvision's own, or after
            :func:`~balanced_learning.detection.apply_libra`.
        loss (nn.Module): whose gradient is shared, with a ``reduction`` attribute.
        beta (float): the error that divides inliers from outliers.
    """

    def __init__(self, model: Any, loss: nn.Module, beta: float) -> None: ...

    def add(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
        """Measures a batch: images in [0, 1], and torchvision's targets, on the device of the model."""
        raise NotImplementedError

    def result(self) -> ObjectiveLevel:
        """Of all batches so far."""
        raise NotImplementedError
