"""COCO's average precision of a set of detections, of each class, and what kinds of error it is lost to."""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from balanced_learning.training.data.coco import Split
from balanced_learning.training.errors import printable, warn
from balanced_learning.training.tide import MAX_DETECTIONS, RECALLS, Boxes, Errors, find_errors

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")  # the order of COCOeval's statistics


@dataclass(frozen=True)
class ErrorKind:
    """The number of errors of a kind, and their cost.

    Attributes:
        count: how many detections, or objects that were not found.
        dAP50: what AP50 would gain without them; None where there is no ground truth.
    """

    count: int
    dAP50: float | None  # noqa: N815 (as in the JSON)


@dataclass(frozen=True)
class ClassResult:
    """The result of a class.

    Attributes:
        id: of the category.
        name: of the category.
        objects: in the ground truth, without crowds.
        AP: over IoUs of 0.5 to 0.95; None where there is no ground truth.
        AP50: at an IoU of 0.5.
        errors: by kind; the costs of a kind, averaged over the classes, are those of all.
    """

    id: int
    name: str
    objects: int
    AP: float | None
    AP50: float | None
    errors: dict[str, ErrorKind]


@dataclass(frozen=True)
class Evaluation:
    """The metrics, the errors and the classes of an evaluation.

    Attributes:
        metrics: by the names of ``METRICS``; None where there is no ground truth of that size.
        errors: by kind, see :mod:`balanced_learning.training.tide`.
        classes: in the order of the categories.
    """

    metrics: dict[str, float | None]
    errors: dict[str, ErrorKind]
    classes: list[ClassResult]

    def row(self) -> dict[str, float | None]:
        """Flat, as metrics.jsonl and TensorBoard take it: the metrics, ``dAP50/<kind>`` and ``AP/<class>``."""
        names = [each.name for each in self.classes]
        costs = {f"dAP50/{kind}": error.dAP50 for kind, error in self.errors.items()}
        of_class = {
            f"AP/{printable(each.name)}" + (f" ({each.id})" if names.count(each.name) > 1 else ""): each.AP
            for each in self.classes
        }
        return self.metrics | costs | of_class

    def plain(self) -> dict[str, Any]:
        """All of it as JSON takes it, the metrics on top."""
        everything = asdict(self)
        return everything.pop("metrics") | everything


def coco_metrics(
    split: Split, detections: dict[int, dict[str, Tensor]], label_of: dict[int, int], backend: str
) -> dict[str, float | None]:
    """The metrics of :func:`evaluate_detections` alone."""
    return evaluate_detections(split, detections, label_of, backend).metrics


def evaluate_detections(
    split: Split,
    detections: dict[int, dict[str, Tensor]],
    label_of: dict[int, int],
    backend: str,
    *,
    limit: int | None = None,
) -> Evaluation:
    """Evaluates detections against the annotations, crowds included, as COCO does.

    Says on stderr how much can be reached where images have more objects than detections count.

    Args:
        split: the ground truth.
        detections: by image id: ``boxes`` (xyxy in pixels), ``scores`` and ``labels``.
        label_of: the model's label of each category id.
        backend: ``"faster-coco-eval"`` or ``"pycocotools"``.
        limit: the most that the detector returns of an image, all classes together.
    """
    truth, found = _ground_truth(split), _detections(split, detections, label_of)
    objects = np.bincount(truth.category[~truth.crowd], minlength=len(split.categories))
    _tell_limits(split, truth, limit)
    stats, precision = _coco_evaluation(split, truth, found, backend)
    errors = find_errors(truth, found, len(split.images), len(split.categories))
    classes = [
        ClassResult(
            category_id,
            name,
            int(objects[k]),
            _mean(precision[:, :, k]),
            _mean(precision[0, :, k]),
            _error_kinds(errors, slice(k, k + 1)),
        )
        for k, (category_id, name) in enumerate(split.categories.items())
    ]
    metrics = {name: _mean(stats[i]) for i, name in enumerate(METRICS)}
    return Evaluation(metrics, _error_kinds(errors, slice(None)), classes)


def key_metric(row: Mapping[str, object]) -> str:
    """The metric that the best epoch has most of: recall of proposals, AP of detections."""
    return "AR1000" if "AR1000" in row else "AP"


def detections_per_image(model: nn.Module) -> int | None:
    """The most boxes that a detector of torchvision returns of an image; None for a model of another kind."""
    limit = getattr(getattr(model, "roi_heads", model), "detections_per_img", None)
    return limit if isinstance(limit, int) else None


