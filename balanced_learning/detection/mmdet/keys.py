"""The names of weights in mmdetection and in torchvision's detectors."""

import re
from collections.abc import Callable, Iterable

# The FPN is the first in a list of necks, of which a balanced pyramid is the second; alone, it has no number. {} is a
# number; what follows stays.
_NAMES = [
    ("backbone.", "backbone.body."),
    ("neck.0.lateral_convs.{}.conv.", "backbone.fpn.inner_blocks.{}.0."),
    ("neck.0.fpn_convs.{}.conv.", "backbone.fpn.layer_blocks.{}.0."),
    ("neck.0.downsample_convs.{}.conv.", "backbone.path_aggregation.down.{}."),
    ("neck.0.pafpn_convs.{}.conv.", "backbone.path_aggregation.out.{}."),
    ("neck.1.refine.conv_out.conv.", "backbone.bfp.refine.out."),
    ("neck.1.refine.theta.conv.", "backbone.bfp.refine.theta."),
    ("neck.1.refine.phi.conv.", "backbone.bfp.refine.phi."),
    ("neck.1.refine.g.conv.", "backbone.bfp.refine.g."),
    ("neck.1.refine.conv.", "backbone.bfp.refine.conv."),
]
_TWO_STAGE_NAMES = [
    ("rpn_head.rpn_conv.", "rpn.head.conv.0.0."),
    ("rpn_head.rpn_cls.", "rpn.head.cls_logits."),
    ("rpn_head.rpn_reg.", "rpn.head.bbox_pred."),
    ("roi_head.bbox_head.shared_fcs.0.", "roi_heads.box_head.fc6."),
    ("roi_head.bbox_head.shared_fcs.1.", "roi_heads.box_head.fc7."),
    ("roi_head.bbox_head.fc_cls.", "roi_heads.box_predictor.cls_score."),
    ("roi_head.bbox_head.fc_reg.", "roi_heads.box_predictor.bbox_pred."),
    ("roi_head.mask_head.convs.{}.conv.", "roi_heads.mask_head.{}.0."),
    ("roi_head.mask_head.upsample.", "roi_heads.mask_predictor.conv5_mask."),
    ("roi_head.mask_head.conv_logits.", "roi_heads.mask_predictor.mask_fcn_logits."),
]
_RETINANET_NAMES = [
    ("neck.0.fpn_convs.3.conv.", "backbone.fpn.extra_blocks.p6."),
    ("neck.0.fpn_convs.4.conv.", "backbone.fpn.extra_blocks.p7."),
    *_NAMES,
    ("bbox_head.cls_convs.{}.conv.", "head.classification_head.conv.{}.0."),
    ("bbox_head.reg_convs.{}.conv.", "head.regression_head.conv.{}.0."),
    ("bbox_head.retina_cls.", "head.classification_head.cls_logits."),
    ("bbox_head.retina_reg.", "head.regression_head.bbox_reg."),
]

# What older versions, and processes that shared the work, made of the same names.
_OLD_NAMES = [
    (r"module\.", ""),
    (r"bbox_head\.(cls|reg)_convs\.(\d+)\.(?=weight|bias)", r"bbox_head.\1_convs.\2.conv."),
    (r"bbox_head\.(?=shared_fcs|fc_cls|fc_reg)", "roi_head.bbox_head."),
    (r"mask_head\.", "roi_head.mask_head."),
]


def current_name(key: str) -> str:
    """The name that mmdetection 3 gives to a weight of an older version."""
    for old, new in _OLD_NAMES:
        key = re.sub(f"^{old}", new, key)
    return key


def to_torchvision(is_retinanet: bool) -> Callable[[str], str | None]:
    """A function from mmdetection's name of a weight to torchvision's; it gives ``None`` for what it does not know."""
    return _renaming(_names(is_retinanet))


def to_mmdetection(is_retinanet: bool) -> Callable[[str], str | None]:
    """The function back."""
    return _renaming((new, old) for old, new in _names(is_retinanet))


def _names(is_retinanet: bool) -> list[tuple[str, str]]:
    return _RETINANET_NAMES if is_retinanet else [*_NAMES, *_TWO_STAGE_NAMES]


def _renaming(names: Iterable[tuple[str, str]]) -> Callable[[str], str | None]:
    patterns = [(re.compile(_pattern(old)), new + "{}") for old, new in names]

    def rename(key: str) -> str | None:
        found = ((pattern.fullmatch(key), new) for pattern, new in patterns)
        return next((new.format(*match.groups()) for match, new in found if match), None)

    return rename


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\{\}", r"(\d+)").replace(r"neck\.0\.", r"neck\.(?:0\.)?") + "(.+)"
