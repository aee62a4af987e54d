import math
import re
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from balanced_learning import BalancedFeaturePyramid
from tests.reference.mmdet import explicit_pyramid

SIZES = [(50, 84), (25, 42), (13, 21), (7, 11)]  # strides 16 to 128 of 800 x 1344
Levels = namedtuple("Levels", "p2 p3 p4 p5")


def maps(channels: int = 4, sizes: list[tuple[int, int]] = SIZES, **kwargs) -> list[Tensor]:
    return [torch.randn(2, channels, *size, **kwargs) for size in sizes]


def assert_close(tensors: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> None:
    """Each differs by no more than this share of its largest value, or of 1 if that is larger."""
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=tolerance * max(1, other.abs().max().item()))


def results(
    pyramid: Callable, bfp: BalancedFeaturePyramid, levels: list[Tensor], upstream: list[Tensor]
) -> list[Tensor]:
    """The outputs, and the gradients of the levels and the parameters."""
    levels = [level.detach().requires_grad_() for level in levels]
    outputs = pyramid(levels)
    return [*outputs, *torch.autograd.grad(outputs, [*levels, *bfp.parameters()], upstream)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("refine_level", [0, 1, 2, 3])
@pytest.mark.parametrize("refine", [None, "conv", "non_local"])
def test_values_and_gradients_are_those_of_mmdetection(refine, refine_level, dtype, tolerance, device):
    sizes = SIZES if refine_level else [(26, 42), (13, 21), (7, 11)]  # the full attention is big at level 0
    bfp = BalancedFeaturePyramid(4, refine_level=refine_level, refine=refine, init="xavier").to(device, dtype)
    for name, parameter in bfp.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    levels, upstream = ([level.to(device, dtype) for level in maps(sizes=sizes)] for _ in range(2))
    outcome, count = results(bfp, bfp, levels, upstream), len(levels)
    # float32 is held against the formula in float64: two results in float32 may be off to opposite sides.
    doubled = ([level.double() for level in levels], [level.double() for level in upstream])
    expected = results(partial(explicit_pyramid, bfp.double()), bfp, *doubled)
    outcome = [tensor.double() for tensor in outcome]
    assert_close(outcome[:count], expected[:count], tolerance)
    if refine == "non_local":
        # A softmax ignores what is added to all its logits: the gradient of phi.bias is zero but for rounding, which is
        # that of the weights beside it.
        bias = 2 * count + [name for name, _ in bfp.named_parameters()].index("refine.phi.bias")
        assert outcome.pop(bias).abs().max() <= 10 * tolerance * max(1, expected[bias - 1].abs().max())
        assert expected.pop(bias).abs().max() < 1e-10
    assert_close(outcome[count:], expected[count:], 10 * tolerance)  # those of theta and phi cancel in sums


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=2, max_size=4),
    ratio=st.sampled_from([None, 1, 2, 3]),
    refine=st.sampled_from([None, "conv", "non_local"]),
    channels_last=st.booleans(),
    data=st.data(),
)
def test_any_sizes_levels_and_layouts(sizes, ratio, refine, channels_last, data):
    if ratio is not None:
        coarsest = [size % 2 + 1 for size in sizes[0]]
        sizes = [(coarsest[0] * ratio**i, coarsest[1] * ratio**i) for i in reversed(range(len(sizes)))]
    refine_level = data.draw(st.integers(0, len(sizes) - 1))
    bfp = BalancedFeaturePyramid(2, refine_level=refine_level, refine=refine, init="xavier").double()
    levels, upstream = maps(2, sizes, dtype=torch.float64), maps(2, sizes, dtype=torch.float64)
    if channels_last:
        levels = [level.to(memory_format=torch.channels_last) for level in levels]
    else:
        levels = [level.mT.contiguous().mT for level in levels]
    expected = results(partial(explicit_pyramid, bfp), bfp, levels, upstream)
    assert_close(results(bfp, bfp, levels, upstream), expected, 1e-10)


@pytest.mark.parametrize("refine", [None, "conv", "non_local"])
def test_compiles_without_a_graph_break(refine):
    bfp = BalancedFeaturePyramid(4, refine=refine, init="xavier")
    compiled = torch.compile(bfp, fullgraph=True, backend="aot_eager")
    for sizes in (SIZES, [(40, 56), (20, 28), (10, 14), (5, 7)]):  # the second time, of dynamic sizes
        levels, upstream = maps(sizes=sizes), maps(sizes=sizes)
        assert_close(results(compiled, bfp, levels, upstream), results(bfp, bfp, levels, upstream), 1e-5)


