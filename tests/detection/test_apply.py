import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torchvision.models import detection, get_model
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetRegressionHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

from balanced_learning import BalancedFeaturePyramid, BalancedL1Loss, IoUBalancedSampler, PathAggregation
from balanced_learning.detection import apply_libra
from balanced_learning.detection.roi_heads import LibraRoIHeads

NEW_KEYS = [
    f"backbone.bfp.refine.{conv}.{kind}" for conv in ("theta", "phi", "g", "out") for kind in ("weight", "bias")
]
OFF = {"sampler": False, "pyramid": False, "box_loss": False}


def settings(loss: BalancedL1Loss) -> tuple[float, float, float]:
    return loss.alpha, loss.gamma, loss.beta


def hooks(module: nn.Module) -> tuple[int, int]:
    return len(module._forward_pre_hooks), len(module._forward_hooks)


def layout(model: nn.Module) -> list:
    """All that apply_libra could change in a model."""
    return [
        (name, type(module), sorted(vars(module)), list(module._modules), hooks(module))
        for name, module in model.named_modules()
    ]


@pytest.fixture(scope="module")
def stock_and_balanced(kind, build):
    """The same detector twice; one with everything balanced."""
    return build(kind), apply_libra(build(kind), rpn=kind != "retinanet")


def test_all_parts_off_is_torchvision_bit_by_bit(basic_kind, build, targets, train_step, detect):
    stock, off = build(basic_kind), build(basic_kind)
    assert apply_libra(off, **OFF) is off
    assert layout(off) == layout(stock)
    torch.testing.assert_close(train_step(off, targets), train_step(stock, targets), rtol=0, atol=0)
    detections = detect(stock)
    assert all(len(image["boxes"]) for image in detections)
    torch.testing.assert_close(detect(off), detections, rtol=0, atol=0)


def test_weights_stay_and_a_stock_state_dict_loads(stock_and_balanced):
    stock, balanced = stock_and_balanced
    state = stock.state_dict()
    assert all(torch.equal(balanced.state_dict()[name], weight) for name, weight in state.items())
    missing, unexpected = balanced.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (NEW_KEYS, [])


@pytest.mark.parametrize(
    ("builder", "refine_level"),
    [
        ("fasterrcnn_resnet50_fpn", 2),
        ("fasterrcnn_resnet50_fpn_v2", 2),
        ("fasterrcnn_mobilenet_v3_large_fpn", 1),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 1),
        ("maskrcnn_resnet50_fpn", 2),
        ("maskrcnn_resnet50_fpn_v2", 2),
        ("keypointrcnn_resnet50_fpn", 2),
        ("retinanet_resnet50_fpn", 1),
        ("retinanet_resnet50_fpn_v2", 1),
    ],
)
def test_every_model_of_torchvision_keeps_its_keys_and_is_refined_at_p4_or_the_middle(builder, refine_level):
    with torch.device("meta"):
        stock, balanced = (get_model(builder, weights=None, weights_backbone=None) for _ in range(2))
        apply_libra(balanced, rpn="rcnn" in builder)
    assert balanced.backbone.bfp.refine_level == refine_level
    missing, unexpected = balanced.load_state_dict(stock.state_dict(), strict=False, assign=True)
    assert (missing, unexpected) == (NEW_KEYS, [])


@pytest.mark.parametrize(("levels", "num_levels", "refine_level"), [("P2-P6", 5, 2), ("P3-P7", 5, 1), ("P3-P6", 4, 2)])
def test_refinement_is_at_p4_or_at_the_middle(levels, num_levels, refine_level, build):
    anchors = AnchorGenerator(((32,),) * num_levels, ((1.0,),) * num_levels)
    model = apply_libra(build("fasterrcnn", levels, rpn_anchor_generator=anchors))
    assert model.backbone.bfp.refine_level == refine_level


def test_sampler_takes_batch_size_fraction_and_threshold_from_the_model(build):
    thresholds = {"box_fg_iou_thresh": 0.6, "box_bg_iou_thresh": 0.4, "rpn_bg_iou_thresh": 0.2}
    model = build("fasterrcnn", box_batch_size_per_image=48, box_positive_fraction=0.5, **thresholds)
    apply_libra(model, rpn=True)
    assert model.roi_heads.fg_bg_sampler == IoUBalancedSampler(48, 0.5, num_bins=3, max_iou=0.4)
    assert model.rpn.fg_bg_sampler == IoUBalancedSampler(256, 0.5, num_bins=3, max_iou=0.2)


