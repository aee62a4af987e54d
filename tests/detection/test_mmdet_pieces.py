"""Images, maps and heads of a detector that from_mmdet makes against mmdetection's formulas, with the same weights."""

from copy import deepcopy

import pytest
import torch

from tests.detection.mmdet_models import (
    EXACT,
    PADDED,
    SIZE,
    VERSIONS,
    batch,
    detector,
    last_pixels,
    pyramid_of,
    random_boxes,
)
from tests.reference import mmdet_boxes, mmdet_detectors, mmdet_maps

SLOW = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize("size", [(375, 500), (640, 427), (97, 1200)], ids=str)
def test_images_have_the_rounded_size(size):
    images, _ = detector()[1].transform([torch.zeros(3, *size)])
    assert images.image_sizes == [mmdet_boxes.resized_size(*size, (1333, 800))]


@pytest.mark.parametrize("scale", [(333, 200), (110, 70)], ids=["larger", "smaller"])
def test_images_are_resized_normalized_and_padded(scale):
    transform = deepcopy(detector()[1].transform)
    transform.min_size, transform.max_size = (min(scale),), max(scale)
    image = torch.rand(3, 93, 141, dtype=torch.float64)
    images, _ = transform([image])
    expected, size = mmdet_boxes.preprocess(image, scale)
    assert images.image_sizes == [size]
    torch.testing.assert_close(images.tensors, expected, **EXACT)


@pytest.mark.parametrize("name", ["resnet18", *(pytest.param(n, marks=SLOW) for n in ("resnet50", "resnext50_32x4d"))])
def test_backbone(name):
    state, model = detector("faster_rcnn", name)
    x = batch().tensors
    for ours, theirs in zip(model.backbone.body(x).values(), mmdet_maps.backbone(state, x), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("faster_rcnn", {}),
        ("faster_rcnn", {"pafpn": True}),
        pytest.param("faster_rcnn", {"libra": False, "pafpn": True}, marks=SLOW),
        pytest.param("faster_rcnn", {"libra": False}, marks=SLOW),
        pytest.param("faster_rcnn", {"refine": "conv"}, marks=SLOW),
        ("retinanet", {}),
        pytest.param("retinanet", {"libra": False}, marks=SLOW),
    ],
    ids=str,
)
def test_neck(kind, arguments):
    state, model = detector(kind, **arguments)
    x = batch().tensors
    for ours, theirs in zip(model.backbone(x).values(), mmdet_maps.features(state, x), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_rpn_head():
    state, model = detector()
    maps = list(pyramid_of(PADDED).values())
    for level, logits, deltas in zip(maps, *model.rpn.head(maps), strict=True):
        expected_logits, expected_deltas = mmdet_detectors.rpn_head(state, level)
        torch.testing.assert_close(logits[0].permute(1, 2, 0).flatten(), expected_logits, **EXACT)
        torch.testing.assert_close(deltas[0].permute(1, 2, 0).reshape(-1, 4), expected_deltas, **EXACT)


def test_retinanet_head():
    state, model = detector("retinanet")
    maps = list(pyramid_of(PADDED, first=8).values())
    outputs = model.head(maps)
    expected = [torch.cat(parts) for parts in zip(*(mmdet_detectors.retina_head(state, x) for x in maps), strict=True)]
    torch.testing.assert_close(outputs["cls_logits"][0, :, 1:], expected[0], **EXACT)
    torch.testing.assert_close(outputs["bbox_regression"][0], expected[1], **EXACT)


@VERSIONS
def test_box_head(legacy):
    state, model = detector(legacy=legacy)
    pooled = torch.randn(20, 32, 7, 7, dtype=torch.float64)
    logits, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    expected_logits, expected_deltas = mmdet_detectors.box_head(state, pooled)
    background = 0 if legacy else -1
    torch.testing.assert_close(logits[:, 0], expected_logits[:, background], **EXACT)
    objects = expected_logits[:, 1:] if legacy else expected_logits[:, :-1]
    torch.testing.assert_close(logits[:, 1:], objects, **EXACT)
    torch.testing.assert_close(deltas.unflatten(1, (-1, 4))[:, 1:], expected_deltas[:, 1 if legacy else 0 :], **EXACT)


@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=SLOW)])
def test_mask_head(legacy):
    state, model = detector("mask_rcnn", libra=False, legacy=legacy)
    maps, boxes = pyramid_of(PADDED), random_boxes(3, SIZE, smallest=20)
    heads = model.roi_heads
    logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, [boxes], [SIZE])))
    levels = [
        mmdet_boxes.roi_align(level[0], last_pixels(boxes, legacy), 4 * 2**i, size=14, legacy=legacy)
        for i, level in enumerate(maps.values())
    ]
    level_of = mmdet_boxes.levels(last_pixels(boxes, legacy), legacy=legacy)
    pooled = torch.stack([levels[level][i] for i, level in enumerate(level_of)])
    expected = mmdet_detectors.mask_head(state, pooled)
    torch.testing.assert_close(logits[:, 1:], expected[:, 1 if legacy else 0 :], **EXACT)
