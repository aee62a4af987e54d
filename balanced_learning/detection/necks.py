"""What hangs a bottom-up path and a balanced pyramid on the backbone of a detector.

With hooks, because a module around the backbone, or around a part of it, would rename the keys inside.
"""

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.ops import FeaturePyramidNetwork

from ..pyramid import BalancedFeaturePyramid, PathAggregation


def add_path(model: FasterRCNN | RetinaNet, path: Literal[True] | nn.Module) -> None:
    """Adds the path behind the levels of the FPN, before extra blocks make more of them."""
    backbone = model.backbone
    fpn = backbone.fpn
    if path is True:
        path = _matching(backbone, PathAggregation(backbone.out_channels, len(fpn.inner_blocks)))
    backbone.path_aggregation = path
    if fpn.extra_blocks is None:
        fpn.register_forward_hook(partial(_after_fpn, backbone))
    else:
        fpn.extra_blocks.register_forward_pre_hook(partial(_before_extra_blocks, backbone))


def _after_fpn(backbone: nn.Module, fpn: nn.Module, _: tuple, features: dict[str, Tensor]) -> dict[str, Tensor]:
    return backbone.get_submodule("path_aggregation")(features)


def _before_extra_blocks(backbone: nn.Module, extra_blocks: nn.Module, args: tuple[list[Tensor], ...]) -> tuple:
    levels, *others = args
    return list(backbone.get_submodule("path_aggregation")(levels)), *others


def add_pyramid(model: FasterRCNN | RetinaNet, pyramid: Literal[True] | nn.Module) -> None:
    """Adds the pyramid behind the backbone."""
    backbone = model.backbone
    if pyramid is True:
        pyramid = _matching(backbone, BalancedFeaturePyramid(backbone.out_channels, refine_level=_refine_level(model)))
    backbone.bfp = pyramid
    backbone.register_forward_hook(_after_backbone)


def _after_backbone(backbone: nn.Module, _: tuple, features: dict[str, Tensor]) -> dict[str, Tensor]:
    return backbone.get_submodule("bfp")(features)


def _matching(backbone: nn.Module, neck: nn.Module) -> nn.Module:
    """The neck with the type, device and mode of the backbone."""
    return neck.to(next(backbone.parameters())).train(backbone.training)


def _num_levels(model: FasterRCNN | RetinaNet) -> int:
    generator = model.anchor_generator if isinstance(model, RetinaNet) else model.rpn.anchor_generator
    return len(generator.sizes)


def _refine_level(model: FasterRCNN | RetinaNet) -> int:
    """The index of P4 among P2 to P6 or P3 to P7, whose coarsest levels are extra blocks; otherwise the middle."""
    num_levels = _num_levels(model)
    if num_levels != 5:
        return num_levels // 2
    fpn = getattr(model.backbone, "fpn", None)
    finest_is_p3 = len(fpn.inner_blocks) == 3 if fpn is not None else isinstance(model, RetinaNet)
    return 1 if finest_is_p3 else 2


def check_path(model: FasterRCNN | RetinaNet, path: Literal[True] | nn.Module) -> None:
    """Whether the path fits the model."""
    fpn = getattr(model.backbone, "fpn", None)
    if not isinstance(fpn, FeaturePyramidNetwork) or len(fpn.inner_blocks) < 2:
        raise ValueError(
            "path_aggregation must be False for a model whose backbone has no FeaturePyramidNetwork of two levels or "
            "more as its fpn"
        )
    if isinstance(path, PathAggregation):
        num_levels = len(fpn.inner_blocks)
        if path.num_levels != num_levels:
            raise ValueError(
                f"path_aggregation.num_levels must be {num_levels}, as in the fpn of model, got {path.num_levels}"
            )
        _check_channels(model, path, "path_aggregation")


def check_pyramid(model: FasterRCNN | RetinaNet, pyramid: Literal[True] | nn.Module) -> None:
    """Whether the pyramid fits the model."""
    num_levels = _num_levels(model)
    if num_levels < 2:
        raise ValueError("pyramid must be False for a model whose backbone has a single level")
    if isinstance(pyramid, BalancedFeaturePyramid):
        if pyramid.refine_level >= num_levels:
            raise ValueError(
                f"pyramid.refine_level must be below the {num_levels} levels of model, got {pyramid.refine_level}"
            )
        _check_channels(model, pyramid, "pyramid")


def _check_channels(model: FasterRCNN | RetinaNet, neck: Any, name: str) -> None:
    channels = model.backbone.out_channels
    if neck.in_channels != channels:
        raise ValueError(f"{name}.in_channels must be {channels}, as in model, got {neck.in_channels}")
