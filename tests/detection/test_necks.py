"""The bottom-up path inside the detectors; test_apply.py has what it shares with the other parts."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn

from balanced_learning import BalancedFeaturePyramid, PathAggregation
from balanced_learning.detection import apply_libra

PAFPN = {"sampler": False, "pyramid": False, "box_loss": False, "path_aggregation": True}
NUM_LEVELS = {"fasterrcnn": 4, "retinanet": 3}  # of the FPN itself: P2 to P5, P3 to P5


def new_keys(kind: str) -> list[str]:
    convolutions = [f"{name}.{i}" for name in ("down", "out") for i in range(NUM_LEVELS[kind] - 1)]
    return [f"backbone.path_aggregation.{conv}.{part}" for conv in convolutions for part in ("weight", "bias")]


def with_extra_levels(kind: str, levels: list[Tensor], state: dict[str, Tensor]) -> list[Tensor]:
    """P6 of Faster R-CNN takes every second position of P5; P6 and P7 of RetinaNet are convolutions."""
    if kind == "fasterrcnn":
        return [*levels, levels[-1][..., ::2, ::2]]
    weights = {key.removeprefix("backbone.fpn.extra_blocks."): value for key, value in state.items()}
    p6 = F.conv2d(levels[-1], weights["p6.weight"], weights["p6.bias"], stride=2, padding=1)
    p7 = F.conv2d(p6.relu(), weights["p7.weight"], weights["p7.bias"], stride=2, padding=1)
    return [*levels, p6, p7]


@pytest.mark.parametrize("size", [(96, 96), (128, 96), (72, 104)])
def test_extra_levels_and_the_pyramid_follow_from_the_path(basic_kind, size, build):
    stock, image = build(basic_kind), torch.rand(2, 3, *size)
    features = stock.backbone(image)
    path, pyramid = PathAggregation(32, NUM_LEVELS[basic_kind]), BalancedFeaturePyramid(32, init="xavier")
    levels = path(list(features.values())[: path.num_levels])
    pafpn = dict(zip(features, with_extra_levels(basic_kind, levels, stock.state_dict()), strict=True))
    for given, expected in ((False, pafpn), (pyramid, pyramid(pafpn))):
        model = apply_libra(build(basic_kind), pyramid=given, path_aggregation=path)
        assert model.backbone.path_aggregation is path
        found = model.backbone(image)
        assert list(found) == list(features)
        torch.testing.assert_close(dict(found), dict(expected))


def test_another_path_can_be_put_in_its_place(basic_kind, build):
    model, image = apply_libra(build(basic_kind), **PAFPN), torch.rand(1, 3, 96, 96)
    model.backbone.path_aggregation = nn.Identity()
    torch.testing.assert_close(dict(model.backbone(image)), dict(build(basic_kind).backbone(image)))


def test_an_fpn_without_extra_levels_gets_a_path(build):
    def shortened() -> nn.Module:
        model = build("fasterrcnn")
        model.backbone.fpn.extra_blocks = None
        return model

    path, image = PathAggregation(32), torch.rand(1, 3, 96, 96)
    expected = path(shortened().backbone(image))
    assert len(expected) == 4
    found = apply_libra(shortened(), **PAFPN | {"path_aggregation": path}).backbone(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_keys_of_the_path_are_the_only_new_ones(basic_kind, build):
    stock, model = build(basic_kind), apply_libra(build(basic_kind), **PAFPN)
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert (missing, unexpected) == (new_keys(basic_kind), [])


def test_the_path_has_type_device_and_mode_of_the_model(build, device):
    path = apply_libra(build("retinanet").to(device, torch.float64).eval(), **PAFPN).backbone.path_aggregation
    assert {(p.device.type, p.dtype) for p in path.parameters()} == {(device, torch.float64)}
    assert not any(module.training for module in path.modules())


@pytest.mark.parametrize("pyramid", [False, True])
def test_all_that_stock_trains_and_the_path_train(basic_kind, pyramid, build, targets, train_step):
    stock_gradients = train_step(build(basic_kind), targets)[1]
    losses, gradients = train_step(apply_libra(build(basic_kind), **PAFPN | {"pyramid": pyramid}), targets)
    assert all(tensor.isfinite().all() for tensor in (*losses.values(), *gradients.values()))
    assert {name for name in gradients if "bfp" not in name} == {*stock_gradients, *new_keys(basic_kind)}
    assert all(gradients[name].any() for name in new_keys(basic_kind))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_is_equal_and_has_a_path_of_its_own(basic_kind, copied, build):
    model, image = apply_libra(build(basic_kind), path_aggregation=True), torch.rand(1, 3, 96, 96)
    twin, before = copied(model), model.backbone(image)
    torch.testing.assert_close(twin.backbone(image), before, rtol=0, atol=0)
    nn.init.ones_(twin.backbone.path_aggregation.out[0].bias)
    torch.testing.assert_close(model.backbone(image), before, rtol=0, atol=0)
    assert not torch.allclose(twin.backbone(image)["1"], before["1"])


def test_maps_that_do_not_halve_are_an_error_that_names_them():
    """Both maps of torchvision's MobileNet builders have stride 32."""
    model = apply_libra(fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None), path_aggregation=True)
    with pytest.raises(ValueError, match=r"half as high and wide.* got \[1, 256, 3, 3\] at level 1"):
        model.backbone(torch.rand(1, 3, 96, 96))
