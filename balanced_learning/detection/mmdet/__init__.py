"""Weights of mmdetection's detectors, carried over and back."""

from .conversion import from_mmdet, to_mmdet

__all__ = ["from_mmdet", "to_mmdet"]
