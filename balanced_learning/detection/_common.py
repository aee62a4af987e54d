"""What the stages of a detector share: matching that keeps the IoU, and a box loss summed whatever its reduction."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou


class Matches(NamedTuple):
    """What the boxes of a batch were matched to: one tensor an image, M boxes in each."""

    labels: list[Tensor]  # int64 [M]: -1 ignored, 0 background, > 0 the label of the ground truth
    ious: list[Tensor]  # [M]: the best IoU with any ground truth
    matched_idxs: list[Tensor]  # int64 [M]: index of the ground truth; 0 where there is none
    matched_boxes: list[Tensor]  # [M, 4]: the ground truth of that index; 0 in an image that has none


def match(matcher: Matcher, boxes: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]) -> Matches:
    """Matches the boxes of B images at once as torchvision does one by one, and keeps the IoU that decides.

    It never waits for the device. The IoUs of all images fill one matrix: B x the most ground truths x the most boxes.

    Args:
        matcher (Matcher): torchvision's, with the thresholds of the stage.
        boxes (list[Tensor[M, 4]]): proposals or anchors, xyxy in pixels.
        gt_boxes (list[Tensor[G, 4]]): ground truth, xyxy in pixels. G may be 0.
        gt_labels (list[Tensor[G]]): labels, at least 0.
    """
    sizes, num_gts = [len(image) for image in boxes], [len(image) for image in gt_boxes]
    # One more than there are, which is cut off, so that there is always one to take the maximum over.
    padded_gt_boxes = pad_sequence([*gt_boxes, gt_boxes[0].new_zeros(1, 4)], batch_first=True)[:-1]  # [B, G, 4]
    padded_gt_labels = pad_sequence([*gt_labels, gt_labels[0].new_zeros(1)], batch_first=True, padding_value=-1)[:-1]
    is_padding = (padded_gt_labels < 0)[..., None]
    quality = box_iou(padded_gt_boxes, pad_sequence(boxes, batch_first=True))  # [B, G, M]
    if min(num_gts) < quality.shape[1]:
        quality.masked_fill_(is_padding, 0)  # and not 0 / 0
    ious, matched_idxs = quality.max(dim=1)
    matched = ious >= matcher.high_threshold
    if matcher.allow_low_quality_matches:  # also the best boxes of each ground truth
        best = quality.amax(dim=2, keepdim=True).masked_fill(is_padding, 2)
        matched |= (quality == best).any(dim=1)
    background = torch.where(ious < matcher.low_threshold, 0, -1)
    labels = torch.where(matched, padded_gt_labels.gather(1, matched_idxs), background)
    matched_idxs = torch.where(matched, matched_idxs, 0)
    image = torch.arange(len(boxes), device=ious.device)[:, None]
    padded = (labels, ious, matched_idxs, padded_gt_boxes[image, matched_idxs])
    return Matches(*([row[:size] for row, size in zip(column, sizes, strict=True)] for column in padded))


def summed_loss(box_loss: nn.Module, input: Tensor, target: Tensor) -> Tensor:
    """The sum of a loss over all elements: what it is divided by is the model's affair, not the loss's."""
    if input.numel() == 0:
        return input.sum()
    loss = box_loss(input, target)
    return loss * input.numel() if box_loss.reduction == "mean" else loss.sum()