def test_the_sampler_of_the_first_stage_can_be_exchanged(build, targets, train_step):
    model = apply_libra(build("fasterrcnn"), rpn=True)
    changed = {"num_bins": 5, "floor_iou": 0.05, "floor_fraction": 0.5, "max_negatives_per_positive": 5}
    model.rpn.fg_bg_sampler = dataclasses.replace(model.rpn.fg_bg_sampler, **changed)
    losses, _ = train_step(model, targets)
    assert all(loss.isfinite() for loss in losses.values())


def test_box_losses_have_the_settings_of_the_paper(build):
    faster, retina = apply_libra(build("fasterrcnn"), rpn=True), apply_libra(build("retinanet"))
    assert settings(faster.roi_heads.box_loss) == (0.5, 1.5, 1.0)
    assert settings(faster.rpn.box_loss) == (0.5, 1.5, 1 / 9)
    assert settings(retina.head.regression_head.box_loss) == (0.5, 1.5, 0.11)


def test_each_part_is_balanced_alone(build):
    stock = build("fasterrcnn")
    for part in OFF:
        model = apply_libra(build("fasterrcnn"), **(OFF | {part: True}))
        assert hasattr(model.backbone, "bfp") == (part == "pyramid")
        assert isinstance(model.roi_heads.fg_bg_sampler, IoUBalancedSampler) == (part == "sampler")
        assert isinstance(getattr(model.roi_heads, "box_loss", None), BalancedL1Loss) == (part == "box_loss")
        assert layout(model.rpn) == layout(stock.rpn)
        assert layout(model.roi_heads) == layout(stock.roi_heads) or part != "pyramid"


def test_a_part_that_is_given_is_used(build):
    sampler, pyramid, box_loss = IoUBalancedSampler(8), BalancedFeaturePyramid(32, refine="conv"), nn.L1Loss()
    model = apply_libra(build("fasterrcnn"), sampler=sampler, pyramid=pyramid, box_loss=box_loss)
    assert model.roi_heads.fg_bg_sampler is sampler
    assert model.roi_heads.box_loss is box_loss
    assert model.backbone.bfp is pyramid


def test_features_go_through_the_pyramid(basic_kind, build):
    stock, image = build(basic_kind), torch.rand(1, 3, 96, 96)
    pyramid = BalancedFeaturePyramid(32, init="xavier")
    expected = pyramid(stock.backbone(image))
    features = apply_libra(build(basic_kind), pyramid=pyramid).backbone(image)
    assert list(features) == list(expected)
    torch.testing.assert_close(features, expected, rtol=0, atol=0)


def test_the_pyramid_has_type_device_and_mode_of_the_model(build, device):
    model = apply_libra(build("retinanet").to(device, torch.float64).eval())
    assert {(p.device.type, p.dtype) for p in model.backbone.bfp.parameters()} == {(device, torch.float64)}
    assert not any(module.training for module in model.backbone.bfp.modules())


def test_all_that_stock_trains_and_the_pyramid_train(stock_and_balanced, targets, train_step):
    stock, balanced = stock_and_balanced
    stock_losses, stock_gradients = train_step(stock, targets)
    losses, gradients = train_step(balanced, targets)
    assert list(losses) == list(stock_losses)
    assert set(gradients) == {*stock_gradients, *NEW_KEYS}
    assert all(tensor.isfinite().all() for tensor in (*losses.values(), *gradients.values()))
    assert gradients["backbone.bfp.refine.out.weight"].any()


def test_a_batch_without_any_box_trains(stock_and_balanced, empty_targets, train_step):
    _, balanced = stock_and_balanced
    losses, gradients = train_step(balanced, empty_targets)
    assert all(tensor.isfinite().all() for tensor in (*losses.values(), *gradients.values()))
    assert set(NEW_KEYS) < set(gradients)
    assert {loss.item() for name, loss in losses.items() if "box_reg" in name or "bbox_regression" in name} == {0}


def test_trains_under_autocast(basic_kind, build, targets, empty_targets, train_step):
    model = apply_libra(build(basic_kind), rpn=basic_kind == "fasterrcnn")
    for given in (targets, empty_targets):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses, gradients = train_step(model, given)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        assert all(tensor.isfinite().all() for tensor in (*losses.values(), *gradients.values()))


def test_detections_have_the_format_of_torchvision(stock_and_balanced, detect):
    for expected, found in zip(*map(detect, stock_and_balanced), strict=True):
        assert len(found["boxes"])
        assert {name: (x.dtype, x.shape[1:]) for name, x in found.items()} == {
            name: (x.dtype, x.shape[1:]) for name, x in expected.items()
        }


