"""A training step of a detector, taken apart to be measured; the detector is afterwards as before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.ops import MultiScaleRoIAlign, box_iou

from ..matching import Matches, match

Targets = list[dict[str, Tensor]]


def check_detector(model: Any, *kinds: type) -> None:
    """Raises a TypeError unless the model is of one of these kinds."""
    if not isinstance(model, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"model must be a {names} of torchvision.models.detection, got {type(model).__name__}")


@contextmanager
def in_evaluation(model: Any) -> Iterator[None]:
    """Puts a detector into evaluation mode and then back into its own, each module by itself, whatever happens.

    Poolers forget again what they infer from the first images that they see.
    """
    modes = {module: module.training for module in model.modules()}
    inferred = {pool: (pool.scales, pool.map_levels) for pool in modes if isinstance(pool, MultiScaleRoIAlign)}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for pool, (scales, map_levels) in inferred.items():
            pool.scales, pool.map_levels = scales, map_levels


@torch.no_grad()
def propose(model: FasterRCNN, batch: Any, features: dict[str, Tensor], targets: Targets) -> list[Tensor]:
    """The proposals of a training step, of which there are more than in evaluation. The modules inside stay as set."""
    rpn: Any = model.rpn
    was_training = rpn.training
    rpn.training = True
    try:
        return rpn(batch, features, targets)[0]
    finally:
        rpn.training = was_training


def find_candidates(model: FasterRCNN, proposals: list[Tensor], targets: Targets) -> tuple[list[Tensor], Matches]:
    """The boxes that the second stage samples from, proposals and ground truths, and what they are matched to."""
    heads: Any = model.roi_heads
    gt_boxes = [target["boxes"].to(proposals[0].dtype) for target in targets]
    boxes = heads.add_gt_proposals(proposals, gt_boxes)
    return boxes, match(box_iou, heads.proposal_matcher, boxes, gt_boxes, [target["labels"] for target in targets])


def positive_anchors(model: RetinaNet, anchors: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The indices of the anchors [A, 4] that are positive, and of the ground truth of each. int64 [P], [P]"""
    if not len(target["boxes"]):
        nothing = torch.zeros(0, dtype=torch.int64, device=anchors.device)
        return nothing, nothing
    matched_idxs = model.proposal_matcher(box_iou(target["boxes"], anchors))
    positive = torch.where(matched_idxs >= 0)[0]
    return positive, matched_idxs[positive]
