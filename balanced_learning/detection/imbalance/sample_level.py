"""The sample level: which negatives a step of training could choose, and which it does."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from ...samplers import IoUBalancedSampler
from .step import propose

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
    proposals = propose(model, batch, features, targets)
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


@dataclass(frozen=True)
class SampleLevel:
    """How balanced the negatives are that a second stage samples, and what IoU-balanced sampling changes.

    Shares are from 0 to 1. Of no images all of them are NaN, except those in intervals, which are 0.
    """

    images: int
    edges: Tensor  # of the intervals of IoU, [I + 1]: those of interval_edges
    shares: dict[str, Tensor]  # in each interval [I], of the negatives of all images together: see chosen_ious
    above: dict[str, float]  # the share above IoU 0.05 of the same, NaN where there are none
    few_candidates: float  # of the images: their negatives are no more than are sampled, so all are taken either way
    empty_bins: list[float]  # for each bin of the balanced sampler, the share of the images without a negative in it
    changed: float  # of the sampled negatives, how many are others when sampling is balanced; mean of the images


class SampleMeter:
    """Measures :class:`SampleLevel` of an R-CNN, batch by batch.

    Args:
        model (FasterRCNN): torchvision's own, or after :func:`~balanced_learning.detection.apply_libra`.
        balanced, random: the samplers to compare.
        draws: how often each sampler draws, for the shares.
    """

    def __init__(
        self, model: Any, balanced: IoUBalancedSampler, random: BalancedPositiveNegativeSampler, draws: int = 20
    ) -> None: ...

    def add(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
        """Measures a batch: images in [0, 1], and torchvision's targets, on the device of the model."""
        raise NotImplementedError

    def result(self) -> SampleLevel:
        """Of all batches so far."""
        raise NotImplementedError
