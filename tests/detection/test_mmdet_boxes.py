"""Boxes of a detector that from_mmdet makes, from anchors to detections, against mmdetection's formulas."""

import pytest
import torch

from balanced_learning.detection import from_mmdet
from tests.detection.mmdet_models import (
    EXACT,
    KINDS,
    PADDED,
    SIZE,
    VERSIONS,
    batch,
    detector,
    last_pixels,
    pyramid_of,
    random_boxes,
)
from tests.reference import mmdet_boxes, mmdet_detectors
from tests.reference.mmdet_states import synthetic_state

pytestmark = pytest.mark.usefixtures("no_gradients")


@VERSIONS
@KINDS
def test_anchors(kind, legacy):
    _, model = detector(kind, legacy=legacy)
    first, scales = (4, mmdet_detectors.RPN_SCALES) if kind == "faster_rcnn" else (8, mmdet_detectors.RETINA_SCALES)
    maps = list(pyramid_of(PADDED, first, channels=1).values())
    generator = model.rpn.anchor_generator if kind == "faster_rcnn" else model.anchor_generator
    (ours,) = generator(batch(), maps)
    theirs = [
        mmdet_boxes.anchors(x.shape[2:], first * 2**i, scales, legacy=legacy, dtype=torch.float64)
        for i, x in enumerate(maps)
    ]
    torch.testing.assert_close(last_pixels(ours, legacy), torch.cat(theirs), rtol=0, atol=1e-4)


@VERSIONS
@pytest.mark.parametrize("part", ["rpn", "roi_heads", "retinanet"])
def test_box_coder(part, legacy):
    _, model = detector("retinanet" if part == "retinanet" else "faster_rcnn", legacy=legacy)
    coder = model.box_coder if part == "retinanet" else getattr(model, part).box_coder
    stds = mmdet_detectors.RCNN_STDS if part == "roi_heads" else mmdet_detectors.ONES
    boxes = random_boxes(200, SIZE)
    deltas = 0.3 * torch.randn(200, 7, 4, dtype=torch.float64) / torch.tensor(stds)
    deltas[:9, :, 2:] = 50.0  # beyond what a side may grow
    ours = (
        coder.decode(deltas.flatten(1), [boxes])
        if part != "retinanet"
        else coder.decode_single(deltas.flatten(1), boxes)
    )
    ours = ours.reshape(200, 7, 4)
    limits = torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]])
    inside = ((ours > 0) & (ours < limits - 1)).all(dim=2)
    theirs = mmdet_boxes.decode(last_pixels(boxes, legacy), deltas, stds, SIZE, legacy=legacy)
    assert 400 < inside.sum() < 1400
    torch.testing.assert_close(last_pixels(ours, legacy)[inside], theirs[inside], rtol=0, atol=1e-4)
    if not legacy:
        torch.testing.assert_close(torch.minimum(ours.clamp(min=0), limits), theirs, rtol=0, atol=1e-4)


def test_proposals():
    state, model = detector()
    maps = pyramid_of(PADDED)
    (ours,), _ = model.rpn(batch(), maps)
    theirs = mmdet_detectors.proposals(state, list(maps.values()), SIZE)
    assert len(theirs) > 300
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@VERSIONS
def test_features_of_boxes(legacy):
    _, model = detector(legacy=legacy)
    maps = pyramid_of((608, 800), channels=3)
    boxes = random_boxes(100, (600, 790), smallest=9)
    boxes[:4] = torch.tensor([[0, 0, 790, 600], [3, 5, 115, 117], [300, 1, 785, 599], [770, 560, 790, 600]])
    level_of = mmdet_boxes.levels(last_pixels(boxes, legacy), legacy=legacy)
    wide = ((boxes[:, 2:] - boxes[:, :2]) > 4 * 2 ** level_of[:, None]).all(dim=1)
    boxes = boxes[wide] if legacy else boxes
    assert level_of[wide].bincount().min() >= 2
    ours = model.roi_heads.box_roi_pool(maps, [boxes], [(600, 790)])
    theirs = mmdet_detectors.roi_features(list(maps.values()), last_pixels(boxes, legacy), legacy=legacy)
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_features_of_boxes_in_a_first_image_that_is_mostly_padding():
    """From whose size torchvision would take the finest maps for coarser ones."""
    model = from_mmdet(synthetic_state(channels=8)).double()
    maps, boxes = pyramid_of((64, 64), channels=3), random_boxes(5, (33, 36), smallest=9)
    ours = model.roi_heads.box_roi_pool(maps, [boxes], [(33, 36)])
    torch.testing.assert_close(ours, mmdet_detectors.roi_features(list(maps.values()), boxes), **EXACT)


