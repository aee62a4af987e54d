"""Proposal recall: the share of objects that the best proposals of an image cover, whatever their category."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from balanced_learning.training.data.coco import Split
from balanced_learning.training.evaluation import Evaluation, evaluate_detections
from balanced_learning.training.tide import MAX_DETECTIONS

LIMITS = (100, 300, 1000)  # proposals of an image
IOU_THRESHOLDS = torch.from_numpy(np.linspace(0.5, 0.95, 10))  # COCO's; torch's linspace has another 0.8
_LARGEST_AREA = 1e10  # of an object that COCO counts, in square pixels


def proposal_recall(split: Split, proposals: dict[int, dict[str, Tensor]]) -> dict[str, float | None]:
    """Computes the average recall ``AR100``, ``AR300`` and ``AR1000`` of table 3.

    At each IoU threshold from 0.5 to 0.95, the best proposals take objects as detections do in COCO's evaluation: one
    after the other, each the object of largest IoU that is left, if that reaches the threshold. Recall is the share
    of all objects that are taken, crowds left out; AR its mean over the thresholds.

    Args:
        split: the ground truth.
        proposals: by image id: ``boxes`` (xyxy in pixels), from the highest score on.

    Returns:
        dict: AR by name; None where there is no object.
    """
    taken = np.zeros((len(LIMITS), len(IOU_THRESHOLDS)), np.int64)
    objects = 0
    columns = split.columns
    for position, image_id in enumerate(columns.image_ids.tolist()):
        rows = columns.boxes_of(position)
        is_object = ~columns.crowds[rows] & (columns.areas[rows] >= 0) & (columns.areas[rows] <= _LARGEST_AREA)
        xywh = torch.from_numpy(columns.boxes[rows][is_object])
        objects += len(xywh)
        if len(xywh) and image_id in proposals:
            gt_boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
            taken += _taken(gt_boxes, proposals[image_id])
    recalls = taken.mean(axis=1) / max(1, objects)
    return {f"AR{limit}": float(recalls[i]) if objects else None for i, limit in enumerate(LIMITS)}


def evaluate_proposals(
    split: Split, proposals: dict[int, dict[str, Tensor]], label_of: dict[int, int], backend: str
) -> Evaluation:
    """Evaluates proposals as detections, of which COCO counts 100 of an image, and by their recall."""
    evaluation = evaluate_detections(split, best_of(proposals, MAX_DETECTIONS), label_of, backend)
    return replace(evaluation, metrics=evaluation.metrics | proposal_recall(split, proposals))


def best_of(proposals: dict[int, dict[str, Tensor]], limit: int) -> dict[int, dict[str, Tensor]]:
    """The proposals of highest score in each image. They are in that order already."""
    return {id: {name: values[:limit] for name, values in image.items()} for id, image in proposals.items()}


def _taken(gt_boxes: Tensor, proposals: dict[str, Tensor]) -> np.ndarray:
    """How many ground truths the first proposals take: by limit and threshold. [L, T]"""
    boxes = proposals["boxes"][: max(LIMITS)]
    ious = box_iou(boxes.double(), gt_boxes)  # [P, G]
    covering = torch.where((ious >= IOU_THRESHOLDS[0]).any(dim=1))[0]  # others take nothing at any threshold
    thresholds = IOU_THRESHOLDS[:, None]
    is_left = torch.ones(len(IOU_THRESHOLDS), len(gt_boxes), dtype=torch.bool)  # [T, G]
    takes = torch.zeros(len(boxes), len(IOU_THRESHOLDS), dtype=torch.int64)
    for rank in covering.tolist():
        left = torch.where(is_left & (ious[rank] >= thresholds), ious[rank], -1.0)
        best = left.flip(1).argmax(dim=1)  # of equals the last, as in COCO
        best = len(gt_boxes) - 1 - best
        does_take = left.gather(1, best[:, None])[:, 0] >= 0
        takes[rank] = does_take
        is_left[does_take, best[does_take]] = False
    before = torch.cat([takes.new_zeros(1, takes.shape[1]), takes.cumsum(dim=0)])
    return before[[min(limit, len(boxes)) for limit in LIMITS]].numpy()
