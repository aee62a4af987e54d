"""The pyramid leaves PyTorch: torch.export, and ONNX as ONNX Runtime computes it."""

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from balanced_learning import BalancedFeaturePyramid, PathAggregation
from tests.exported import assert_survives_export


def pyramid_of(height: int, width: int, images: int = 2) -> dict[str, Tensor]:
    """Levels that halve, rounding up."""
    sizes = [(-(-height // step), -(-width // step)) for step in (1, 2, 4, 8)]
    return {str(i): torch.randn(images, 4, *size) for i, size in enumerate(sizes)}


EXACT, ROUNDED = pyramid_of(24, 40), pyramid_of(21, 34)
ANY_SIZE = {name: {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC} for name in EXACT}
OTHERS = [pyramid_of(64, 32, images=3), pyramid_of(25, 42), pyramid_of(49, 23), pyramid_of(33, 65, images=5)]


@pytest.fixture(params=[("non_local", 1), ("conv", 3), (None, 2)], ids=str)
def bfp(request) -> BalancedFeaturePyramid:
    refine, refine_level = request.param
    return BalancedFeaturePyramid(4, refine=refine, refine_level=refine_level, init="xavier").eval()


@pytest.mark.parametrize("levels", [EXACT, ROUNDED], ids=["exact", "rounded"])
def test_fixed_sizes(bfp, levels):
    assert_survives_export(bfp, [levels])


def test_any_size(bfp):
    assert_survives_export(bfp, [ROUNDED, EXACT, *OTHERS], dynamic_shapes=(ANY_SIZE,))


def test_path_aggregation():
    path = PathAggregation(4, num_levels=3).eval()
    levels = [pyramid_of(*size) for size in ((32, 64), (96, 32), (64, 160))]
    steps = [Dim("height", min=2, max=40), Dim("width", min=2, max=40)]
    sizes = {name: {2: 8 // 2**i * steps[0], 3: 8 // 2**i * steps[1]} for i, name in enumerate(levels[0])}
    assert_survives_export(path, levels[:1])
    assert_survives_export(path, levels, dynamic_shapes=(sizes,))


def test_levels_that_do_not_halve_are_named():
    levels = [torch.rand(1, 4, 25, 24), torch.rand(1, 4, 6, 12)]
    with pytest.raises(RuntimeError, match="levels that halve"):
        torch.export.export(BalancedFeaturePyramid(4, refine_level=1), (levels,))
