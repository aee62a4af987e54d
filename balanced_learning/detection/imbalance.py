"""Measurements of the imbalances that Libra R-CNN is about, of a detector on images."""

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
    intervals: int,
    draws: int,
) -> dict[str, Tensor]:
    """The share of negatives in each interval of IoU, figure 3 of Libra R-CNN.

    Args:
        proposals: of some images.
        balanced, random: the samplers to compare.
        intervals: how many equal ones ``[0, max_iou]`` is divided into. What lies above is in the last.
        draws: how many of each sampler are averaged.

    Returns:
        dict[str, Tensor[intervals]]: of ``all`` negatives, of the ``hard`` ones (those of highest classification loss,
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
    top = balanced.max_iou or 1.0
    counts = {name: torch.cat(ious).clamp(max=top).histc(intervals, 0, top) for name, ious in chosen.items()}
    return {name: count / count.sum().clamp(min=1) for name, count in counts.items()}


def draw_balanced(proposals: MatchedProposals, sampler: IoUBalancedSampler) -> Tensor:
    """Returns a mask of the negatives of one draw. [M]"""
    return sampler([proposals.labels], [proposals.ious], [proposals.matched_idxs])[1][0]


def draw_random(proposals: MatchedProposals, sampler: BalancedPositiveNegativeSampler) -> Tensor:
    """Returns a mask of the negatives of one draw. [M]"""
    return sampler([proposals.labels])[1][0].bool()
