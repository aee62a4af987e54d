"""A bottom-up path and a balanced pyramid in the backbone of a detector.

A module around the backbone, or around a part of it, would rename the keys inside; so torchvision's own get a subclass
of their class, whose ``forward`` runs the necks. Backbones of other classes keep theirs, and get hooks.
"""

from collections import OrderedDict
from functools import partial
from itertools import chain
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FeaturePyramidNetwork

from ..path_aggregation import PathAggregation
from ..pyramid import BalancedFeaturePyramid

_REPLACED = "backbone.fpn was replaced after apply_libra by one without backbone.path_aggregation: replace it before"


class LibraBackboneWithFPN(BackboneWithFPN):
    """:class:`torchvision.models.detection.backbone_utils.BackboneWithFPN` with necks behind its FPN.

    Attributes:
        path_aggregation (nn.Module): where there is one, the levels of ``fpn`` go through it before coarser ones are
            made of them.
        bfp (nn.Module): where there is one, all levels go through it.
    """

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        if not hasattr(self, "path_aggregation"):
            features = self.fpn(features)
        elif type(self.fpn) is FeaturePyramidNetwork:
            raise RuntimeError(_REPLACED)
        else:
            features = self.fpn(features, path_aggregation=self.path_aggregation)
        if hasattr(self, "bfp"):
            features = self.bfp(features)
        return features


class PathAggregationFPN(FeaturePyramidNetwork):
    """:class:`torchvision.ops.FeaturePyramidNetwork` that takes a bottom-up path for its levels.

    The path is an argument, not a part: its weights have the keys ``backbone.path_aggregation.*``. torch.fx hands it
    over as an attribute of the backbone.
    """

    def forward(self, x: dict[str, Tensor], path_aggregation: nn.Module | None = None) -> dict[str, Tensor]:
        if path_aggregation is None:
            return super().forward(x)
        names, maps = list(x), list(x.values())
        sums = [block(level) for block, level in zip(self.inner_blocks, maps, strict=True)]
        for i in reversed(range(len(sums) - 1)):
            sums[i] = sums[i] + F.interpolate(sums[i + 1], size=sums[i].shape[-2:], mode="nearest")
        levels = path_aggregation([block(level) for block, level in zip(self.layer_blocks, sums, strict=True)])
        levels = [levels[i] for i in range(len(names))]  # torch.fx cannot iterate over what the path returns
        if self.extra_blocks is not None:
            levels, names = self.extra_blocks(levels, maps, names)
        return OrderedDict(zip(names, levels, strict=True))


def add_necks(model: FasterRCNN | RetinaNet, path: bool | nn.Module, pyramid: bool | nn.Module) -> None:
    """Adds the path behind the levels of the FPN and the pyramid behind the backbone, those that are not False."""
    if path is False and pyramid is False:
        return
    backbone = model.backbone
    fpn: Any = getattr(backbone, "fpn", None)
    is_stock = _is_stock(backbone, BackboneWithFPN) and (path is False or _is_stock(fpn, FeaturePyramidNetwork))
    if is_stock:
        backbone.__class__ = LibraBackboneWithFPN
    if path is not False:
        if path is True:
            path = _matching(model, PathAggregation(backbone.out_channels, len(fpn.inner_blocks)))
        backbone.path_aggregation = path
        if is_stock:
            fpn.__class__ = PathAggregationFPN
        else:
            _hook_path(backbone)
    if pyramid is not False:
        if pyramid is True:
            refine_level = find_refine_level(model, _num_levels(model))
            pyramid = _matching(model, BalancedFeaturePyramid(backbone.out_channels, refine_level=refine_level))
        backbone.bfp = pyramid
        if not is_stock:
            backbone.register_forward_hook(_after_backbone)


def _hook_path(backbone: nn.Module) -> None:
    fpn: Any = backbone.get_submodule("fpn")
    hooked = fpn
    if fpn.extra_blocks is None:
        fpn.register_forward_hook(partial(_after_fpn, backbone))
    else:
        hooked = fpn.extra_blocks
        hooked.register_forward_pre_hook(partial(_before_extra_blocks, backbone))
    backbone.register_forward_pre_hook(partial(_before_backbone, hooked))


def _before_backbone(hooked: nn.Module, backbone: nn.Module, _: tuple) -> None:
    if all(module is not hooked for module in backbone.get_submodule("fpn").modules()):
        raise RuntimeError(_REPLACED)


def _after_fpn(backbone: nn.Module, fpn: nn.Module, _: tuple, features: dict[str, Tensor]) -> dict[str, Tensor]:
    return backbone.get_submodule("path_aggregation")(features)


def _before_extra_blocks(backbone: nn.Module, extra_blocks: nn.Module, args: tuple[list[Tensor], ...]) -> tuple:
    levels, *others = args
    return list(backbone.get_submodule("path_aggregation")(levels)), *others


def _after_backbone(backbone: nn.Module, _: tuple, features: dict[str, Tensor]) -> dict[str, Tensor]:
    return backbone.get_submodule("bfp")(features)


def _matching(model: FasterRCNN | RetinaNet, neck: nn.Module) -> nn.Module:
    """The neck with the type, device and mode of the backbone or, if that has no weights, of the model."""
    tensors = chain(model.backbone.parameters(), model.backbone.buffers(), model.parameters())
    example = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    return (neck if example is None else neck.to(example)).train(model.backbone.training)


def _is_stock(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether it runs the forward of its class, and not one that another library has set on it."""
    return type(module) is cls and "forward" not in vars(module)


def _num_levels(model: FasterRCNN | RetinaNet) -> int:
    generator = getattr(model if isinstance(model, RetinaNet) else model.rpn, "anchor_generator", None)
    if generator is None or not hasattr(generator, "sizes"):
        raise TypeError(
            f"pyramid must be False for a model whose {type(generator).__name__} has no sizes, which tell the levels"
        )
    return len(generator.sizes)


def find_refine_level(model: FasterRCNN | RetinaNet, num_levels: int) -> int:
    """The index of P4 among P2 to P6 or P3 to P7, whose coarsest levels are extra blocks; otherwise the middle."""
    if num_levels != 5:
        return num_levels // 2
    fpn: Any = getattr(model.backbone, "fpn", None)
    is_known = isinstance(fpn, FeaturePyramidNetwork)
    finest_is_p3 = len(fpn.inner_blocks) == 3 if is_known else isinstance(model, RetinaNet)
    return 1 if finest_is_p3 else 2


def check_path(model: FasterRCNN | RetinaNet, path: bool | nn.Module) -> None:
    """Raises a ValueError unless the path fits the model."""
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


def check_pyramid(model: FasterRCNN | RetinaNet, pyramid: bool | nn.Module) -> None:
    """Raises a ValueError unless the pyramid fits the model."""
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
