import inspect
import re

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum, get_model, resnet18
from torchvision.models.detection import FasterRCNN, RetinaNet, fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.detection.backbone_utils import mobilenet_backbone
from torchvision.ops import FrozenBatchNorm2d

from balanced_learning import BalancedFeaturePyramid, BalancedL1Loss, IoUBalancedSampler
from balanced_learning.detection import (
    libra_fasterrcnn,
    libra_fasterrcnn_resnet50_fpn,
    libra_retinanet,
    libra_retinanet_resnet50_fpn,
)

FROM_SCRATCH = {"weights_backbone": None, "num_classes": 7}
RESNET50 = [
    (libra_fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn),
    (libra_retinanet_resnet50_fpn, retinanet_resnet50_fpn),
]
BY_NAME = [libra_fasterrcnn, libra_retinanet]
BUILDERS = [libra_fasterrcnn_resnet50_fpn, libra_retinanet_resnet50_fpn, *BY_NAME]
BACKBONES = [
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"resnext{name}" for name in ("50_32x4d", "101_32x8d", "101_64x4d")),
    *(f"wide_resnet{depth}_2" for depth in (50, 101)),
]
MOBILENETS = ["mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"]

STAGES = ["conv1", "layer1", "layer2", "layer3", "layer4"]


def keyword_arguments(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def build(builder, **arguments) -> nn.Module:
    """A model without memory behind its weights: enough to see what it consists of."""
    with torch.device("meta"):
        return builder(**FROM_SCRATCH | arguments)


def trained_stages(model: nn.Module) -> list[str]:
    return [stage for stage in STAGES if any(p.requires_grad for p in model.backbone.body[stage].parameters())]


@pytest.mark.parametrize(("libra", "torchvision"), RESNET50)
def test_arguments_and_defaults_are_those_of_torchvision_and_apply_libra(libra, torchvision):
    parts = {"sampler": True, "pyramid": True, "box_loss": True, "rpn": False, "path_aggregation": False}
    if torchvision is retinanet_resnet50_fpn:
        parts = {"pyramid": True, "box_loss": True, "path_aggregation": False}
    assert keyword_arguments(libra) == keyword_arguments(torchvision) | parts
    assert any(p.kind is p.VAR_KEYWORD for p in inspect.signature(libra).parameters.values())


@pytest.mark.parametrize(("libra", "torchvision"), RESNET50)
def test_keys_are_those_of_torchvision_and_the_pyramid(libra, torchvision):
    stock, balanced = (build(builder).state_dict() for builder in (torchvision, libra))
    assert [key for key in balanced if not key.startswith("backbone.bfp.")] == list(stock)
    assert len(balanced) == len(stock) + 8
    assert all(balanced[key].shape == weight.shape for key, weight in stock.items())


@pytest.mark.parametrize(("by_name", "resnet50_fpn"), list(zip(BY_NAME, BUILDERS, strict=False)))
def test_by_name_resnet50_is_the_default_and_the_same_model(by_name, resnet50_fpn):
    assert str(build(by_name)) == str(build(by_name, backbone_name="resnet50")) == str(build(resnet50_fpn))
    assert keyword_arguments(by_name)["num_classes"] == 91


@pytest.mark.parametrize("builder", BUILDERS)
def test_arguments_reach_the_model(builder):
    loss = nn.L1Loss()
    model = build(builder, min_size=320, pyramid=False, box_loss=loss, path_aggregation=True)
    assert model.transform.min_size == (320,)
    if isinstance(model, FasterRCNN):
        assert model.roi_heads.box_predictor.cls_score.out_features == 7
        assert model.roi_heads.box_loss is loss
        assert build(builder, rpn=True).rpn.fg_bg_sampler == IoUBalancedSampler(256, 0.5, max_iou=0.3)
        assert not isinstance(build(builder, sampler=False).roi_heads.fg_bg_sampler, IoUBalancedSampler)
    else:
        assert model.head.classification_head.num_classes == 7
        assert model.head.regression_head.box_loss is loss
    assert model.backbone.path_aggregation.num_levels == len(model.backbone.fpn.inner_blocks)
    assert not hasattr(model.backbone, "bfp")


@pytest.mark.parametrize("builder", BUILDERS)
def test_all_parts_are_those_of_the_paper_by_default(builder):
    model = build(builder)
    retina = isinstance(model, RetinaNet)
    assert isinstance(model.backbone.bfp, BalancedFeaturePyramid)
    assert not hasattr(model.backbone, "path_aggregation")
    assert model.backbone.bfp.refine_level == (1 if retina else 2)
    loss = (model.head.regression_head if retina else model.roi_heads).box_loss
    assert isinstance(loss, BalancedL1Loss)
    assert loss.beta == (0.11 if retina else 1.0)
    assert retina or model.roi_heads.fg_bg_sampler == IoUBalancedSampler(512, 0.25, max_iou=0.5)


@pytest.mark.parametrize("builder", BY_NAME)
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnext50_32x4d"])
def test_a_backbone_by_name_is_that_of_torchvision(builder, name):
    model = build(builder, backbone_name=name)
    with torch.device("meta"):
        expected = get_model(name, weights=None).state_dict()
    found = model.backbone.body.state_dict()
    assert found.keys() == {key for key in expected if not key.startswith("fc.")}
    assert all(found[key].shape == expected[key].shape for key in found)


@pytest.mark.parametrize("builder", BY_NAME)
def test_an_unknown_backbone_is_an_error_that_lists_the_known(builder):
    with pytest.raises(ValueError, match=r"backbone_name must be one of .*; got 'resnet19'") as error:
        builder(backbone_name="resnet19", weights_backbone=None)
    assert {*BACKBONES, *MOBILENETS} <= set(re.findall(r"\w+", str(error.value)))


@pytest.mark.parametrize("builder", BY_NAME)
def test_weights_that_the_backbone_does_not_have_are_an_error(builder):
    with pytest.raises(ValueError, match="IMAGENET1K_V9"):
        builder(backbone_name="resnet18", weights_backbone="IMAGENET1K_V9")


@pytest.mark.parametrize("builder", BY_NAME)
@pytest.mark.parametrize("layers", [None, 0, 2, 5])
def test_as_many_stages_are_trained_as_wanted(builder, layers):
    model = build(builder, backbone_name="resnet18", trainable_backbone_layers=layers)
    assert trained_stages(model) == STAGES[5 - (5 if layers is None else layers) :]


@pytest.mark.parametrize("builder", BY_NAME)
def test_a_backbone_with_weights_is_frozen_as_in_torchvision(builder, monkeypatch):
    weights = resnet18().state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: weights)
    model = builder(backbone_name="resnet18", num_classes=7)
    body = model.backbone.body
    assert all(torch.equal(value, weights[name]) for name, value in body.state_dict().items())
    assert trained_stages(model) == ["layer2", "layer3", "layer4"]
    assert type(body.bn1) is FrozenBatchNorm2d
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())


