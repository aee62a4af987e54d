"""Anchors at fixed strides, and those beyond the border of their image, against scalar loops."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from balanced_learning.detection import apply_libra
from balanced_learning.detection.anchors import FixedStrideAnchorGenerator, SizedAnchorGenerator, whole_octaves
from balanced_learning.detection.conventions import apply_conventions
from balanced_learning.training.small import small_fasterrcnn, small_retinanet

PADDED = (160, 224)
IMAGE_SIZES = [(160, 202), (100, 224)]
RATIOS = (0.5, 1.0, 2.0)


def batch(num_levels: int, first_stride: int) -> tuple[ImageList, list[Tensor]]:
    """Two padded images, and maps of the size that convolutions of stride 2 give them."""
    sizes = [tuple(math.ceil(side / (first_stride << level)) for side in PADDED) for level in range(num_levels)]
    return ImageList(torch.zeros(2, 3, *PADDED), IMAGE_SIZES), [torch.zeros(2, 1, *size) for size in sizes]


def explicit_anchors(sizes: list[list[float]], first_stride: int, anchors: str) -> Tensor:
    """On multiples of the stride, with torchvision's order: rows, columns, ratios, sizes.

    Centered ones are mmdetection 1's, from first to last pixel, with the last corner behind the last pixel.
    """
    boxes = []
    for level, of_level in enumerate(sizes):
        stride = first_stride * 2**level
        for row in range(math.ceil(PADDED[0] / stride)):
            for column in range(math.ceil(PADDED[1] / stride)):
                for ratio in RATIOS:
                    for size in of_level:
                        width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
                        corners = [-width / 2, -height / 2, width / 2, height / 2]
                        if anchors == "rounded":
                            corners = [round(corner) for corner in corners]
                        if anchors == "centered":
                            middle, half = (stride - 1) / 2, [(width - 1) / 2, (height - 1) / 2]
                            first = [round(middle - side) for side in half]
                            last = [round(middle + side) for side in half]
                            corners = [*first, *(corner + 1 for corner in last)]
                        boxes.append([corners[i] + stride * (column, row)[i % 2] for i in range(4)])
    return torch.tensor(boxes, dtype=torch.float32)


def third_octaves(first: float, num_levels: int) -> list[list[float]]:
    return [[first * 2 ** (level + third / 3) for third in range(3)] for level in range(num_levels)]


@pytest.mark.parametrize("anchors", ["rounded", "exact", "centered"])
@pytest.mark.parametrize(
    ("kind", "first_stride", "sizes"),
    [
        ("fasterrcnn", 4, [[32.0 * 2**level] for level in range(5)]),
        ("retinanet", 8, third_octaves(32, 5)),
        ("small_fasterrcnn", 4, [[16.0 * 2**level] for level in range(4)]),
        ("small_retinanet", 8, third_octaves(16, 4)),
    ],
)
def test_anchors_lie_at_multiples_of_the_stride(build, kind, first_stride, sizes, anchors):
    small = {"small_fasterrcnn": small_fasterrcnn, "small_retinanet": small_retinanet}
    model = small[kind](3) if kind in small else build(kind)
    apply_conventions(model, anchors=anchors)
    generator = model.rpn.anchor_generator if "rcnn" in kind else model.anchor_generator
    images, maps = batch(len(sizes), first_stride)
    found = generator(images, maps)
    expected = explicit_anchors(sizes, first_stride, anchors)
    for image in found:
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-4 if anchors == "exact" else 0)
    assert found.image_sizes == IMAGE_SIZES
    assert generator.num_anchors_per_location() == [3 * len(level) for level in sizes]


def test_torchvisions_anchors_are_closer_where_the_stride_does_not_divide_the_padded_size():
    """As reference: what the option is for. 224 pixels have 4 columns of stride 64, and 224 // 4 = 56."""
    images, maps = batch(1, 64)
    (stock, _), (fixed, _) = (
        generator(images, maps)
        for generator in (
            AnchorGenerator([(64,)], [(1.0,)]),
            FixedStrideAnchorGenerator([(64,)], [(1.0,)], [64]),
        )
    )
    assert sorted({int(x) for x in stock[:, 0] + 32}) == [0, 56, 112, 168]
    assert sorted({int(x) for x in fixed[:, 0] + 32}) == [0, 64, 128, 192]


