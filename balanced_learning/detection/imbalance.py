"""Measurements of the imbalances that Libra R-CNN is about, of a detector on images."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import box_iou

from ..samplers import IoUBalancedSampler
from .stages import summed_loss

HARD_SHARE = 1 / 4  # of the negatives: of 2,000 proposals about the 512 that hard example mining would take


class MatchedProposals(NamedTuple):
    """The proposals and ground truths of an image that a sampler chooses from, M in all, on the CPU."""

    image: Tensor  # [3, H, W], from 0 to 1, in the size the model works on
    gt_boxes: Tensor  # [G, 4], xyxy in pixels
    boxes: Tensor  # [M, 4]
    labels: Tensor  # [M]
    ious: Tensor  # [M]
    matched_idxs: Tensor  # [M]
    hardness: Tensor  # [M], the classification loss if the box is background


@torch.no_grad()
def match_proposals(model: Any, images: list[Tensor], targets: list[dict[str, Tensor]]) -> list[MatchedProposals]:
    """Finds the boxes that one training step of an R-CNN with balanced RoI heads would sample from.

    Args:
        model (FasterRCNN): after :func:`~balanced_learning.detection.apply_libra` with a sampler, in evaluation mode.
        images (list[Tensor[3, H, W]]): in [0, 1], on the device of the model.
        targets (list[dict]): torchvision's, with ``boxes`` and ``labels``.
    """
    batch, targets = model.transform(images, targets)
    features = model.backbone(batch.tensors)
    proposals = _propose(model, batch, features, targets)
    heads = model.roi_heads
    boxes, matches = heads.match_proposals(proposals, targets)
    pooled = heads.box_head(heads.box_roi_pool(features, boxes, batch.image_sizes))
    hardness = -heads.box_predictor(pooled)[0].log_softmax(dim=1)[:, 0]
    resized = [
        F.interpolate(image[None], size, mode="bilinear")[0].cpu()
        for image, size in zip(images, batch.image_sizes, strict=True)
    ]
    columns = (boxes, matches, matches.ious, matches.matched_idxs, hardness.split([len(each) for each in boxes]))
    return [
        MatchedProposals(image, target["boxes"].cpu(), *(each.cpu() for each in of_image))
        for image, target, *of_image in zip(resized, targets, *columns, strict=True)
    ]


def chosen_ious(
    proposals: MatchedProposals, balanced: IoUBalancedSampler, random: BalancedPositiveNegativeSampler, *, draws: int
) -> dict[str, Tensor]:
    """The IoUs of an image's negatives, by who chooses them: what figure 3 of Libra R-CNN shows.

    Args:
        proposals: of the image.
        balanced, random: the samplers to compare.
        draws: how often each sampler draws.

    Returns:
        dict[str, Tensor]: of ``all`` negatives, of the ``hard`` ones, the quarter with the highest classification loss,
        and of those in all draws of ``random`` and ``IoU-balanced`` sampling.
    """
    ious = proposals.ious
    negative = proposals.labels == 0
    hardest = proposals.hardness[negative].topk(math.ceil(HARD_SHARE * int(negative.sum()))).indices
    return {
        "all": ious[negative],
        "hard": ious[negative][hardest],
        "random": torch.cat([ious[draw_random(proposals, random)] for _ in range(draws)]),
        "IoU-balanced": torch.cat([ious[draw_balanced(proposals, balanced)] for _ in range(draws)]),
    }


def interval_shares(ious: Tensor, edges: Tensor) -> Tensor:
    """The share of the IoUs in each interval, closed below. [I]

    Args:
        ious: any number of them; of none the shares are 0. [M]
        edges: of the intervals, such as those of :func:`interval_edges`. What lies beyond the first or last edge is in
            the first or last interval. [I + 1]

    Example:
        >>> interval_shares(torch.tensor([0.0, 0.1, 0.2, 0.6]), torch.tensor([0.0, 0.2, 0.4]))
        tensor([0.5000, 0.5000])
    """
    counts = torch.bucketize(ious, edges[1:-1].contiguous(), right=True).bincount(minlength=len(edges) - 1)
    return counts / counts.sum().clamp(min=1)


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
    sampled, _, labels, wanted = heads.select_training_samples(_propose(model, batch, features, targets), targets)
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


def _propose(model: Any, batch: Any, features: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[Tensor]:
    """The proposals of a training step: in training the RPN proposes more."""
    was_training = model.rpn.training
    model.rpn.train()
    try:
        return model.rpn(batch, features, targets)[0]
    finally:
        model.rpn.train(was_training)


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


def bin_edges(sampler: IoUBalancedSampler) -> list[float]:
    """The IoUs at which the bins of a sampler begin, and the last one ends (without ``max_iou``, at 1). [K + 1]

    Example:
        >>> bin_edges(IoUBalancedSampler(num_bins=2, max_iou=0.5))
        [0.0, 0.25, 0.5]
    """
    low, high = sampler.floor_iou, 1.0 if sampler.max_iou is None else sampler.max_iou
    return [low + (high - low) * k / sampler.num_bins for k in range(sampler.num_bins + 1)]


def interval_edges(sampler: IoUBalancedSampler, at_least: int) -> Tensor:
    """Edges of intervals that cut every bin of a sampler into equally many, with one below its floor. [I + 1]

    Args:
        sampler: see :func:`bin_edges`.
        at_least: the number of intervals in all bins together.

    Example:
        >>> interval_edges(IoUBalancedSampler(num_bins=2, max_iou=0.5, floor_iou=0.1), at_least=4)
        tensor([0.0000, 0.1000, 0.2000, 0.3000, 0.4000, 0.5000])
    """
    parts = math.ceil(at_least / sampler.num_bins)
    starts, end = bin_edges(sampler)[:-1], bin_edges(sampler)[-1]
    width = (end - starts[0]) / sampler.num_bins / parts
    edges = [start + width * i for start in starts for i in range(parts)] + [end]
    return torch.tensor([0.0, *edges] if starts[0] > 0 else edges)


def draw_balanced(proposals: MatchedProposals, sampler: IoUBalancedSampler) -> Tensor:
    """Returns a mask of the negatives of one draw. [M]"""
    return sampler([proposals.labels], [proposals.ious], [proposals.matched_idxs])[1][0]


def draw_random(proposals: MatchedProposals, sampler: BalancedPositiveNegativeSampler) -> Tensor:
    """Returns a mask of the negatives of one draw. [M]"""
    return sampler([proposals.labels])[1][0].bool()
