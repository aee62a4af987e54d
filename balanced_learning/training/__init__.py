"""The machinery of the training programs. Only :func:`load_detector` is promised to stay as it is."""

from balanced_learning.training.inference import load_detector

__all__ = ["load_detector"]
