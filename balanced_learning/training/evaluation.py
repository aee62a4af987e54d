"""COCO's average precision of a set of detections."""

from typing import Any

from torch import Tensor
from torchvision.ops import box_convert

from balanced_learning.training.data.coco import Split

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")  # the order of COCOeval's statistics


def coco_metrics(
    split: Split, detections: dict[int, dict[str, Tensor]], label_of: dict[int, int], backend: str
) -> dict[str, float | None]:
    """Evaluates detections against the annotations, crowds included, as COCO does.

    Args:
        split: the ground truth.
        detections: by image id: ``boxes`` (xyxy in pixels), ``scores`` and ``labels``.
        label_of: the model's label of each category id.
        backend: ``"faster-coco-eval"`` or ``"pycocotools"``.

    Returns:
        dict: the metrics of ``METRICS``; None where there is no ground truth of that size.
    """
    category_of = {label: category_id for category_id, label in label_of.items()}
    truth = [a for image in split.images for a in split.annotations[image["id"]]]
    found = [
        {
            "image_id": image_id,
            "category_id": category_of[label],
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
            "iscrowd": 0,
        }
        for image_id, output in detections.items()
        for box, score, label in zip(
            box_convert(output["boxes"], "xyxy", "xywh").tolist(),
            output["scores"].tolist(),
            output["labels"].int().tolist(),
            strict=True,
        )
        if label in category_of
    ]
    coco, evaluator = _classes(backend)
    evaluation = evaluator(_index(coco, split, truth), _index(coco, split, found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = [float(value) for value in evaluation.stats[: len(METRICS)]]
    return {name: value if value >= 0 else None for name, value in zip(METRICS, values, strict=True)}


def table(metrics: dict[str, float | None]) -> str:
    """The metrics in percent, as papers print them."""
    cells = ["-" if value is None else f"{100 * value:.1f}" for value in metrics.values()]
    return "\n".join("".join(f"{cell:>7}" for cell in row) for row in (metrics, cells))


def _classes(backend: str) -> tuple[Any, Any]:
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    from faster_coco_eval import COCO, COCOeval_faster

    return COCO, COCOeval_faster


def _index(coco: Any, split: Split, annotations: list[dict]) -> Any:
    """The API object over these annotations, numbered from 1: evaluators take id 0 for 'unmatched'."""
    api = coco()
    api.dataset = {
        "images": split.images,
        "categories": [{"id": category_id, "name": name} for category_id, name in split.categories.items()],
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)],
    }
    api.createIndex()
    return api
