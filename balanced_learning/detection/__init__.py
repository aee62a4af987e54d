"""Libra R-CNN and Libra RetinaNet from torchvision's detectors."""

from .apply import apply_libra
from .builders import (
    libra_fasterrcnn,
    libra_fasterrcnn_resnet50_fpn,
    libra_retinanet,
    libra_retinanet_resnet50_fpn,
)
from .mmdet import from_mmdet, to_mmdet

__all__ = [
    "apply_libra",
    "from_mmdet",
    "libra_fasterrcnn",
    "libra_fasterrcnn_resnet50_fpn",
    "libra_retinanet",
    "libra_retinanet_resnet50_fpn",
    "to_mmdet",
]
