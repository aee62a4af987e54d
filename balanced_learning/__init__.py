"""Balanced training for object detectors: the three ideas of Libra R-CNN (Pang et al., CVPR 2019) for PyTorch."""

from ._backend import backend_info, use_kernels
from .losses import BalancedL1Loss, balanced_l1_loss
from .path_aggregation import PathAggregation
from .pyramid import BalancedFeaturePyramid
from .samplers import IoUBalancedSampler

__all__ = [
    "BalancedFeaturePyramid",
    "BalancedL1Loss",
    "IoUBalancedSampler",
    "PathAggregation",
    "backend_info",
    "balanced_l1_loss",
    "use_kernels",
]
