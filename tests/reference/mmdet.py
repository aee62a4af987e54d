"""mmdetection's formulas, written out for the tests and the benchmarks to compare with."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_learning import BalancedFeaturePyramid
from balanced_learning.refinement import ConvRefine, NonLocal


def explicit_pyramid(bfp: BalancedFeaturePyramid, levels: list[Tensor]) -> list[Tensor]:
    """What mmdet/models/necks/bfp.py gives with the convolutions of this pyramid."""
    r = bfp.refine_level
    size = levels[r].shape[2:]
    pooled = [F.adaptive_max_pool2d(level, size) for level in levels[:r]]
    enlarged = [F.interpolate(level, size, mode="nearest") for level in levels[r:]]
    x = reduce(torch.add, pooled + enlarged) / len(levels)
    if isinstance(bfp.refine, NonLocal):
        x = explicit_attention(bfp.refine, x)
    elif isinstance(bfp.refine, ConvRefine):
        x = bfp.refine.conv(x).relu()
    finer = [F.interpolate(x, level.shape[2:], mode="nearest") + level for level in levels[:r]]
    return finer + [F.adaptive_max_pool2d(x, level.shape[2:]) + level for level in levels[r:]]


def explicit_attention(block: NonLocal, x: Tensor) -> Tensor:
    """What NonLocal2d of mmcv gives, with the matrix of all pairs of positions."""
    theta, phi, g = (conv(x).flatten(2) for conv in (block.theta, block.phi, block.g))  # [N, C, HW]
    attention = (theta.transpose(1, 2) @ phi).softmax(dim=-1)  # [N, HW, HW]
    mixed = (attention @ g.transpose(1, 2)).transpose(1, 2).contiguous()
    return x + block.out(mixed.reshape(x.shape))
