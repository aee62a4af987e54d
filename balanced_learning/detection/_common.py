"""What the stages of a detector share: matching that keeps the IoU, and a box loss summed whatever its reduction."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou


class Match(NamedTuple):
    """The ground truth each of M boxes of an image was matched to."""

    labels: Tensor  # int64 [M]: -1 ignored, 0 background, > 0 the label of the ground truth
    ious: Tensor  # [M]: the best IoU with any ground truth
    matched_idxs: Tensor  # int64 [M]: index of the ground truth; 0 where there is none


def match(matcher: Matcher, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Match:
    """Matches the boxes of an image as torchvision does, and keeps the IoU that the matcher decided by.

    Args:
        matcher (Matcher): torchvision's, with the thresholds of the stage.
        boxes (Tensor[M, 4]): proposals or anchors, xyxy in pixels.
        gt_boxes (Tensor[G, 4]): ground truth, xyxy in pixels. G may be 0.
        gt_labels (Tensor[G]): labels, > 0.
    """
    if gt_boxes.numel() == 0 or boxes.numel() == 0:
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return Match(nothing, torch.zeros(len(boxes), dtype=boxes.dtype, device=boxes.device), nothing)
    quality = box_iou(gt_boxes, boxes)  # [G, M]
    matched_idxs = matcher(quality)
    labels = gt_labels[matched_idxs.clamp(min=0)].to(torch.int64)
    labels[matched_idxs == matcher.BELOW_LOW_THRESHOLD] = 0
    labels[matched_idxs == matcher.BETWEEN_THRESHOLDS] = -1
    return Match(labels, quality.amax(dim=0), matched_idxs.clamp(min=0))


def summed_loss(box_loss: nn.Module, input: Tensor, target: Tensor) -> Tensor:
    """The sum of a loss over all elements: what it is divided by is the model's affair, not the loss's."""
    if input.numel() == 0:
        return input.sum()
    loss = box_loss(input, target)
    return loss * input.numel() if box_loss.reduction == "mean" else loss.sum()
