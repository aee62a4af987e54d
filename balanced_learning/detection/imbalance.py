"""Measurements of the imbalances that Libra R-CNN is about, of a detector on images."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from ..samplers import IoUBalancedSampler


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
    was_training = model.rpn.training
    model.rpn.train()  # in training it proposes more
    batch, targets = model.transform(images, targets)
    features = model.backbone(batch.tensors)
    proposals, _ = model.rpn(batch, features, targets)
    model.rpn.train(was_training)
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


def negative_iou_shares(
    proposals: list[MatchedProposals],
    balanced: IoUBalancedSampler,
    random: BalancedPositiveNegativeSampler,
    *,
    edges: Tensor,
    draws: int,
) -> dict[str, Tensor]:
    """The share of negatives in each interval of IoU, figure 3 of Libra R-CNN.

    Args:
        proposals: of some images.
        balanced, random: the samplers to compare.
        edges: of the intervals, closed below, such as those of :func:`interval_edges`. What lies beyond the first or
            last edge is in the first or last interval. [I + 1]
        draws: how many of each sampler are averaged.

    Returns:
        dict[str, Tensor[I]]: of ``all`` negatives, of the ``hard`` ones (those of highest classification loss,
        ``batch_size_per_image`` in each image), and of those that ``random`` and ``IoU-balanced`` sampling chooses.
    """
    chosen: dict[str, list[Tensor]] = {"all": [], "hard": [], "random": [], "IoU-balanced": []}
    for each in proposals:
        negative = each.labels == 0
        hardest = each.hardness[negative].topk(min(balanced.batch_size_per_image, int(negative.sum()))).indices
        chosen["all"].append(each.ious[negative])
        chosen["hard"].append(each.ious[negative][hardest])
        for _ in range(draws):
            chosen["random"].append(each.ious[draw_random(each, random)])
            chosen["IoU-balanced"].append(each.ious[draw_balanced(each, balanced)])
    shares = {}
    for name, ious in chosen.items():
        interval = torch.bucketize(torch.cat(ious), edges[1:-1].contiguous(), right=True)
        counts = interval.bincount(minlength=len(edges) - 1)
        shares[name] = counts / counts.sum().clamp(min=1)
    return shares


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
