import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from balanced_learning.detection import libra_fasterrcnn, libra_retinanet
from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.columns import Columns
from balanced_learning.training.evaluation import METRICS, coco_metrics, detections_per_image, evaluate_detections

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


def shaken(split, label_of, shift):
    """Detections of every object, moved by a share of its size, some of another class."""
    found = {}
    for image in split.images:
        objects = split.boxes(image)
        xywh = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
        moved = xywh + torch.randn(xywh.shape) * xywh[:, 2:].repeat(1, 2) * shift
        labels = torch.tensor([label_of[a["category_id"]] for a in objects])
        found[image["id"]] = {
            "boxes": torch.cat([moved[:, :2], moved[:, :2] + moved[:, 2:]], 1),
            "scores": torch.rand(len(objects)),
            "labels": torch.where(torch.rand(len(objects)) < 0.1, labels.roll(1), labels),
        }
    return found


def test_backends_agree_on_real_annotations_class_by_class(real_data):
    split = read_split(real_data("coco_tiny"), "val2017")
    label_of = {category_id: label for label, category_id in enumerate(sorted(split.categories), 1)}
    found = shaken(split, label_of, 0.08)
    ours, reference = (evaluate_detections(split, found, label_of, backend) for backend in BACKENDS)
    assert ours.metrics == pytest.approx(reference.metrics, abs=1e-9)
    assert ours.row() == pytest.approx(reference.row(), abs=1e-9)
    assert [each.AP50 for each in ours.classes] == pytest.approx([each.AP50 for each in reference.classes], abs=1e-9)
    assert 0.1 < ours.metrics["AP"] < 0.9


def test_classes_add_up_to_the_whole(real_data):
    split = read_split(real_data("coco_tiny"), "val2017").first(40)
    label_of = {category_id: label for label, category_id in enumerate(sorted(split.categories), 1)}
    whole = evaluate_detections(split, shaken(split, label_of, 0.2), label_of, BACKENDS[0])
    known = [each for each in whole.classes if each.AP is not None]
    assert len(whole.classes) == len(split.categories) > len(known)
    assert all(each.objects == 0 for each in whole.classes if each.AP is None)
    for name in ("AP", "AP50"):
        assert sum(getattr(each, name) for each in known) / len(known) == pytest.approx(whole.metrics[name])
    for kind, error in whole.errors.items():
        assert sum(each.errors[kind].count for each in whole.classes) == error.count
        assert sum(each.errors[kind].dAP50 for each in known) / len(known) == pytest.approx(error.dAP50)


