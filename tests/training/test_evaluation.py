import pytest
import torch

from balanced_learning.training.data.coco import read_split
from balanced_learning.training.evaluation import METRICS, coco_metrics
from balanced_learning.training.reporting.tables import metrics_table as table

LABEL_OF = {90: 2, 3: 1}
BACKENDS = ["faster-coco-eval", "pycocotools"]


def detections(*boxes, label=2):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.linspace(0.9, 0.5, len(boxes)),
        "labels": torch.full((len(boxes),), label),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("found", "ap", "ap75"),
    [
        (detections([4, 4, 34, 24]), 1.0, 1.0),
        (detections([4, 4, 34, 16]), 0.3, 0.0),  # IoU 0.6: three of ten thresholds
        (detections([40, 30, 50, 40], [4, 4, 34, 24]), 0.5, 0.5),  # a false positive of higher score
        (detections([4, 4, 34, 24], label=1), 0.0, 0.0),
        (detections(), 0.0, 0.0),
    ],
)
def test_ap_of_known_detections(coco_root, backend, found, ap, ap75):
    metrics = coco_metrics(read_split(coco_root, "val2017"), {21: found}, LABEL_OF, backend)
    assert list(metrics) == list(METRICS)
    assert metrics["AP"] == pytest.approx(ap, abs=1e-6)
    assert metrics["AP75"] == pytest.approx(ap75, abs=1e-6)
    assert metrics["APl"] is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_undetected_image_counts_as_missed(coco_root, backend):
    metrics = coco_metrics(
        read_split(coco_root, "train2017"), {11: detections([4, 4, 34, 24]), 12: detections()}, LABEL_OF, backend
    )
    assert metrics["AR100"] == pytest.approx(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_detection_of_a_crowd_is_no_fault(coco_root, edit, backend):
    edit(lambda content: content["annotations"][0].update(iscrowd=1))
    found = {11: detections([4, 4, 34, 24], [5, 5, 20, 20]), 12: detections([4, 4, 34, 24])}
    assert coco_metrics(read_split(coco_root, "train2017"), found, LABEL_OF, backend)["AP"] == pytest.approx(1.0)


def test_backends_agree_on_real_annotations(real_data):
    split = read_split(real_data("coco_tiny"), "val2017")
    label_of = {category_id: label for label, category_id in enumerate(sorted(split.categories), 1)}
    found = {}
    for image in split.images:
        boxes = [a["bbox"] for a in split.boxes(image)]
        xywh = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        moved = xywh + torch.randn(xywh.shape) * xywh[:, 2:].repeat(1, 2) * 0.08
        found[image["id"]] = {
            "boxes": torch.cat([moved[:, :2], moved[:, :2] + moved[:, 2:]], 1),
            "scores": torch.rand(len(boxes)),
            "labels": torch.tensor([label_of[a["category_id"]] for a in split.boxes(image)]),
        }
    ours, reference = (coco_metrics(split, found, label_of, backend) for backend in BACKENDS)
    assert ours == pytest.approx(reference, abs=1e-9)
    assert 0.1 < ours["AP"] < 0.9


def test_the_table_has_percent_and_dashes():
    assert table({"AP": 0.1234, "APl": None}).split() == ["AP", "APl", "12.3", "-"]
