"""Matching of boxes and ground truth that keeps the IoU."""

from collections.abc import Callable
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou


class Matches(list[Tensor]):
    """The labels of a batch of boxes, as torchvision's samplers take them, and what each box was matched to.

    A list with one tensor [M] an image: -1 ignored, 0 background, > 0 the label of the ground truth. Each attribute is
    such a list, too.

    Attributes:
        ious (list[Tensor[M]]): the best IoU with any ground truth; 0 in an image that has none.
        matched_idxs (list[Tensor[M]]): int64, index of the ground truth; 0 where there is none.
        matched_boxes (list[Tensor[M, 4]]): the ground truth of that index; 0 in an image that has none.
    """

    def __init__(
        self, labels: list[Tensor], ious: list[Tensor], matched_idxs: list[Tensor], matched_boxes: list[Tensor]
    ) -> None:
        super().__init__(labels)
        self.ious = ious
        self.matched_idxs = matched_idxs
        self.matched_boxes = matched_boxes


# The IoUs that are held at a time, unless those of one image are more.
_MAX_IOUS = 2**21
# The label of what only fills up an image: exact in int64 and in float32.
_PADDING = torch.iinfo(torch.int64).min


def match(
    similarity: Callable[[Tensor, Tensor], Tensor],
    matcher: Callable[[Tensor], Tensor],
    boxes: list[Tensor],
    gt_boxes: list[Tensor],
    gt_labels: list[Tensor],
) -> Matches:
    """Matches the boxes of a batch as torchvision does image by image, and keeps their IoU.

    With torchvision's own similarity and matcher, images are matched together as far as memory allows, without waiting
    for the device.

    Args:
        similarity (callable): maps boxes [G, 4] and [M, 4] to what the matcher decides on, [G, M]; usually
            :func:`torchvision.ops.box_iou`.
        matcher (callable): maps that to int64 [M]: the index of a ground truth, -1 for background, -2 for a box to
            ignore; usually torchvision's ``Matcher``.
        boxes (list[Tensor[M, 4]]): proposals or anchors, xyxy in pixels.
        gt_boxes (list[Tensor[G, 4]]): ground truth, xyxy in pixels. G may be 0.
        gt_labels (list[Tensor[G]]): their labels, in the type that those of the boxes shall have.

    Returns:
        Matches: a label [M] for each box of each image, with the IoU, the index and the ground truth it belongs to.
    """
    is_stock = type(matcher) is Matcher and similarity is box_iou
    if is_stock and _is_complete(boxes, gt_boxes, gt_labels):
        step = max(1, _MAX_IOUS // max(1, max(map(len, boxes)) * max(map(len, gt_boxes))))
        parts = [
            _match_together(matcher, boxes[i : i + step], gt_boxes[i : i + step], gt_labels[i : i + step])
            for i in range(0, len(boxes), step)
        ]
        return Matches(*(list(chain(*column)) for column in zip(*parts, strict=True)))
    images = zip(boxes, gt_boxes, gt_labels, strict=False)  # torchvision, too, stops at the shortest
    rows = [_match_image(similarity, matcher, *image) for image in images]
    return Matches(*map(list, zip(*rows, strict=True))) if rows else Matches([], [], [], [])


def _is_complete(boxes: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]) -> bool:
    """Whether every image has boxes, and every ground truth one label."""
    return (
        len(boxes) == len(gt_boxes) > 0
        and all(map(len, boxes))
        and all(labels.shape == image.shape[:1] for image, labels in zip(gt_boxes, gt_labels, strict=True))
    )


def _match_image(
    similarity: Callable[[Tensor, Tensor], Tensor],
    matcher: Callable[[Tensor], Tensor],
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
) -> tuple[Tensor, ...]:
    if gt_boxes.numel() == 0:
        ious = boxes.new_zeros(len(boxes))
        return ious.to(gt_labels.dtype), ious, ious.long(), torch.zeros_like(boxes)
    matched_idxs = matcher(similarity(gt_boxes, boxes))
    labels = gt_labels[matched_idxs.clamp(min=0)]
    labels = labels.masked_fill(matched_idxs == Matcher.BELOW_LOW_THRESHOLD, 0)
    labels = labels.masked_fill(matched_idxs == Matcher.BETWEEN_THRESHOLDS, -1)
    matched_idxs = matched_idxs.clamp(min=0)
    return labels, box_iou(gt_boxes, boxes).amax(dim=0), matched_idxs, gt_boxes[matched_idxs]


def _match_together(
    matcher: Matcher, boxes: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
) -> tuple[list[Tensor], ...]:
    padded_gt_boxes, padded_gt_labels = _pad(gt_boxes), _pad(gt_labels, _PADDING)  # [B, G, 4], [B, G]
    if padded_gt_labels.shape[1] == 0:
        padded_gt_boxes = F.pad(padded_gt_boxes, (0, 0, 0, 1))
        padded_gt_labels = F.pad(padded_gt_labels, (0, 1), value=_PADDING)
    quality = box_iou(padded_gt_boxes, _pad(boxes))  # [B, G, M]
    is_padded = min(map(len, gt_boxes)) < quality.shape[1]
    if is_padded:
        is_padding = (padded_gt_labels == _PADDING)[..., None]
        quality.masked_fill_(is_padding, 0)  # and not 0 / 0
    ious, matched_idxs = quality.max(dim=1)
    matched = ious >= matcher.high_threshold
    if matcher.allow_low_quality_matches:  # also the best boxes of each ground truth
        best = quality.amax(dim=2, keepdim=True)
        if is_padded:
            best.masked_fill_(is_padding, 2)
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