@pytest.mark.parametrize("name", MOBILENETS)
@pytest.mark.parametrize("builder", BY_NAME)
def test_a_mobilenet_has_the_levels_of_a_resnet(builder, name):
    """From the last block of each stride: what a block of the same stride follows is not a level."""
    mobilenet, resnet = (build(builder, backbone_name=other).eval() for other in (name, "resnet18"))
    with torch.device("meta"):
        image = torch.zeros(1, 3, 256, 320)
    found, expected = mobilenet.backbone(image), resnet.backbone(image)
    assert {key: level.shape for key, level in found.items()} == {key: level.shape for key, level in expected.items()}
    assert mobilenet.backbone.bfp.refine_level == resnet.backbone.bfp.refine_level
    strides, size = [], image
    for block in get_model(name, weights=None).to("meta").features:
        size = block(size)
        strides.append(256 // size.shape[-2])
    ends = [str(i) for i, stride in enumerate(strides) if stride > 2 and strides[i + 1 : i + 2] != [stride]]
    assert list(mobilenet.backbone.body.return_layers) == ends[-len(mobilenet.backbone.fpn.inner_blocks) :]


@pytest.mark.parametrize("name", MOBILENETS)
@pytest.mark.parametrize("layers", [None, 0, 1, 3, 6])
def test_a_mobilenet_with_weights_is_frozen_as_in_torchvision(name, layers, monkeypatch):
    weights = get_model(name, weights=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: weights)
    found = libra_fasterrcnn(backbone_name=name, num_classes=7, trainable_backbone_layers=layers).backbone.body
    trainable = 3 if layers is None else layers
    expected = mobilenet_backbone(backbone_name=name, weights="DEFAULT", fpn=True, trainable_layers=trainable).body
    assert [str(block) for block in found.values()] == [str(block) for block in expected.values()]
    assert all(torch.equal(value, weights[f"features.{key}"]) for key, value in found.state_dict().items())
    assert trained(found) == trained(expected)


def trained(module: nn.Module) -> list[str]:
    return [key for key, parameter in module.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(("name", "most"), [("resnet18", 5), ("mobilenet_v3_small", 6)])
def test_more_stages_than_there_are_are_an_error(name, most):
    assert trained(build(libra_retinanet, backbone_name=name, trainable_backbone_layers=most).backbone.body)
    for layers in (-1, most + 1):
        with pytest.raises(ValueError, match=f"must be from 0 to {most} for {name}, got {layers}"):
            build(libra_retinanet, backbone_name=name, trainable_backbone_layers=layers)


@pytest.mark.parametrize("name", MOBILENETS)
def test_a_mobilenet_from_scratch_is_trained_whole(name):
    body = build(libra_fasterrcnn, backbone_name=name).backbone.body
    assert all(parameter.requires_grad for parameter in body.parameters())
    assert any(type(module) is nn.BatchNorm2d for module in body.modules())


@pytest.mark.parametrize(("libra", "torchvision"), RESNET50)
def test_weights_are_those_of_the_plain_detector(libra, torchvision, monkeypatch):
    weights = torchvision(weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **kwargs: weights)
    found = libra(weights="DEFAULT").state_dict()
    counters = {name for name in weights if name.endswith("num_batches_tracked")}  # frozen normalization has none
    assert all(torch.equal(found[name], weights[name]) for name in weights.keys() - counters)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("builder", BY_NAME)
def test_a_small_one_trains_and_detects(builder, name, images, targets, train_step, detect):
    model = builder(backbone_name=name, weights_backbone=None, num_classes=5, min_size=96, max_size=128)
    losses, gradients = train_step(model, targets)
    assert all(tensor.isfinite().all() for tensor in (*losses.values(), *gradients.values()))
    assert len(detect(model)) == len(images)
