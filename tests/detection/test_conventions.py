"""The conventions of mmdetection in torchvision's detectors, each against its formula written out."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from balanced_learning import IoUBalancedSampler
from balanced_learning.detection import apply_libra, libra_fasterrcnn, libra_retinanet
from balanced_learning.detection.anchors import FixedStrideAnchorGenerator
from balanced_learning.detection.conventions import apply_conventions
from balanced_learning.detection.matching import Matches
from balanced_learning.training.small import small_fasterrcnn, small_retinanet

L1 = nn.SmoothL1Loss(beta=0.0, reduction="sum")
OF_RCNN = {
    "anchors": "exact",
    "roi_aligned": True,
    "roi_sampling_ratio": 0,
    "rpn_allowed_border": 0,
    "rpn_max_negatives_per_positive": 5,
    "rpn_box_loss": L1,
    "init": "mmdet",
}
OF_RETINANET = {"anchors": "exact", "p6_from": "c5", "p7_relu": False, "loss_normalizer": "batch", "init": "mmdet"}


def options_of(kind: str) -> dict:
    return OF_RETINANET if kind == "retinanet" else OF_RCNN


@pytest.fixture(params=["stock", "libra"])
def prepared(request, build) -> Callable[..., nn.Module]:
    """A detector, stock or with all that Libra changes."""

    def prepare(kind: str, **arguments) -> nn.Module:
        model = build(kind, **arguments)
        if request.param == "libra":
            apply_libra(model, path_aggregation=True, **{} if kind == "retinanet" else {"rpn": True})
        return model

    return prepare


def test_by_default_nothing_is_changed(prepared, kind):
    model = prepared(kind)
    before = [(name, module, type(module), vars(module).copy()) for name, module in model.named_modules()]
    state = torch.get_rng_state()
    assert apply_conventions(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    after = [(name, module, type(module), vars(module)) for name, module in model.named_modules()]
    assert [(name, id(module), cls) for name, module, cls, _ in before] == [(n, id(m), cls) for n, m, cls, _ in after]
    for (_, _, _, old), (_, _, _, new) in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(old[name] is new[name] for name in old)


@pytest.mark.parametrize("name", [*OF_RCNN, *OF_RETINANET])
def test_keys_of_the_state_dict_stay(prepared, name):
    for kind in ("maskrcnn", "retinanet"):
        if name in options_of(kind):
            model = prepared(kind)
            keys = list(model.state_dict())
            apply_conventions(model, **{name: options_of(kind)[name]})
            assert list(model.state_dict()) == keys


def test_all_options_at_once_train_and_can_be_copied(prepared, basic_kind, train_step, detect, targets):
    model = apply_conventions(prepared(basic_kind), **options_of(basic_kind))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301
    losses, gradients = train_step(model, targets)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == gradients.keys()
    assert all(train_step(other, targets)[0] == losses for other in copies)
    assert all(len(image["boxes"]) for image in detect(model))


@pytest.mark.parametrize("kind", ["maskrcnn", "keypointrcnn"])
def test_all_options_leave_the_other_branches_training(build, kind, train_step, targets):
    losses, _ = train_step(apply_conventions(build(kind), **OF_RCNN), targets)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    assert len(losses) == 5


def test_the_small_detectors_take_all_options(images, targets):
    for build_small, options in ((small_fasterrcnn, OF_RCNN), (small_retinanet, OF_RETINANET)):
        model = apply_conventions(apply_libra(build_small(5, min_size=96, max_size=128)), **options)
        assert all(loss.isfinite() for loss in model.train()(images, targets).values())


def test_builders_hand_their_options_over():
    with torch.device("meta"):
        for builder, options in ((libra_fasterrcnn, OF_RCNN), (libra_retinanet, OF_RETINANET)):
            arguments = {"backbone_name": "resnet18", "weights_backbone": None}
            found = builder(**arguments, **options)
            expected = apply_conventions(builder(**arguments), **options)
            assert [type(module) for module in found.modules()] == [type(module) for module in expected.modules()]
            assert str(found) == str(expected) != str(builder(**arguments))


# --- the RPN


@pytest.mark.parametrize("num_positives", [0, 3, 40])
def test_the_cap_of_negatives_is_relative_to_the_positives_of_an_image(prepared, num_positives):
    model = apply_conventions(prepared("fasterrcnn"), rpn_max_negatives_per_positive=1.5)
    labels = torch.zeros(1000)
    labels[:num_positives] = 1
    ious = torch.rand(1000) / 4
    matches = Matches([labels], [ious], [torch.zeros(1000, dtype=torch.int64)], [torch.zeros(1, 4)])
    (positives,), (negatives,) = model.rpn.fg_bg_sampler(matches)
    assert positives.sum() == num_positives
    assert negatives.sum() == int(1.5 * max(1, num_positives))
    assert not (negatives & (labels != 0)).any()


def test_the_cap_keeps_what_a_sampler_does_otherwise(build):
    model = apply_libra(build("fasterrcnn"), rpn=True)
    apply_conventions(model, rpn_max_negatives_per_positive=5)
    expected = IoUBalancedSampler(256, 0.5, max_iou=0.3, max_negatives_per_positive=5)
    assert model.rpn.fg_bg_sampler == expected
    model = apply_conventions(build("fasterrcnn", rpn_batch_size_per_image=64), rpn_max_negatives_per_positive=5)
    expected = IoUBalancedSampler(64, 0.5, num_bins=1, instance_balanced=False, max_negatives_per_positive=5)
    assert model.rpn.fg_bg_sampler == expected


@pytest.mark.parametrize("loss", [L1, nn.L1Loss(), nn.SmoothL1Loss(beta=1.0, reduction="none")])
def test_the_box_loss_of_the_rpn_is_its_sum_over_the_sampled_anchors(prepared, loss):
    model = apply_conventions(prepared("fasterrcnn"), rpn_box_loss=loss)
    labels = torch.tensor([1.0, 0, -1, 1, 0])
    matches = Matches([labels], [torch.zeros(5)], [torch.zeros(5, dtype=torch.int64)], [torch.zeros(1, 4)])
    deltas, wanted = torch.randn(5, 4), torch.randn(5, 4)
    _, found = model.rpn.compute_loss(torch.randn(5, 1), deltas, matches, [wanted])
    gaps = [abs(x - y) for i in (0, 3) for x, y in zip(deltas[i].tolist(), wanted[i].tolist(), strict=True)]
    quadratic = isinstance(loss, nn.SmoothL1Loss) and loss.beta == 1
    terms = [gap**2 / 2 if quadratic and gap < 1 else gap - 0.5 * quadratic for gap in gaps]
    assert found.item() == pytest.approx(sum(terms) / 4, rel=1e-6)


def test_a_stock_rpn_with_another_option_keeps_torchvisions_box_loss(build, targets, train_step):
    expected, _ = train_step(build("fasterrcnn"), targets)
    found, _ = train_step(apply_conventions(build("fasterrcnn"), rpn_allowed_border=10_000), targets)
    torch.testing.assert_close(found, expected)


# --- RoIAlign


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2, 3])
def test_boxes_are_pooled_from_the_level_of_their_size(build, aligned, ratio):
    model = apply_conventions(build("maskrcnn"), roi_aligned=aligned, roi_sampling_ratio=ratio)
    maps = {str(i): torch.randn(2, 8, 64 >> i, 64 >> i, requires_grad=True) for i in range(4)}
    inputs = maps | {"pool": torch.randn(2, 8, 4, 4)}
    corners = torch.rand(2, 12, 2) * 100
    boxes = list(torch.cat([corners, corners + torch.tensor([4.0, 150, 400, 600]).repeat(3)[:, None]], dim=-1))
    boxes.insert(1, torch.zeros(0, 4))
    maps_of_three = {name: torch.cat([level[:1], level]) for name, level in inputs.items()}
    for name, size in (("box_roi_pool", 7), ("mask_roi_pool", 14)):
        pool = getattr(model.roi_heads, name)
        found = pool(maps_of_three, boxes, [(256, 256)] * 3)
        expected = []
        for image, of_image in enumerate(boxes):
            for box in of_image:
                side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
                level = min(3, max(0, math.floor(4 + math.log2(side / 224) + 1e-6) - 2))
                level_map = maps_of_three[str(level)][image : image + 1]
                expected.append(roi_align(level_map, [box[None]], size, 0.25 / 2**level, ratio, aligned=aligned))
        torch.testing.assert_close(found, torch.cat(expected))
        assert pool.scales == [0.25, 0.125, 0.0625, 0.03125]
        gradients = [
            torch.autograd.grad(pooled.square().sum(), list(maps.values()), retain_graph=True, materialize_grads=True)
            for pooled in (found, torch.cat(expected))
        ]
        torch.testing.assert_close(*gradients)
        assert pool(maps_of_three, boxes[1:2] * 3, [(256, 256)] * 3).shape == (0, 8, size, size)


def test_a_level_without_boxes_has_a_gradient_of_zeros(build):
    """Without one, a process whose images have no large boxes would keep the others waiting."""
    model = apply_conventions(build("fasterrcnn"), roi_aligned=True)
    maps = {str(i): torch.randn(1, 8, 64 >> i, 64 >> i, requires_grad=True) for i in range(4)}
    pooled = model.roi_heads.box_roi_pool(maps, [torch.tensor([[8.0, 8, 40, 40]])], [(256, 256)])
    finest, *others = torch.autograd.grad(pooled.sum(), list(maps.values()))
    assert finest.any()
    assert not any(gradient.any() for gradient in others)


def test_an_aligned_bin_takes_the_pixel_at_its_centre(build):
    """By hand: a box around pixel (3, 5) of stride 4, of 7 x 7 bins of one pixel each."""
    model = apply_conventions(build("fasterrcnn"), roi_aligned=True, roi_sampling_ratio=1)
    image = torch.arange(64.0 * 64).reshape(1, 1, 64, 64)
    maps = {str(i): image[..., :: 2**i, :: 2**i] for i in range(4)}
    box = torch.tensor([[5.0, 3, 12, 10]]) * 4
    assert torch.equal(model.roi_heads.box_roi_pool(maps, [box], [(256, 256)])[0, 0], image[0, 0, 3:10, 5:12])


# --- RetinaNet


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("source", ["p5", "c5"])
def test_p6_and_p7_are_made_as_asked(prepared, source, relu):
    model = prepared("retinanet").eval()
    if hasattr(model.backbone, "bfp"):
        model.backbone.bfp = nn.Identity()
    apply_conventions(model, p6_from=source, p7_relu=relu)
    x = torch.randn(1, 3, 128, 192)
    levels, c5 = model.backbone(x), list(model.backbone.body(x).values())[-1]
    blocks = model.backbone.fpn.extra_blocks
    assert isinstance(blocks, LastLevelP6P7)
    p6 = blocks.p6(c5 if source == "c5" else levels["2"])
    torch.testing.assert_close(levels["p6"], p6)
    torch.testing.assert_close(levels["p7"], blocks.p7(p6.relu() if relu else p6))
    assert (p6 < 0).any()


def test_losses_of_a_retinanet_are_divided_by_the_positives_of_the_batch(prepared, images, targets):
    model = apply_conventions(prepared("retinanet"), loss_normalizer="batch").train()
    if hasattr(model.head.regression_head, "box_loss"):
        model.head.regression_head.box_loss = nn.L1Loss(reduction="sum")
    inputs, moved = model.transform(images, targets)
    maps = list(model.backbone(inputs.tensors).values())
    outputs, anchors = model.head(maps), model.anchor_generator(inputs, maps)
    found = model.compute_loss(moved, outputs, anchors)

    classification = regression = num_positives = 0.0
    for i, target in enumerate(moved):
        matched = model.proposal_matcher(_ious(target["boxes"], anchors[i])) if len(target["boxes"]) else None
        positive = torch.zeros(len(anchors[i]), dtype=torch.bool) if matched is None else matched >= 0
        wanted = torch.zeros_like(outputs["cls_logits"][i])
        for anchor in positive.nonzero().flatten().tolist():
            gt = int(matched[anchor])
            wanted[anchor, target["labels"][gt]] = 1
            regression += _l1(outputs["bbox_regression"][i, anchor], anchors[i][anchor], target["boxes"][gt])
        p = outputs["cls_logits"][i].sigmoid()
        focal = torch.where(wanted == 1, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log())
        classification += focal[torch.ones_like(positive) if matched is None else matched != -2].sum().item()
        num_positives += max(1, int(positive.sum()))
    assert found["classification"].item() == pytest.approx(classification / num_positives, rel=1e-5)
    assert found["bbox_regression"].item() == pytest.approx(regression / num_positives, rel=1e-5)


def _ious(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    sides = torch.minimum(gt_boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(gt_boxes[:, None, :2], boxes[:, :2])
    common = sides.clamp(min=0).prod(dim=-1)
    areas = [(of[:, 2:] - of[:, :2]).prod(dim=1) for of in (gt_boxes, boxes)]
    return common / (areas[0][:, None] + areas[1] - common)


def _l1(deltas: Tensor, anchor: Tensor, gt: Tensor) -> float:
    side, gt_side = anchor[2:] - anchor[:2], gt[2:] - gt[:2]
    shift = ((gt[:2] + gt[2:]) - (anchor[:2] + anchor[2:])) / 2 / side
    return float((deltas.detach() - torch.cat([shift, (gt_side / side).log()])).abs().sum())


# --- weights


def test_initial_weights_are_mmdetections(prepared, basic_kind):
    model = prepared(basic_kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    apply_conventions(model, init="mmdet")
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    new = ("backbone.fpn.", "roi_heads.box_head.", "roi_heads.box_predictor.")
    assert changed == {name for name in before if name.startswith(new)}
    for name, module in model.named_modules():
        if not (name.startswith(new) and hasattr(module, "weight")):
            continue
        assert not module.bias.any()
        weight = module.weight
        if "box_predictor" in name:
            assert weight.std().item() == pytest.approx(0.01 if "cls" in name else 0.001, rel=0.25)
        else:
            fans = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()
            assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / fans), rel=0.02)
            assert weight.abs().max() <= math.sqrt(6 / fans)


def test_of_p6_and_p7_only_the_weights_of_p6_are_new(build):
    model, stock = build("retinanet"), build("retinanet").state_dict()
    apply_conventions(model, p6_from="c5", p7_relu=False)
    changed = {name for name, weight in model.state_dict().items() if not _same(weight, stock[name])}
    assert changed == {"backbone.fpn.extra_blocks.p6.weight"}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


# --- errors


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("fasterrcnn", {"anchors": "fixed"}, ValueError, r"anchors must be one of .*'exact'.*, got 'fixed'"),
        ("fasterrcnn", {"init": None}, ValueError, r"init must be one of .*, got None"),
        ("fasterrcnn", {"roi_aligned": 1}, TypeError, "roi_aligned must be True or False, got 1"),
        ("fasterrcnn", {"roi_sampling_ratio": -1}, ValueError, "roi_sampling_ratio must be at least 0, got -1"),
        ("fasterrcnn", {"roi_sampling_ratio": 2.0}, TypeError, "roi_sampling_ratio must be a whole number, got 2.0"),
        ("fasterrcnn", {"rpn_allowed_border": -1}, ValueError, "rpn_allowed_border must be at least 0, got -1"),
        ("fasterrcnn", {"rpn_allowed_border": True}, TypeError, "rpn_allowed_border must be a whole number, got True"),
        (
            "fasterrcnn",
            {"rpn_max_negatives_per_positive": math.nan},
            ValueError,
            "rpn_max_negatives_per_positive must be at least 0, got nan",
        ),
        ("fasterrcnn", {"rpn_box_loss": torch.abs}, TypeError, "rpn_box_loss must be a loss with a reduction"),
        ("fasterrcnn", {"p6_from": "c5"}, ValueError, "p6_from is an option of a RetinaNet"),
        ("fasterrcnn", {"p7_relu": False}, ValueError, "p7_relu is an option of a RetinaNet"),
        ("fasterrcnn", {"loss_normalizer": "batch"}, ValueError, "loss_normalizer is an option of a RetinaNet"),
        ("retinanet", {"roi_aligned": True}, ValueError, "roi_aligned is an option of a FasterRCNN"),
        ("retinanet", {"roi_sampling_ratio": 0}, ValueError, "roi_sampling_ratio is an option of a FasterRCNN"),
        ("retinanet", {"rpn_allowed_border": 0}, ValueError, "rpn_allowed_border is an option of a FasterRCNN"),
        ("retinanet", {"rpn_box_loss": L1}, ValueError, "rpn_box_loss is an option of a FasterRCNN"),
        ("retinanet", {"p7_relu": None}, TypeError, "p7_relu must be True or False, got None"),
    ],
)
def test_wrong_options_are_errors_that_name_them(build, kind, options, error, message):
    with pytest.raises(error, match=message):
        apply_conventions(build(kind), **options)


def test_a_model_of_another_type_is_an_error():
    with pytest.raises(TypeError, match="model must be a FasterRCNN or RetinaNet of torchvision, got Linear"):
        apply_conventions(nn.Linear(1, 1))


class Other(nn.Module):
    pass


@pytest.mark.parametrize(
    ("kind", "part", "option"),
    [
        ("fasterrcnn", "rpn", "rpn_box_loss"),
        ("fasterrcnn", "rpn.anchor_generator", "anchors"),
        ("fasterrcnn", "rpn.anchor_generator", "rpn_allowed_border"),
        ("fasterrcnn", "rpn.fg_bg_sampler", "rpn_max_negatives_per_positive"),
        ("fasterrcnn", "roi_heads.box_roi_pool", "roi_aligned"),
        ("maskrcnn", "roi_heads.mask_roi_pool", "roi_sampling_ratio"),
        ("keypointrcnn", "roi_heads.keypoint_roi_pool", "roi_aligned"),
        ("fasterrcnn", "roi_heads.box_predictor", "init"),
        ("retinanet", "anchor_generator", "anchors"),
        ("retinanet", "head", "loss_normalizer"),
        ("retinanet", "backbone.fpn", "init"),
        ("retinanet", "backbone.fpn.extra_blocks", "p6_from"),
    ],
)
def test_a_part_of_another_class_is_an_error_before_anything_is_changed(build, kind, part, option):
    model = build(kind)
    owner, _, name = part.rpartition(".")
    setattr(model.get_submodule(owner), name, Other())
    before = [(id(module), type(module)) for module in model.modules()]
    with pytest.raises(TypeError, match=f"{option} needs a model with .* as its {name}, got Other"):
        apply_conventions(model, **{option: options_of(kind)[option]})
    assert [(id(module), type(module)) for module in model.modules()] == before


def test_conventions_are_applied_once(build):
    model = apply_conventions(build("retinanet"), anchors="exact")
    assert isinstance(model.anchor_generator, FixedStrideAnchorGenerator)
    with pytest.raises(TypeError, match="anchors needs a model with AnchorGenerator as its anchor_generator"):
        apply_conventions(model, anchors="rounded")
