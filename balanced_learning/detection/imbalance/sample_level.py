"""The sample level: which negatives a step of training could choose, and which it does."""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from ...samplers import IoUBalancedSampler
from .expected_draws import (
    changed_share,
    count_in_bins,
    expected_of_balanced,
    expected_of_random,
    negatives_wanted,
)
from .step import check_detector, find_candidates, in_evaluation, propose

HARD_SHARE = 1 / 4  # of the negatives: of 2,000 proposals about the 512 that hard example mining would take
LOW_IOU = 0.05  # the paper counts hard and sampled negatives above it
INTERVALS = 10  # of a histogram of IoUs, or more: they cut every bin into equally many
GROUPS = ("all", "hard", "random", "IoU-balanced")  # of negatives, by who chooses them


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
    """Finds the boxes that one training step of an R-CNN would sample from.

    Batch norm and dropout are as in evaluation, and the model is afterwards as before.

    Args:
        model (FasterRCNN): torchvision's own, or after :func:`~balanced_learning.detection.apply_libra`.
        images (list[Tensor[3, H, W]]): in [0, 1], on the device of the model.
        targets (list[dict]): torchvision's, with ``boxes`` and ``labels``.
    """
    with in_evaluation(model):
        batch, targets = model.transform(images, targets)
        features = model.backbone(batch.tensors)
        boxes, matches = find_candidates(model, propose(model, batch, features, targets), targets)
        heads = model.roi_heads
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
    of_random = torch.cat([ious[draw_random(proposals, random)] for _ in range(draws)])
    of_balanced = torch.cat([ious[draw_balanced(proposals, balanced)] for _ in range(draws)])
    groups = ious[negative], ious[negative][hardest], of_random, of_balanced
    return dict(zip(GROUPS, groups, strict=True))


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
    return _shares(_count_in_intervals(ious, edges))


def _count_in_intervals(ious: Tensor, edges: Tensor) -> Tensor:
    return torch.bucketize(ious, edges[1:-1].contiguous(), right=True).bincount(minlength=len(edges) - 1)


def _shares(counts: Tensor) -> Tensor:
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

    All are shares from 0 to 1. An image without negatives has too few candidates, all bins empty and nothing changed;
    of no images at all, ``few_candidates``, ``empty_bins`` and ``changed`` are NaN.
    """

    images: int
    edges: Tensor  # of the intervals of IoU, [I + 1]: those of interval_edges
    shares: dict[str, Tensor]  # in each interval [I], of chosen_ious in all images; 0 if there are none
    above: dict[str, float]  # above LOW_IOU, of the same; NaN if there are none
    few_candidates: float  # of the images: their negatives are no more than are sampled, so all are taken either way
    empty_bins: list[float]  # for each bin of the balanced sampler, of the images: they have no negative in it
    changed: float  # of an image's sampled negatives, on average: they change when sampling is balanced


class SampleMeter:
    """Measures :class:`SampleLevel` of an R-CNN, batch by batch, and leaves the model as it is.

    ``changed`` is exact: half the sum over the bins of the differences between the shares of the sampled negatives that
    each sampler is expected to take from there. The other shares are of all negatives and of ``draws`` draws.

    Args:
        model (FasterRCNN): torchvision's own, or after :func:`~balanced_learning.detection.apply_libra`.
        balanced, random: the samplers to compare.
        draws: how often each sampler draws from the candidates of an image.

    Raises:
        TypeError: for a model of another type.
    """

    def __init__(
        self, model: Any, balanced: IoUBalancedSampler, random: BalancedPositiveNegativeSampler, draws: int = 20
    ) -> None:
        check_detector(model, FasterRCNN)
        self.model = model
        self.balanced, self.random, self.draws = balanced, random, draws
        self.edges = interval_edges(balanced, at_least=INTERVALS)
        self._counts = {name: torch.zeros(len(self.edges) - 1, dtype=torch.int64) for name in GROUPS}
        self._above = dict.fromkeys(GROUPS, 0)
        self._few: list[bool] = []  # of each image, as the following
        self._empty: list[Tensor] = []
        self._changed: list[float] = []

    def add(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
        """Measures a batch: images in [0, 1], and torchvision's targets, on the device of the model."""
        for proposals in match_proposals(self.model, images, targets):
            for name, ious in chosen_ious(proposals, self.balanced, self.random, draws=self.draws).items():
                self._counts[name] += _count_in_intervals(ious, self.edges)
                self._above[name] += int((ious > LOW_IOU).sum())
            self._add_expected(proposals)

    def _add_expected(self, proposals: MatchedProposals) -> None:
        candidates = count_in_bins(self.balanced, proposals.ious, proposals.labels == 0)
        num_positives = int((proposals.labels > 0).sum())
        of_random, of_balanced = (negatives_wanted(each, num_positives) for each in (self.random, self.balanced))
        self._few.append(int(candidates.sum()) <= min(of_random, of_balanced))
        self._empty.append(candidates[1:] == 0)
        expected = expected_of_balanced(self.balanced, candidates, of_balanced)
        self._changed.append(changed_share(expected_of_random(candidates, of_random), expected))

    def result(self) -> SampleLevel:
        """Of all batches so far."""
        totals = {name: int(counts.sum()) for name, counts in self._counts.items()}
        empty = torch.stack(self._empty) if self._empty else torch.zeros(0, self.balanced.num_bins)
        return SampleLevel(
            images=len(self._few),
            edges=self.edges,
            shares={name: _shares(counts) for name, counts in self._counts.items()},
            above={name: count / totals[name] if totals[name] else math.nan for name, count in self._above.items()},
            few_candidates=fmean(self._few) if self._few else math.nan,
            empty_bins=empty.double().mean(dim=0).tolist(),
            changed=fmean(self._changed) if self._changed else math.nan,
        )
