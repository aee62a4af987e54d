"""mmdetection's formulas, in words of our own, for tests and benchmarks to compare with.

They were checked against the sources of mmdetection 3.3.0 and, for the non-local block, mmcv 2.2.0, at their defaults.
"""

import math
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_learning import BalancedFeaturePyramid
from balanced_learning.refinement import ConvRefine, NonLocal


def explicit_pyramid(bfp: BalancedFeaturePyramid, levels: list[Tensor]) -> list[Tensor]:
    """The forward of mmdet/models/necks/bfp.py with the convolutions of this pyramid."""
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
    """The forward of mmcv's NonLocal2d, with the matrix of all pairs of positions."""
    theta, phi, g = (conv(x).flatten(2) for conv in (block.theta, block.phi, block.g))  # [N, C, HW]
    attention = (theta.transpose(1, 2) @ phi).softmax(dim=-1)  # [N, HW, HW]
    mixed = (attention @ g.transpose(1, 2)).transpose(1, 2).contiguous()
    return x + block.out(mixed.reshape(x.shape))


def balanced_l1(input: Tensor, target: Tensor) -> Tensor:
    """The formula of mmdet/models/losses/balanced_l1_loss.py, without reduction."""
    alpha, gamma, beta = 0.5, 1.5, 1.0
    b = math.e ** (gamma / alpha) - 1
    size = (input - target).abs()
    inlier = alpha / b * (b * size + 1) * (b * size / beta + 1).log() - alpha * size
    return torch.where(size < beta, inlier, gamma * size + gamma / b - alpha * beta)


def balanced_samples(labels: Tensor, ious: Tensor, matched_idxs: Tensor, size: int, num_positives: int) -> tuple:
    """Indices that InstanceBalancedPosSampler and IoUBalancedNegSampler choose of an image, with sets as there."""
    positives = _instance_balanced(torch.nonzero(labels > 0).flatten(), matched_idxs, num_positives)
    return positives, _iou_balanced(torch.nonzero(labels == 0).flatten(), ious, size - len(positives))


def _some(indices: Tensor | np.ndarray, num: int) -> Tensor:
    indices = torch.as_tensor(indices)
    return indices[torch.randperm(len(indices))[:num].to(indices.device)]


def _instance_balanced(positives: Tensor, matched_idxs: Tensor, num: int) -> Tensor:
    if len(positives) <= num:
        return positives
    groups = matched_idxs[positives].unique()
    share = round(num / len(groups)) + 1
    chosen = torch.cat([_some(positives[matched_idxs[positives] == group], share) for group in groups])
    if len(chosen) < num:
        rest = list(set(positives.cpu().numpy()) - set(chosen.cpu().numpy()))
        return torch.cat([chosen, _some(np.array(rest), num - len(chosen)).to(chosen.device)])
    return _some(chosen, num)


def _iou_balanced(negatives: Tensor, ious: Tensor, num: int, num_bins: int = 3) -> Tensor:
    if len(negatives) <= num:
        return negatives
    overlaps, candidates = ious.cpu().numpy(), set(negatives.cpu().numpy())
    width = overlaps.max() / num_bins
    chosen: list[np.ndarray] = []
    for k in range(num_bins):
        inside = set(np.where((overlaps >= k * width) & (overlaps < (k + 1) * width))[0])
        chosen.append(_some(np.array(list(inside & candidates), dtype=np.int64), num // num_bins).numpy())
    flat = np.concatenate(chosen)
    rest = np.array(list(candidates - set(flat)), dtype=np.int64)
    return torch.from_numpy(np.concatenate([flat, _some(rest, num - len(flat)).numpy()])).to(ious.device)


def path_aggregation(levels: list[Tensor], parameters: dict[str, Tensor], num_levels: int) -> list[Tensor]:
    """The forward of mmdet/models/necks/pafpn.py from its inter_outs on, with the convolutions spelled out."""

    def conv(name: str, x: Tensor, stride: int) -> Tensor:
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1))
        y = sum(
            torch.einsum("oc,nchw->nohw", weight[:, :, i, j], padded[..., i : i + height, j : j + width])
            for i in range(3)
            for j in range(3)
        )
        return (y + bias[:, None, None])[..., ::stride, ::stride]

    sums, outputs = [levels[0]], [levels[0]]
    for i in range(1, num_levels):
        sums.append(levels[i] + conv(f"down.{i - 1}", sums[-1], 2))
        outputs.append(conv(f"out.{i - 1}", sums[-1], 1))
    for _ in levels[num_levels:]:
        outputs.append(outputs[-1][..., ::2, ::2])
    return outputs