def _ground_truth(split: Split) -> Boxes:
    columns, ids = split.columns, np.array(list(split.categories))
    by_id = ids.argsort()
    return Boxes(
        image=columns.image_of_boxes(),
        category=by_id[np.searchsorted(ids, columns.category_ids, sorter=by_id)],
        box=np.asarray(columns.boxes),  # a mapped array is of a type that pycocotools does not take
        area=columns.areas,
        crowd=columns.crowds,
        score=np.ones(len(columns.boxes)),
    )


def _detections(split: Split, detections: dict[int, dict[str, Tensor]], label_of: dict[int, int]) -> Boxes:
    """The detections on the images of the split, without labels that mean none of its categories."""
    index_of = {label_of[category_id]: k for k, category_id in enumerate(split.categories) if category_id in label_of}
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    outputs = [detections.get(image_id, empty) for image_id in split.columns.image_ids.tolist()]
    boxes, scores, labels = (torch.cat([output[key].cpu().double() for output in outputs]) for key in empty)
    category = np.array([index_of.get(label, -1) for label in labels.long().tolist()], np.int64)
    box = box_convert(boxes, "xyxy", "xywh").numpy()
    found = Boxes(
        image=np.repeat(np.arange(len(outputs)), [len(output["boxes"]) for output in outputs]),
        category=category,
        box=box,
        area=box[:, 2] * box[:, 3],
        crowd=np.zeros(len(box), bool),
        score=scores.numpy(),
    )
    return found.take(category >= 0)


def _tell_limits(split: Split, truth: Boxes, limit: int | None) -> None:
    """Says how many objects must be missed because of COCO's limit, or the detector's if that costs more."""
    single = truth.take(~truth.crowd)
    num_categories = len(split.categories)
    pairs, counts = np.unique(single.image * num_categories + single.category, return_counts=True)
    beyond = np.maximum(counts - MAX_DETECTIONS, 0)
    of_image = np.bincount(single.image)
    beyond_detector = np.maximum(of_image - (limit or len(single)), 0)
    if beyond_detector.sum() > beyond.sum():
        told = (
            f"the detector returns at most {limit} boxes of an image, and images have up to {of_image.max()} objects: "
            f"{beyond_detector.sum()} of {len(single)} objects count as missed"
        )
    elif beyond.any():
        objects = np.bincount(pairs % num_categories, counts)
        missed = np.bincount(pairs % num_categories, beyond)
        recall = (objects - missed)[objects > 0] / objects[objects > 0]
        told = (
            f"COCO counts {MAX_DETECTIONS} detections of a class in an image, and images have up to {counts.max()} "
            f"objects of one: {beyond.sum()} of {len(single)} objects count as missed; AR100 is at most "
            f"{100 * recall.mean():.1f} and AP at most {100 * (RECALLS[:, None] <= recall).mean():.1f}"
        )
    else:
        return
    warn(f"{split.json_file}: {told}")


def _coco_evaluation(split: Split, truth: Boxes, found: Boxes, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """COCOeval's statistics, and its precision [10 IoUs, 101 recalls, K] over all areas; -1 where there is no truth."""
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress and a table
        evaluation = COCOeval(_index(COCO, split, truth), _index(COCO, split, found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats), evaluation.eval["precision"][:, :, :, 0, -1]


def _index(coco: Any, split: Split, boxes: Boxes) -> Any:
    """The API object over these boxes; everything is numbered from 1, for evaluators take id 0 for 'unmatched'."""
    columns = (boxes.image + 1, boxes.category + 1, boxes.box, boxes.area, boxes.crowd.astype(int), boxes.score)
    names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "score")
    rows = zip(range(1, len(boxes) + 1), *(column.tolist() for column in columns), strict=True)
    api = coco()
    api.dataset = {
        "images": [{"id": n} for n in range(1, len(split.images) + 1)],
        "categories": [{"id": n} for n in range(1, len(split.categories) + 1)],
        "annotations": [dict(zip(names, row, strict=True)) for row in rows],
    }
    api.createIndex()
    return api


def _mean(values: np.ndarray) -> float | None:
    """The mean of what COCOeval computed; None where it had no ground truth, which it gives as -1."""
    return float(values.mean()) if values.min() >= 0 else None


def _error_kinds(errors: Errors, classes: slice) -> dict[str, ErrorKind]:
    """The errors of some classes: the sum of the counts, and the mean of the costs where there is ground truth."""
    known = ~np.isnan(errors.ap50[classes])
    return {
        kind: ErrorKind(
            int(errors.counts[kind][classes].sum()),
            float(errors.costs[kind][classes][known].mean()) if known.any() else None,
        )
        for kind in errors.counts
    }
