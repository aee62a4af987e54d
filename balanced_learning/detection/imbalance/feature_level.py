"""The feature level: which maps of the backbone a detection uses, and how alike the levels of the pyramid are."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class FeatureLevel:
    """What the L levels of a pyramid are made of, and what they have in common.

    NaN where there is nothing to measure.
    """

    levels: list[str]  # such as P2, by the power of two of the stride, finest first
    body_maps: list[str]  # such as C2, those of the backbone's body that enter the FPN
    boxes: list[float]  # the share of the positives that use each level
    contribution: Tensor  # [L, B]: of the boxes on level l, the share of each map of the body; rows sum to 1
    likeness_before: Tensor  # [L, L]: linear CKA of the levels before integration
    likeness_after: Tensor  # [L, L]: and after it


class LevelMeter:
    """Measures :class:`FeatureLevel` of a detector, batch by batch.

    Args:
        model (FasterRCNN or RetinaNet): torchvision's own, or after
            :func:`~balanced_learning.detection.apply_libra`.
    """

    def __init__(self, model: Any) -> None: ...

    def add(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> None:
        """Measures a batch: images in [0, 1], and torchvision's targets, on the device of the model."""
        raise NotImplementedError

    def result(self) -> FeatureLevel:
        """Of all batches so far."""
        raise NotImplementedError