@pytest.mark.parametrize(
    "container",
    [
        *(list, tuple, lambda levels: Levels(*levels)),
        *(lambda levels, kind=kind: kind(zip("3210", levels, strict=True)) for kind in (dict, OrderedDict)),
    ],
    ids=["list", "tuple", "named tuple", "dict", "OrderedDict"],
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


def test_a_mapping_of_another_type_becomes_a_dict():
    bfp, levels = BalancedFeaturePyramid(4), maps()
    outputs = bfp(defaultdict(list, zip("3210", levels, strict=True)))
    assert type(outputs) is dict
    assert list(outputs) == ["3", "2", "1", "0"]


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
@pytest.mark.parametrize("sizes", [SIZES[1:], [(32, 40), (16, 20), (8, 10)]], ids=["rounded", "exact"])
def test_16_bit_attention_does_not_overflow(dtype, autocast, sizes, device):
    bfp = BalancedFeaturePyramid(64).to(device)
    for conv in bfp.refine.children():
        nn.init.dirac_(conv.weight)
    levels = [(64 * level.sign() * torch.rand_like(level).add(1)).to(device) for level in maps(64, sizes)]
    seen = []
    with bfp.refine.register_forward_pre_hook(lambda _, inputs: seen.append(*inputs)):
        expected = bfp(levels)
    assert (seen[0].square().sum(dim=1) > torch.finfo(torch.float16).max).any()  # of the logits
    if not autocast:
        bfp, levels = bfp.to(dtype), [level.to(dtype) for level in levels]
    levels = [level.requires_grad_() for level in levels]
    with torch.autocast(device, dtype=dtype, enabled=autocast):
        outputs = bfp(levels)
    gradients = torch.autograd.grad(sum(level.float().mean() for level in outputs), levels)
    assert all(tensor.isfinite().all() for tensor in (*outputs, *gradients))
    for ours, theirs in zip(outputs, expected, strict=True):
        error = (ours.float() - theirs).abs().flatten()  # some positions attend to another, as likely one
        assert error.quantile(0.9) < 4 * theirs.abs().max() * torch.finfo(dtype).eps


def test_the_average_of_large_maps_does_not_overflow():
    levels = [torch.full((1, 4, size, size), 20_000.0, dtype=torch.float16) for size in (16, 8, 4, 2)]
    assert all((level == 40_000).all() for level in BalancedFeaturePyramid(4, refine=None)(levels))


@pytest.mark.parametrize("refine", [None, "conv", "non_local"])
def test_autocast_leaves_float32_levels_float32(refine, device):
    levels = [level.to(device) for level in maps()]
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = BalancedFeaturePyramid(4, refine=refine).to(device)(levels)
    assert all(level.dtype == torch.float32 for level in outputs)


class Watch(TorchDispatchMode):
    """The size of the largest tensor that is made, and how many as large as the finest level are not channels last."""

    def __init__(self, finest: int = 0) -> None:
        super().__init__()
        self.finest, self.largest, self.other_layout = finest, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
                is_finest = x.dim() == 4 and x.numel() == self.finest
                self.other_layout += is_finest and not x.is_contiguous(memory_format=torch.channels_last)
        return result


@pytest.mark.parametrize("container", [list, tuple, lambda levels: OrderedDict(enumerate(levels))])
@pytest.mark.parametrize("refine", [None, "conv", "non_local"])
def test_channels_last_stays(refine, container):
    bfp = BalancedFeaturePyramid(16, refine=refine, init="xavier")
    levels, upstream = ([level.to(memory_format=torch.channels_last) for level in maps(16)] for _ in range(2))
    leaves = [level.requires_grad_() for level in levels]
    with Watch(finest=levels[0].numel()) as watch:
        outputs = bfp(container(levels))
        outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
        gradients = torch.autograd.grad(outputs, leaves, upstream)
    assert watch.other_layout == 0
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (*outputs, *gradients))
    outputs = bfp([level.contiguous() for level in levels])
    assert all(x.is_contiguous() for x in outputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_attention_matrix_is_never_held(memory_format, dtype, device):
    if (device, dtype) == ("cuda", torch.float64):
        pytest.skip("CUDA has no fused attention for float64")
    levels = [level.to(device, dtype, memory_format=memory_format).requires_grad_() for level in maps(16)]
    bfp = BalancedFeaturePyramid(16, refine_level=0).to(device, dtype)
    with Watch() as watch:
        sum(level.sum() for level in bfp(levels)).backward()
    assert levels[0].numel() <= watch.largest < (50 * 84) ** 2 / 10


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