def test_without_a_pyramid_the_detections_are_those_of_torchvision(kind, build, detect):
    balanced = apply_libra(build(kind), pyramid=False, rpn=kind != "retinanet")
    torch.testing.assert_close(detect(balanced), detect(build(kind)), rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_is_equal_and_independent(basic_kind, copied, build, targets, train_step):
    model = apply_libra(build(basic_kind), pyramid=BalancedFeaturePyramid(32, init="xavier"))
    twin = copied(model)
    before = train_step(model, targets)[0]
    assert train_step(twin, targets)[0] == before
    nn.init.ones_(twin.backbone.bfp.refine.out.weight)
    assert train_step(model, targets)[0] == before
    assert train_step(twin, targets)[0] != before


@pytest.mark.parametrize(
    ("kind", "stage", "stock"),
    [
        ("fasterrcnn", "roi_heads", RoIHeads),
        ("fasterrcnn", "rpn", RegionProposalNetwork),
        ("retinanet", "head.regression_head", RetinaNetRegressionHead),
    ],
)
def test_a_stage_of_another_class_is_refused_and_nothing_changed(kind, stage, stock, build):
    model = build(kind)
    model.get_submodule(stage).__class__ = type("Own", (stock,), {})
    before = layout(model)
    with pytest.raises(TypeError, match=f"model must have torchvision's {stock.__name__}, got Own"):
        apply_libra(model, rpn=stage == "rpn")
    assert layout(model) == before


def of_ones_own(*_):
    return [], []


@pytest.mark.parametrize(
    ("kind", "place", "part", "arguments", "message"),
    [
        ("fasterrcnn", "roi_heads.fg_bg_sampler", of_ones_own, {}, "sampler .* function has no batch_size_per_image"),
        ("fasterrcnn", "rpn.fg_bg_sampler", of_ones_own, {"rpn": True}, "sampler .* function has no batch_size"),
        ("fasterrcnn", "roi_heads.proposal_matcher", of_ones_own, {}, "sampler .* function has no low_threshold"),
        ("fasterrcnn", "roi_heads.forward", of_ones_own, {}, "model .* forward of RoIHeads, which was replaced"),
        ("fasterrcnn", "rpn.compute_loss", of_ones_own, {"rpn": True}, "model .* compute_loss of RegionProposalNet"),
        ("retinanet", "head.regression_head.compute_loss", of_ones_own, {}, "model .* compute_loss of RetinaNetRegr"),
        ("retinanet", "head", nn.Identity(), {}, "model .* RetinaNetRegressionHead, got NoneType"),
        ("retinanet", "anchor_generator", nn.Identity(), {}, "pyramid must be False .* Identity has no sizes"),
        ("fasterrcnn", "rpn", nn.Identity(), {}, "pyramid must be False .* NoneType has no sizes"),
    ],
)
def test_a_part_of_ones_own_that_does_not_fit_is_named_and_nothing_changed(
    kind, place, part, arguments, message, build
):
    model = build(kind)
    owner, _, name = place.rpartition(".")
    setattr(model.get_submodule(owner), name, part)
    before = layout(model)
    with pytest.raises(TypeError, match=message):
        apply_libra(model, **arguments)
    assert layout(model) == before


def test_what_is_not_replaced_may_be_of_ones_own(build):
    model = build("retinanet")
    model.head = nn.Identity()
    assert apply_libra(model, box_loss=False).backbone.bfp
    model = build("fasterrcnn")
    model.roi_heads.fg_bg_sampler = of_ones_own
    assert apply_libra(model, sampler=False).roi_heads.fg_bg_sampler is of_ones_own


@pytest.mark.parametrize("path", ["backbone", "backbone.fpn"])
def test_a_forward_that_another_library_has_set_goes_through_the_necks(path, build, targets, train_step):
    model = build("fasterrcnn")
    module = model.get_submodule(path)
    module.forward = lambda *args, own=module.forward: own(*args)
    apply_libra(model, path_aggregation=True)
    train_step(model, targets)
    for neck in (model.backbone.bfp, model.backbone.path_aggregation):
        assert all(parameter.grad is not None for parameter in neck.parameters())


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (
            "fasterrcnn",
            {"sampler": IoUBalancedSampler},
            TypeError,
            "sampler must be True, False or an IoUBalancedSampl",
        ),
        ("fasterrcnn", {"sampler": 3}, TypeError, "sampler must be True, False or an IoUBalancedSampler, got 3"),
        (
            "fasterrcnn",
            {"pyramid": "P4"},
            TypeError,
            "pyramid must be True, False or a BalancedFeaturePyramid, got 'P4'",
        ),
        ("fasterrcnn", {"box_loss": 0.11}, TypeError, "box_loss must be True, False or a loss .*, got 0.11"),
        ("fasterrcnn", {"box_loss": nn.ReLU()}, TypeError, "box_loss must be .* a loss with a reduction .*, got ReLU"),
        ("fasterrcnn", {"rpn": "yes"}, TypeError, "rpn must be True or False, got 'yes'"),
        ("retinanet", {"rpn": True}, ValueError, "rpn must be False for a RetinaNet"),
        (
            "retinanet",
            {"sampler": IoUBalancedSampler()},
            ValueError,
            "sampler must be True or False for a RetinaNet, .*got",
        ),
        ("retinanet", {"pyramid": BalancedFeaturePyramid(64)}, ValueError, "pyramid.in_channels must be 32, .* got 64"),
        (
            "fasterrcnn",
            {"pyramid": BalancedFeaturePyramid(32, refine_level=5)},
            ValueError,
            "pyramid.refine_level must be below the 5 levels of model, got 5",
        ),
        (
            "fasterrcnn",
            {"path_aggregation": 4},
            TypeError,
            "path_aggregation must be True, False or a PathAggregation, got 4",
        ),
        (
            "fasterrcnn",
            {"path_aggregation": PathAggregation(32, 3)},
            ValueError,
            "path_aggregation.num_levels must be 4, as in the fpn of model, got 3",
        ),
        (
            "retinanet",
            {"path_aggregation": PathAggregation(64, 3)},
            ValueError,
            "path_aggregation.in_channels must be 32, as in model, got 64",
        ),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_changed(kind, arguments, error, message, build):
    model = build(kind)
    before = layout(model)
    with pytest.raises(error, match=message):
        apply_libra(model, **arguments)
    assert layout(model) == before


@pytest.mark.parametrize(
    ("kind", "parts"),
    [("fasterrcnn", [part]) for part in ("pyramid", "sampler", "box_loss", "rpn", "path_aggregation")]
    + [("fasterrcnn", ["pyramid", "sampler", "box_loss"])]
    + [("retinanet", [part]) for part in ("pyramid", "box_loss", "path_aggregation")],
)
def test_applying_twice_is_an_error_and_changes_nothing(kind, parts, build):
    model = apply_libra(build(kind), **(OFF | dict.fromkeys(parts, True)))
    before = layout(model)
    with pytest.raises(ValueError, match="balanced already"):
        apply_libra(model)
    assert layout(model) == before


def test_a_backbone_with_a_pyramid_built_in_gets_the_other_parts(build):
    model = build("fasterrcnn")
    model.backbone.fpn = nn.Sequential(model.backbone.fpn, BalancedFeaturePyramid(model.backbone.out_channels))
    before = layout(model)
    with pytest.raises(ValueError, match="balanced already"):
        apply_libra(model)
    assert layout(model) == before
    assert type(apply_libra(model, pyramid=False).roi_heads) is LibraRoIHeads


@pytest.mark.parametrize("part", ["pyramid", "path_aggregation"])
def test_a_neck_of_ones_own_counts_too(part, build):
    model = apply_libra(build("fasterrcnn"), **(OFF | {part: nn.Identity()}))
    with pytest.raises(ValueError, match="balanced already"):
        apply_libra(model, pyramid=False, sampler=False)


def test_a_backbone_of_one_level_has_no_pyramid():
    backbone = nn.Sequential(nn.Conv2d(3, 32, 16, stride=16))
    backbone.out_channels = 32
    anchors, pool = AnchorGenerator(((32,),), ((1.0,),)), MultiScaleRoIAlign(["0"], 2, 2)
    model = detection.FasterRCNN(backbone, 5, rpn_anchor_generator=anchors, box_roi_pool=pool)
    before = layout(model)
    with pytest.raises(ValueError, match=r"pyramid must be False .* single level"):
        apply_libra(model)
    with pytest.raises(ValueError, match=r"path_aggregation must be False .* no FeaturePyramidNetwork"):
        apply_libra(model, pyramid=False, path_aggregation=True)
    assert layout(model) == before
    assert isinstance(apply_libra(model, pyramid=False).roi_heads.fg_bg_sampler, IoUBalancedSampler)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Linear(2, 2), "Linear"),
        (lambda: detection.fcos_resnet50_fpn(weights=None, weights_backbone=None), "FCOS"),
        (lambda: detection.FasterRCNN, "type"),
    ],
)
def test_another_model_is_refused_with_what_is_accepted(make, name):
    with torch.device("meta"):
        model = make()
    accepted = r"FasterRCNN, MaskRCNN, KeypointRCNN or RetinaNet of torchvision\.models\.detection"
    with pytest.raises(TypeError, match=f"model must be a {accepted}, got {name}"):
        apply_libra(model)
