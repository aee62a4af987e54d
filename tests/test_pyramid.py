import math
import re
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from balanced_learning import BalancedFeaturePyramid

SIZES = [(50, 84), (25, 42), (13, 21), (7, 11)]  # strides 16 to 128 of 800 x 1344


def maps(channels: int = 4, sizes: list[tuple[int, int]] = SIZES, **kwargs) -> list[Tensor]:
    return [torch.randn(2, channels, *size, **kwargs) for size in sizes]


def mmdet(levels: list[Tensor], parameters: dict[str, Tensor], r: int, refine: str | None) -> list[Tensor]:
    """The forward of mmdet/models/necks/bfp.py and of mmcv's NonLocal2d, with the attention spelled out."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight, bias = (parameters[f"refine.{name}.{kind}"] for kind in ("weight", "bias"))
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    size = levels[r].shape[2:]
    pooled = [F.adaptive_max_pool2d(level, size) for level in levels[:r]]
    enlarged = [F.interpolate(level, size, mode="nearest") for level in levels[r:]]
    x = sum(pooled + enlarged) / len(levels)
    if refine == "conv":
        x = conv("conv", x).relu()
    elif refine == "non_local":
        theta, phi, g = (conv(name, x).flatten(2) for name in ("theta", "phi", "g"))  # [N, C, HW]
        attention = torch.einsum("nci,ncj->nij", theta, phi).softmax(dim=-1)
        x = x + conv("out", torch.einsum("nij,ncj->nci", attention, g).reshape(x.shape))
    finer = [level + F.interpolate(x, level.shape[2:], mode="nearest") for level in levels[:r]]
    coarser = [level + F.adaptive_max_pool2d(x, level.shape[2:]) for level in levels[r:]]
    return finer + coarser


@pytest.mark.parametrize("refine_level", [0, 1, 2, 3])
@pytest.mark.parametrize("refine", [None, "conv", "non_local"])
def test_values_and_gradients_are_those_of_mmdetection(refine, refine_level, device):
    sizes = SIZES if refine_level else [(26, 42), (13, 21), (7, 11)]  # the full attention is big at level 0
    bfp = BalancedFeaturePyramid(4, refine_level=refine_level, refine=refine, init="xavier").double().to(device)
    levels = [level.to(device).requires_grad_() for level in maps(sizes=sizes, dtype=torch.float64)]
    parameters = dict(bfp.named_parameters())
    for name, parameter in parameters.items():
        if "bias" in name:
            nn.init.normal_(parameter)
    outputs, expected = bfp(levels), mmdet(levels, parameters, refine_level, refine)
    torch.testing.assert_close(outputs, expected)

    upstream = [torch.randn_like(level) for level in levels]
    inputs = [*levels, *parameters.values()]
    gradients, expected = (torch.autograd.grad(out, inputs, upstream) for out in (outputs, expected))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize(
    "container",
    [list, tuple, *(lambda levels, kind=kind: kind(zip("3210", levels, strict=True)) for kind in (dict, OrderedDict))],
    ids=["list", "tuple", "dict", "OrderedDict"],
)
def test_container_keys_and_order_are_kept(container):
    bfp, levels = BalancedFeaturePyramid(4, init="xavier"), maps()
    before = [level.clone() for level in levels]
    features = container(levels)
    outputs = bfp(features)
    assert type(outputs) is type(features)
    if isinstance(features, dict):
        assert list(outputs) == ["3", "2", "1", "0"]
        assert all(map(torch.equal, features.values(), before))
        outputs = list(outputs.values())
    assert all(map(torch.equal, outputs, bfp(levels)))


def test_by_default_it_starts_as_plain_integration():
    levels = maps(16)
    plain, zero, xavier = (
        BalancedFeaturePyramid(16, **arguments)(levels) for arguments in ({"refine": None}, {}, {"init": "xavier"})
    )
    assert all(map(torch.equal, zero, plain))
    assert not any(map(torch.equal, xavier, plain))


@pytest.mark.parametrize("refine", ["conv", "non_local"])
@pytest.mark.parametrize("init", ["zero", "xavier"])
def test_the_refinement_learns_from_the_start(refine, init):
    bfp = BalancedFeaturePyramid(16, refine=refine, init=init)
    sum(level.square().sum() for level in bfp(maps(16))).backward()
    last = bfp.refine.conv if refine == "conv" else bfp.refine.out
    assert last.weight.grad.count_nonzero() > 0


def test_initializations_are_those_of_mmdetection():
    xavier = BalancedFeaturePyramid(256, init="xavier").state_dict()
    for name in ("theta", "phi", "g", "out"):
        bound = math.sqrt(6 / 512)
        assert bound * 0.99 < xavier[f"refine.{name}.weight"].abs().max() <= bound
    zero = BalancedFeaturePyramid(256).state_dict()
    for name in ("theta", "phi", "g"):
        assert zero[f"refine.{name}.weight"].std().item() == pytest.approx(0.01, rel=0.02)
    assert not zero["refine.out.weight"].any()
    assert not any(state[name].any() for state in (zero, xavier) for name in state if name.endswith("bias"))


@pytest.mark.parametrize(
    ("refine", "count", "convolutions"),
    [("non_local", 263168, ["theta", "phi", "g", "out"]), ("conv", 590080, ["conv"]), (None, 0, [])],
)
def test_parameters(refine, count, convolutions):
    bfp = BalancedFeaturePyramid(refine=refine)
    assert sum(parameter.numel() for parameter in bfp.parameters()) == count
    assert list(bfp.state_dict()) == [f"refine.{name}.{kind}" for name in convolutions for kind in ("weight", "bias")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit_attention_does_not_overflow(dtype, autocast, device):
    bfp = BalancedFeaturePyramid(64).to(device)
    for conv in bfp.refine.children():
        nn.init.dirac_(conv.weight)
    levels = [(64 * level.sign() * torch.rand_like(level).add(1)).to(device) for level in maps(64, SIZES[1:])]
    assert (levels[0][0].flatten(1).T.square().sum(dim=1) > torch.finfo(torch.float16).max).any()  # as the logits
    expected = bfp(levels)
    if not autocast:
        bfp, levels = bfp.to(dtype), [level.to(dtype) for level in levels]
    levels = [level.requires_grad_() for level in levels]
    with torch.autocast(device, dtype=dtype, enabled=autocast):
        outputs = bfp(levels)
    gradients = torch.autograd.grad(sum(level.float().mean() for level in outputs), levels)
    assert all(tensor.isfinite().all() for tensor in (*outputs, *gradients))
    error = torch.cat([(a.float() - b).flatten() for a, b in zip(outputs, expected, strict=True)]).abs()
    assert error.median() < 8 * 64 * torch.finfo(dtype).eps


def test_channels_last_gives_the_same():
    bfp, levels = BalancedFeaturePyramid(16, init="xavier"), maps(16)
    outputs = bfp([level.to(memory_format=torch.channels_last) for level in levels])
    torch.testing.assert_close(outputs, bfp(levels), rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return result


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_attention_matrix_is_never_held(memory_format):
    levels = [level.to(memory_format=memory_format).requires_grad_() for level in maps(16)]
    bfp = BalancedFeaturePyramid(16, refine_level=0)
    with LargestTensor() as largest:
        sum(level.sum() for level in bfp(levels)).backward()
    assert levels[0].numel() <= largest.numel < (50 * 84) ** 2 / 10


@pytest.mark.parametrize(
    ("argument", "value"),
    [("in_channels", 0), ("refine_level", -1), ("refine", "attention"), ("init", "normal")],
)
def test_wrong_setting_is_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be .*, got '?{value}"):
        BalancedFeaturePyramid(**{argument: value})


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(3, 2, 4, 8, 8), TypeError, "features must be a list, tuple or dict of tensors, got Tensor"),
        (maps()[:1], ValueError, "features must hold two maps or more, got 1"),
        ([], ValueError, "features must hold two maps or more, got 0"),
        (maps()[:2], ValueError, "refine_level=2 needs more maps than the 2 in features"),
        (maps(3), ValueError, "features must be maps of shape [2, 4, H, W], got [2, 3, 50, 84] at level 0"),
        ([*maps()[:3], torch.zeros(1, 4, 5, 5)], ValueError, "got [1, 4, 5, 5] at level 3"),
        ([*maps()[:3], torch.zeros(2, 4, 5)], ValueError, "got [2, 4, 5] at level 3"),
    ],
)
def test_wrong_features_are_named(features, error, message):
    with pytest.raises(error, match=re.escape(message)):
        BalancedFeaturePyramid(4)(features)
