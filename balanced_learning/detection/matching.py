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
    a list with one tensor an image, too.

    Attributes:
        ious (list[Tensor[M]]): the best IoU with any ground truth; 0 in an image that has none.
        matched_idxs (list[Tensor[M]]): int64, index of the ground truth; 0 where there is none.
        gt_boxes (list[Tensor[G, 4]]): all ground truths of the image.
    """

    def __init__(
        self, labels: list[Tensor], ious: list[Tensor], matched_idxs: list[Tensor], gt_boxes: list[Tensor]
    ) -> None:
        super().__init__(labels)
        self.ious = ious
        self.matched_idxs = matched_idxs
        self.gt_boxes = gt_boxes

    @property
    def matched_boxes(self) -> list[Tensor]:
        """The ground truth [M, 4] of each box; 0 in an image that has none."""
        return take_matched(self.gt_boxes, self.matched_idxs)


def take_matched(gt_boxes: list[Tensor], matched_idxs: list[Tensor]) -> list[Tensor]:
    """The ground truths [M, 4] with the indices [M] of each image; 0 in an image that has none."""
    images = zip(gt_boxes, matched_idxs, strict=False)
    return [boxes.index_select(0, idxs) if len(boxes) else boxes.new_zeros(len(idxs), 4) for boxes, idxs in images]


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
        labels, ious, matched_idxs = (list(chain(*column)) for column in zip(*parts, strict=True))
        return Matches(labels, ious, matched_idxs, gt_boxes)
    images = zip(boxes, gt_boxes, gt_labels, strict=False)  # torchvision, too, stops at the shortest
    rows = [_match_image(similarity, matcher, *image) for image in images]
    labels, ious, matched_idxs = map(list, zip(*rows, strict=True)) if rows else ([], [], [])
    return Matches(labels, ious, matched_idxs, gt_boxes)


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
) -> tuple[Tensor, Tensor, Tensor]:
    if gt_boxes.numel() == 0:
        ious = boxes.new_zeros(len(boxes))
        return ious.to(gt_labels.dtype), ious, ious.long()
    matched_idxs = matcher(similarity(gt_boxes, boxes))
    labels = gt_labels[matched_idxs.clamp(min=0)]
    labels = labels.masked_fill(matched_idxs == Matcher.BELOW_LOW_THRESHOLD, 0)
    labels = labels.masked_fill(matched_idxs == Matcher.BETWEEN_THRESHOLDS, -1)
    return labels, box_iou(gt_boxes, boxes).amax(dim=0), matched_idxs.clamp(min=0)


def _match_together(
    matcher: Matcher, boxes: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
) -> tuple[list[Tensor], ...]:
    padded_gt_boxes, padded_gt_labels = _pad(gt_boxes), _pad(gt_labels, _PADDING)  # [B, G, 4], [B, G]
    if padded_gt_labels.shape[1] == 0:
        padded_gt_boxes = F.pad(padded_gt_boxes, (0, 0, 0, 1))
        padded_gt_labels = F.pad(padded_gt_labels, (0, 1), value=_PADDING)
    quality = _box_iou(padded_gt_boxes, _pad(boxes))  # [B, G, M]
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
    unmatched = torch.where(ious < matcher.low_threshold, 0, -1)  # background, ignored
    labels = torch.where(matched, padded_gt_labels.gather(1, matched_idxs), unmatched)
    if not all(map(len, gt_boxes)):
        labels.masked_fill_(is_padding.all(dim=1), 0)  # all is background, whatever the thresholds
    padded = (labels, ious, matched_idxs * matched)
    return tuple([row[: len(own)] for row, own in zip(column, boxes, strict=True)] for column in padded)


def _box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """What :func:`torchvision.ops.box_iou` computes of [B, N, 4] and [B, M, 4], to the last bit.

    Sooner and in less memory, as its operations run along M and not along pairs of coordinates.
    """
    if boxes1.dtype.itemsize < 4 or boxes2.dtype.itemsize < 4:
        return box_iou(boxes1, boxes2)  # in a wider type, which holds the areas
    left1, top1, right1, bottom1 = boxes1[..., None].unbind(dim=2)  # [B, N, 1]
    left2, top2, right2, bottom2 = boxes2.mT.contiguous()[:, None].unbind(dim=2)  # [B, 1, M]
    width = torch.minimum(right1, right2).sub_(torch.maximum(left1, left2)).clamp_(min=0)
    height = torch.minimum(bottom1, bottom2).sub_(torch.maximum(top1, top2)).clamp_(min=0)
    intersection = width.mul_(height)
    areas = (right1 - left1) * (bottom1 - top1) + (right2 - left2) * (bottom2 - top2)
    return intersection.div_(areas.sub_(intersection))


def _pad(images: list[Tensor], value: int = 0) -> Tensor:
    """One tensor of all, with the value where others are longer."""
    return images[0][None] if len(images) == 1 else pad_sequence(images, batch_first=True, padding_value=value)
