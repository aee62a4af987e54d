"""All that can be wrong with the options of :func:`apply_conventions`, found before anything is changed."""

from typing import Any

from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from .necks import PathAggregationFPN
from .rpn import LibraRPN
from .stages import MatchesSampler, has_reduction

_OF_RETINANET = ("p6_from", "p7_relu", "loss_normalizer")
_OF_RCNN = (
    "roi_aligned",
    "roi_sampling_ratio",
    "rpn_allowed_border",
    "rpn_max_negatives_per_positive",
    "rpn_box_loss",
)
_CHOICES = {
    "anchors": ("torchvision", "rounded", "exact", "centered"),
    "p6_from": ("p5", "c5"),
    "loss_normalizer": ("image", "batch"),
    "init": ("torchvision", "mmdet"),
}


def check_options(model: FasterRCNN | RetinaNet, options: dict[str, Any]) -> None:
    """Raises a TypeError or ValueError that names the option, unless all of them have values that there are."""
    if not isinstance(model, FasterRCNN | RetinaNet):
        raise TypeError(f"model must be a FasterRCNN or RetinaNet of torchvision, got {type(model).__name__}")
    for name, choices in _CHOICES.items():
        if options[name] not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {options[name]!r}")
    for name in ("roi_aligned", "p7_relu"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} must be True or False, got {options[name]!r}")
    _check_number(options, "roi_sampling_ratio", int)
    for name, number in (("rpn_allowed_border", int), ("rpn_max_negatives_per_positive", int | float)):
        if options[name] is not None:
            _check_number(options, name, number)
    loss = options["rpn_box_loss"]
    if loss is not None and not (isinstance(loss, nn.Module) and has_reduction(loss)):
        raise TypeError(f"rpn_box_loss must be a loss with a reduction of 'none', 'mean' or 'sum', got {loss!r}")


def _check_number(options: dict[str, Any], name: str, kind: Any) -> None:
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be a {'whole ' if kind is int else ''}number, got {value!r}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_parts(model: Any, changed: set[str]) -> None:
    """Raises an error that names the option, unless the model has what these options change.

    That is a ValueError for an option of the other kind of detector, and a TypeError for a part that is not
    torchvision's or ours.
    """
    is_rcnn = isinstance(model, FasterRCNN)
    for name in changed.intersection(_OF_RETINANET if is_rcnn else _OF_RCNN):
        kinds = ("RetinaNet", "FasterRCNN") if is_rcnn else ("FasterRCNN", "RetinaNet")
        raise ValueError("{} is an option of a {}, and must keep its default for a {}".format(name, *kinds))
    for name in sorted(changed):
        if name in ("anchors", "rpn_allowed_border"):
            _require(model.rpn if is_rcnn else model, "anchor_generator", name, AnchorGenerator)
        if name.startswith("rpn_"):
            _require(model, "rpn", name, RegionProposalNetwork, LibraRPN)
        if name == "rpn_max_negatives_per_positive":
            _require(model.rpn, "fg_bg_sampler", name, BalancedPositiveNegativeSampler, MatchesSampler)
        if name.startswith("roi_"):
            for pool in ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool"):
                if pool == "box_roi_pool" or getattr(model.roi_heads, pool, None) is not None:
                    _require(model.roi_heads, pool, name, MultiScaleRoIAlign)
        if name in ("p6_from", "p7_relu", "init"):
            _require(model.backbone, "fpn", name, FeaturePyramidNetwork, PathAggregationFPN)
        if name in ("p6_from", "p7_relu"):
            _require(model.backbone.fpn, "extra_blocks", name, LastLevelP6P7)
        if name == "init" and is_rcnn:
            _require(model.roi_heads, "box_predictor", name, FastRCNNPredictor)
        if name == "loss_normalizer":
            _require(model, "head", name, RetinaNetHead)


def _require(owner: Any, part: str, option: str, *classes: type) -> None:
    found = type(getattr(owner, part, None))
    if found not in classes:
        needed = " or ".join(cls.__name__ for cls in classes)
        raise TypeError(f"{option} needs a model with {needed} as its {part}, got {found.__name__}")