def test_an_evaluation_is_json_and_its_row_is_flat(coco_root, edit):
    edit(lambda content: content["categories"][0].update(name="to/oth\nbrush"))
    edit(lambda content: content["categories"].append({"id": 7, "name": "car"}))
    split = read_split(coco_root, "train2017")
    evaluation = evaluate_detections(split, {11: detections([4, 4, 34, 24])}, LABEL_OF, BACKENDS[0])
    plain = json.loads(json.dumps(evaluation.plain()))
    assert plain["AP50"] == pytest.approx(51 / 101)
    assert plain["errors"]["missed"] == {"count": 1, "dAP50": pytest.approx(50 / 101)}
    by_id = {each["id"]: each for each in plain["classes"]}
    assert set(by_id) == {90, 3, 7}
    assert (by_id[90]["name"], by_id[90]["objects"], by_id[3]["AP"]) == ("to/oth\nbrush", 2, None)
    assert by_id[90]["errors"]["missed"]["count"] == 1
    row = evaluation.row()
    assert list(row)[: len(METRICS)] == list(METRICS)
    assert row["dAP50/missed"] == pytest.approx(50 / 101)
    assert {name for name in row if name.startswith("AP/")} == {"AP/to/oth\\nbrush", "AP/car (3)", "AP/car (7)"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_id_will_do(coco_root, edit, backend):
    def renumber(content):
        for image in content["images"]:
            image["id"] += 2**60
        for annotation in content["annotations"]:
            annotation.update(image_id=annotation["image_id"] + 2**60, category_id=0)
        content["categories"][0]["id"] = 0

    edit(renumber)
    found = {2**60 + 11: detections([4, 4, 34, 24]), 2**60 + 12: detections([40, 30, 50, 40])}
    evaluation = evaluate_detections(read_split(coco_root, "train2017"), found, {0: 2, 3: 1}, backend)
    assert evaluation.metrics["AR100"] == pytest.approx(0.5)
    assert evaluation.errors["background"].count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_ground_truth_that_is_mapped_from_files_is_the_same(coco_root, tmp_path, backend):
    split = read_split(coco_root, "train2017")
    split.columns.write(tmp_path)
    mapped = replace(split, columns=Columns.map(tmp_path))
    found = {11: detections([4, 4, 34, 24])}
    assert coco_metrics(mapped, found, LABEL_OF, backend) == coco_metrics(split, found, LABEL_OF, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("found", [{}, {11: detections([4, 4, 34, 24])}])
def test_without_ground_truth_there_is_nothing_to_measure(coco_root, edit, backend, found):
    edit(lambda content: content.update(annotations=[]))
    evaluation = evaluate_detections(read_split(coco_root, "train2017"), found, LABEL_OF, backend)
    assert set(evaluation.row().values()) == {None}
    assert evaluation.errors["background"].count == len(found)


def test_objects_without_area_count_as_missed(coco_root, edit):
    edit(lambda content: content["annotations"][0].update(bbox=[5, 5, 0, 0], area=0))
    found = {12: detections([4, 4, 34, 24])}
    evaluation = evaluate_detections(read_split(coco_root, "train2017"), found, LABEL_OF, BACKENDS[0])
    assert evaluation.metrics["AP"] == pytest.approx(51 / 101)
    assert evaluation.errors["missed"].count == 1


@pytest.fixture
def crowded(coco_root, edit):
    """One image with 120 objects of a class, one with one of another, and detections that find them all."""
    grid = [[5 * (k % 12), 4 * (k // 12), 4, 3] for k in range(120)]

    def fill(content):
        first, last = content["annotations"]
        last["category_id"] = 3
        content["annotations"] = [{**first, "id": k, "bbox": box, "area": 12} for k, box in enumerate(grid, 1000)]
        content["annotations"].append(last)

    edit(fill)
    found = {11: detections(*([x, y, x + w, y + h] for x, y, w, h in grid)), 12: detections([4, 4, 34, 24], label=1)}
    return read_split(coco_root, "train2017"), found


def test_what_cocos_limit_leaves_to_reach_is_told_and_reached(crowded, capsys):
    metrics = coco_metrics(*crowded, LABEL_OF, BACKENDS[0])
    message = capsys.readouterr().err
    assert "COCO counts 100 detections of a class in an image, and images have up to 120 objects of one" in message
    assert "20 of 121 objects count as missed" in message
    assert f"AR100 is at most {100 * metrics['AR100']:.1f} and AP at most {100 * metrics['AP']:.1f}" in message


@pytest.mark.parametrize(
    ("limit", "told"),
    [(50, "at most 50 boxes of an image, and images have up to 120 objects: 70"), (100, "COCO counts 100")],
)
def test_the_detectors_limit_is_told_if_it_costs_more(crowded, capsys, limit, told):
    evaluate_detections(*crowded, LABEL_OF, BACKENDS[0], limit=limit)
    assert capsys.readouterr().err.count(told) == 1


def test_without_a_limit_reached_nothing_is_told(coco_root, capsys):
    evaluate_detections(read_split(coco_root, "val2017"), {}, LABEL_OF, BACKENDS[0], limit=1)
    assert capsys.readouterr().err == ""


def test_the_limit_of_both_detectors_is_known():
    options = {"backbone_name": "resnet18", "weights": None, "weights_backbone": None}
    assert detections_per_image(libra_fasterrcnn(**options, box_detections_per_img=77)) == 77
    assert detections_per_image(libra_retinanet(**options)) == 300
    assert detections_per_image(nn.Identity()) is None
