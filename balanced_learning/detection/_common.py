"""What the stages of a detector share: matching that keeps the IoU, and a box loss summed whatever its reduction."""

from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


# The IoUs that are held at a time, unless those of one image are more.
_MAX_IOUS = 2**21
_PADDING = torch.iinfo(torch.int64).min


def match(matcher: Matcher, boxes: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]) -> Matches:
    """Matches the boxes of a batch as torchvision does image by image, and keeps the IoU that decides.

    Images are matched together as far as memory allows. It never waits for the device.

    Args:
        matcher (Matcher): torchvision's, with the thresholds of the stage.
        boxes (list[Tensor[M, 4]]): proposals or anchors, xyxy in pixels.
        gt_boxes (list[Tensor[G, 4]]): ground truth, xyxy in pixels. G may be 0.
        gt_labels (list[Tensor[G]]): int64 labels.
    """
    ious_of_image = max(1, max(map(len, boxes)) * max(map(len, gt_boxes)))
    step = max(1, _MAX_IOUS // ious_of_image)
    parts = [
        _match_together(matcher, boxes[i : i + step], gt_boxes[i : i + step], gt_labels[i : i + step])
        for i in range(0, len(boxes), step)
    ]
    return Matches(*(list(chain(*column)) for column in zip(*parts, strict=True)))


def _match_together(
    matcher: Matcher, boxes: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
) -> tuple[list[Tensor], ...]:
    padded_gt_boxes, padded_gt_labels = _pad(gt_boxes), _pad(gt_labels, _PADDING)  # [B, G, 4], [B, G]
    if padded_gt_labels.shape[1] == 0:
        padded_gt_boxes = F.pad(padded_gt_boxes, (0, 0, 0, 1))
        padded_gt_labels = F.pad(padded_gt_labels, (0, 1), value=_PADDING)
    is_padding = (padded_gt_labels == _PADDING)[..., None]
    quality = box_iou(padded_gt_boxes, _pad(boxes))  # [B, G, M]
    if min(map(len, gt_boxes)) < quality.shape[1]:
        quality.masked_fill_(is_padding, 0)  # and not 0 / 0
    ious, matched_idxs = quality.max(dim=1)
    matched = ious >= matcher.high_threshold
    if matcher.allow_low_quality_matches and quality.shape[2]:  # also the best boxes of each ground truth
        best = quality.amax(dim=2, keepdim=True).masked_fill(is_padding, 2)
        matched |= (quality == best).any(dim=1)
    unmatched = (ious < matcher.low_threshold).long() - 1  # 0 background, -1 ignored
    labels = torch.where(matched, padded_gt_labels.gather(1, matched_idxs), unmatched)
    matched_idxs = matched_idxs * matched
    image = torch.arange(len(boxes), device=ious.device)[:, None]
    padded = (labels, ious, matched_idxs, padded_gt_boxes[image, matched_idxs])
    return tuple([row[: len(own)] for row, own in zip(column, boxes, strict=True)] for column in padded)


def _pad(images: list[Tensor], value: int = 0) -> Tensor:
    """One tensor of all, with the value where others are longer."""
    return images[0][None] if len(images) == 1 else pad_sequence(images, batch_first=True, padding_value=value)


def summed_loss(box_loss: nn.Module, input: Tensor, target: Tensor) -> Tensor:
    """The sum of a loss over all elements: what it is divided by is the model's affair, not the loss's."""
    if input.numel() == 0:
        return input.sum()
    loss = box_loss(input, target)
    return loss * input.numel() if box_loss.reduction == "mean" else loss.sum()
