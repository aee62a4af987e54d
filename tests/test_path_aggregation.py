import math
import re
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from balanced_learning import PathAggregation
from tests.reference.mmdet import path_aggregation

EVEN = [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
ODD = [(25, 21), (13, 11), (7, 6), (4, 3), (2, 2), (1, 1)]


def maps(sizes: list[tuple[int, int]] = ODD, channels: int = 3, **kwargs) -> list[Tensor]:
    return [torch.randn(2, channels, *size, **kwargs) for size in sizes]


@pytest.mark.parametrize("sizes", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize(("num_levels", "num_maps"), [(2, 2), (3, 3), (4, 4), (4, 5), (3, 6)])
def test_values_and_gradients_are_those_of_mmdetection(sizes, num_levels, num_maps, device):
    path = PathAggregation(3, num_levels).double().to(device)
    parameters = dict(path.named_parameters())
    for name, parameter in parameters.items():
        if "bias" in name:
            nn.init.normal_(parameter)
    levels = [level.to(device).requires_grad_() for level in maps(sizes[:num_maps], dtype=torch.float64)]
    found, wanted = path(levels), path_aggregation(levels, parameters, num_levels)
    torch.testing.assert_close(found, wanted)

    upstream = [torch.randn_like(level) for level in levels]
    inputs = [*levels[:num_levels], *parameters.values()]
    found, wanted = (torch.autograd.grad(outputs, inputs, upstream) for outputs in (found, wanted))
    torch.testing.assert_close(found, wanted)


def test_a_map_beyond_the_path_is_only_asked_for_its_shape():
    path, levels = PathAggregation(3), maps()[:5]
    with_nan = [*levels[:4], torch.full_like(levels[4], torch.nan)]
    torch.testing.assert_close(path(with_nan), path(levels), rtol=0, atol=0)


@pytest.mark.parametrize(
    "container",
    [list, tuple, *(lambda levels, kind=kind: kind(zip("54321", levels, strict=True)) for kind in (dict, OrderedDict))],
    ids=["list", "tuple", "dict", "OrderedDict"],
)
def test_container_keys_and_order_are_kept(container):
    path, levels = PathAggregation(3), maps()[:5]
    before = [level.clone() for level in levels]
    features = container(levels)
    outputs = path(features)
    assert type(outputs) is type(features)
    if isinstance(features, dict):
        assert list(outputs) == ["5", "4", "3", "2", "1"]
        features, outputs = list(features.values()), list(outputs.values())
    assert len(features) == 5
    assert all(map(torch.equal, features, before))
    assert all(map(torch.equal, outputs, path(levels)))


def test_parameters_and_initialization():
    state = PathAggregation().state_dict()
    assert list(state) == [
        f"{name}.{i}.{kind}" for name in ("down", "out") for i in range(3) for kind in ("weight", "bias")
    ]
    bound = math.sqrt(6 / (2 * 9 * 256))  # Xavier's
    for name, value in state.items():
        if name.endswith("bias"):
            assert value.shape == (256,)
            assert not value.any()
        else:
            assert value.shape == (256, 256, 3, 3)
            assert bound * 0.99 < value.abs().max() <= bound
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_channels_last_stays_and_gives_the_same():
    path, levels = PathAggregation(16), maps(channels=16)[:5]
    outputs = path([level.to(memory_format=torch.channels_last) for level in levels])
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in outputs)
    torch.testing.assert_close(outputs, path(levels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [EVEN[:5], ODD[:5]], ids=["even", "odd"])
def test_it_compiles_as_one_graph_and_exports(sizes):
    path, levels = PathAggregation(3), maps(sizes)
    torch.testing.assert_close(torch.compile(path, backend="eager", fullgraph=True)(levels), path(levels))
    torch.testing.assert_close(export(path, (levels,)).module()(levels), path(levels))


def test_it_exports_with_the_sizes_of_images_left_open():
    """Of images whose sides are multiples of 32, as torchvision pads them: strides 4 to 64."""
    path = PathAggregation(3)
    batch, height, width = Dim("batch"), Dim("height", min=2), Dim("width", min=2)
    open_sizes = [{0: batch, 2: scale * height, 3: scale * width} for scale in (8, 4, 2, 1)]
    program = export(path, (maps(EVEN[:4]),), dynamic_shapes=(open_sizes,)).module()
    for image in ((2, 2), (7, 5), (25, 42)):
        levels = [torch.randn(3, 3, scale * image[0], scale * image[1]) for scale in (8, 4, 2, 1)]
        torch.testing.assert_close(program(levels), path(levels))


@pytest.mark.parametrize(("argument", "value"), [("in_channels", 0), ("num_levels", 1)])
def test_wrong_setting_is_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be at least {value + 1}, got {value}"):
        PathAggregation(**{argument: value})


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(4, 2, 3, 8, 8), TypeError, "features must be a list, tuple or dict of tensors, got Tensor"),
        (maps()[:3], ValueError, "features must hold num_levels=4 maps or more, got 3"),
        (maps(channels=5), ValueError, "of shape [2, 3, H, W], each half as high and wide"),
        (maps(channels=5), ValueError, "got [2, 5, 25, 21] at level 0"),
        ([*maps()[:3], torch.zeros(1, 3, 4, 3)], ValueError, "got [1, 3, 4, 3] at level 3"),
        ([*maps()[:3], torch.zeros(2, 3, 4)], ValueError, "got [2, 3, 4] at level 3"),
        (maps([*ODD[:2], (6, 6), (3, 3)]), ValueError, "got [2, 3, 6, 6] at level 2"),  # rounded down
        (maps([*ODD[:2], (7, 7), (4, 4)]), ValueError, "got [2, 3, 7, 7] at level 2"),
        (maps([*EVEN[:3], (5, 6)]), ValueError, "got [2, 3, 5, 6] at level 3"),
        (maps([*ODD[:4], (4, 3)]), ValueError, "got [2, 3, 4, 3] at level 4"),
    ],
)
def test_wrong_features_are_named(features, error, message):
    with pytest.raises(error, match=re.escape(message)):
        PathAggregation(3)(features)