def test_features_of_narrow_boxes_of_mmdetection_1():
    _, model = detector(legacy=True)
    maps = pyramid_of(PADDED, channels=3)
    boxes = torch.tensor([[10.0, 10.0, 80.0, 11.5], [100.0, 20.0, 102.0, 90.0]], dtype=torch.float64)
    ours = model.roi_heads.box_roi_pool(maps, [boxes], [SIZE])
    theirs = mmdet_detectors.roi_features(list(maps.values()), last_pixels(boxes, True), legacy=True)
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_suppression_and_order_of_detections_of_two_stages():
    _, model = detector()
    boxes = random_boxes(300, SIZE, smallest=20)
    logits = 3 * torch.randn(300, 81, dtype=torch.float64)
    deltas = torch.randn(300, 80, 4, dtype=torch.float64)
    ours = model.roi_heads.postprocess_detections(
        logits.roll(1, dims=1), torch.cat([torch.zeros(300, 1, 4), deltas], dim=1).flatten(1), [boxes], [SIZE]
    )
    assert_detections(ours, mmdet_detectors.best_of_proposals(logits, deltas, boxes, SIZE, SIZE))


def test_suppression_and_order_of_detections_of_retinanet():
    _, model = detector("retinanet")
    boxes = [random_boxes(num, SIZE, smallest=20) for num in (600, 40, 5)]
    outputs = [
        (2 * torch.randn(len(x), 80, dtype=torch.float64) - 4, 0.2 * torch.randn(len(x), 4, dtype=torch.float64))
        for x in boxes
    ]
    assert [(logits.sigmoid() > 0.05).sum() > 1000 for logits, _ in outputs] == [True, False, False]
    head_outputs = {
        "cls_logits": [torch.cat([torch.full((len(x), 1), -99.0), x], dim=1)[None] for x, _ in outputs],
        "bbox_regression": [deltas[None] for _, deltas in outputs],
    }
    (found,) = model.postprocess_detections(head_outputs, [boxes], [SIZE])
    ours = [[found[key]] for key in ("boxes", "scores", "labels")]
    assert_detections(ours, mmdet_detectors.best_of_anchors(outputs, boxes, SIZE, SIZE))


@pytest.mark.xfail(strict=True, reason="torchvision's RetinaNet keeps boxes without area, mmdetection's does not")
def test_retinanet_leaves_out_boxes_of_the_padding():
    _, model = detector("retinanet")
    boxes = torch.tensor([[0.0, 0, 50, 50], [SIZE[1] + 2, 10, SIZE[1] + 7, 20]], dtype=torch.float64)
    logits, deltas = torch.full((2, 81), 1.0, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    head_outputs = {"cls_logits": [logits[None]], "bbox_regression": [deltas[None]]}
    (found,) = model.postprocess_detections(head_outputs, [[boxes]], [SIZE])
    assert (found["boxes"] == boxes[0]).all()


def assert_detections(ours, theirs: mmdet_detectors.Detections) -> None:
    (boxes,), (scores,), (labels,) = ours
    assert len(theirs.scores) == 100
    torch.testing.assert_close(scores, theirs.scores, **EXACT)
    torch.testing.assert_close(boxes, theirs.boxes, **EXACT)
    assert torch.equal(labels, theirs.classes + 1)