def test_half_types_do_not_round_the_corners():
    generator = FixedStrideAnchorGenerator([(33.3,)], [(1.0,)], [4], rounded=False)
    images, maps = batch(1, 4)
    expected = generator(images, maps)[0]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(generator(images, [maps[0].to(dtype)])[0], expected)
    assert generator(images, [maps[0].double()])[0].dtype == torch.float64


def test_a_map_of_another_stride_is_an_error():
    generator = FixedStrideAnchorGenerator([(8,), (16,)], [(1.0,)] * 2, [4, 8])
    images, maps = batch(2, 8)
    with pytest.raises(ValueError, match="level 0 must be of stride 4, got a map of 20 x 28 for images padded"):
        generator(images, maps)


@pytest.mark.parametrize("sizes", [(32,), (32, 40), (32, 41, 50), (32, 40, 50, 64)])
def test_only_the_thirds_of_an_octave_are_made_whole(sizes):
    assert whole_octaves(sizes) == sizes
    assert whole_octaves((64, 80, 101)) == pytest.approx((64, 80.635, 101.594), abs=1e-3)


GT_BOXES = [
    torch.tensor([[8.0, 8, 60, 72], [100, 20, 199.5, 158], [200.5, 80, 202, 83]]),  # the last is beside all anchors
    torch.tensor([[150.0, 30, 224, 100]]),
]


@pytest.mark.parametrize("border", [0, 7, 40])
@pytest.mark.parametrize("anchors", ["torchvision", "rounded", "exact", "centered"])
@pytest.mark.parametrize("libra", [False, True])
def test_anchors_beyond_the_border_are_not_trained_on(build, border, anchors, libra):
    """As torchvision's assignment of the others alone."""
    rpn = build("fasterrcnn").rpn
    model = build("fasterrcnn")
    if libra:
        apply_libra(model, rpn=True)
    apply_conventions(model, rpn_allowed_border=border, anchors=anchors)
    all_anchors = model.rpn.anchor_generator(*batch(5, 4))
    targets = [{"boxes": boxes} for boxes in GT_BOXES]
    labels, matched = model.rpn.assign_targets_to_anchors(all_anchors, targets)
    for i, (boxes, (height, width)) in enumerate(zip(all_anchors, IMAGE_SIZES, strict=True)):
        is_inside = torch.tensor(
            [
                x1 >= -border and y1 >= -border and x2 <= width + border and y2 <= height + border
                for x1, y1, x2, y2 in boxes.tolist()
            ]
        )
        assert 0 < is_inside.sum() < len(boxes)
        inside = boxes[is_inside]
        gt_boxes = GT_BOXES[i]
        overlapped = box_iou(gt_boxes, inside).amax(dim=1) > 0
        expected, expected_boxes = RegionProposalNetwork.assign_targets_to_anchors(
            rpn, [inside], [{"boxes": gt_boxes[overlapped]}]
        )
        assert (labels[i][~is_inside] == -1).all()
        assert torch.equal(labels[i][is_inside], expected[0])
        assert (expected[0] == 1).any()
        positive = expected[0] == 1
        assert torch.equal(matched[i][is_inside][positive], expected_boxes[0][positive])


def test_a_ground_truth_beside_all_anchors_inside_makes_none_of_them_positive(build):
    model = apply_conventions(build("fasterrcnn"), rpn_allowed_border=0, anchors="rounded")
    anchors = model.rpn.anchor_generator(*batch(5, 4))
    labels, _ = model.rpn.assign_targets_to_anchors(anchors, [{"boxes": boxes[-1:]} for boxes in GT_BOXES])
    assert not (labels[0] > 0).any()
    assert (labels[0] == 0).any()
    assert (labels[1] > 0).any()


def test_without_anchors_inside_the_losses_are_zero(build, images, targets):
    model = build("fasterrcnn", min_size=20, max_size=20)
    apply_conventions(model, rpn_allowed_border=0)
    losses = model.train()(images, targets)
    assert losses["loss_objectness"] == losses["loss_rpn_box_reg"] == 0
    sum(losses.values()).backward()


def test_the_border_needs_anchors_that_know_their_image(build, images, targets):
    model = apply_conventions(build("fasterrcnn"), rpn_allowed_border=0)
    assert type(model.rpn.anchor_generator) is SizedAnchorGenerator
    model.rpn.anchor_generator = build("fasterrcnn").rpn.anchor_generator
    with pytest.raises(TypeError, match=r"rpn\.allowed_border=0 needs the anchors of a SizedAnchorGenerator"):
        model.train()(images, targets)
