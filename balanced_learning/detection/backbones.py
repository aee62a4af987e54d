"""Backbones by name, with a feature pyramid on the last block of each stride."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models import ResNet, WeightsEnum, get_model, get_model_weights, list_models
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7


def backbone_by_name(
    name: str,
    weights: WeightsEnum | str | None,
    progress: bool,
    trainable_layers: int | None,
    norm_layer: Callable[..., nn.Module] | None,
    channels: int,
    finest_level: int,
) -> BackboneWithFPN:
    """The backbone of torchvision's ``*_resnet50_fpn`` builders, for any ResNet or MobileNet: P2 to P6, or P3 to P7.

    Its levels have ``channels`` channels, where torchvision's have 256.

    Raises:
        ValueError: for an unknown backbone, or weights or stages it does not have.
    """
    known = list_models(module=models, include=["resnet*", "resnext*", "wide_resnet*", "mobilenet_v[23]*"])
    if name not in known:
        raise ValueError(f"backbone_name must be one of {', '.join(known)}; got {name!r}")
    num_stages = 6 if name.startswith("mobilenet") else 5
    if trainable_layers is None:
        trainable_layers = num_stages if weights is None else 3
    if not 0 <= trainable_layers <= num_stages:
        raise ValueError(f"trainable_backbone_layers must be from 0 to {num_stages} for {name}, got {trainable_layers}")
    known_weights = get_model_weights(name)
    try:
        weights = known_weights.verify(weights)
    except KeyError:
        has = ", ".join(known_weights.__members__)
        raise ValueError(f"weights_backbone must be {has} or None for {name}, got {weights!r}") from None
    norm_layer = norm_layer or (nn.BatchNorm2d if weights is None else FrozenBatchNorm2d)
    body = get_model(name, weights=weights, progress=progress, norm_layer=norm_layer)
    is_resnet = isinstance(body, ResNet)
    stages, levels = _resnet_stages(body) if is_resnet else _mobilenet_stages(body.features)
    for stage in stages[: num_stages - trainable_layers]:
        stage.requires_grad_(False)
    levels = dict(list(levels.items())[finest_level - 2 :])
    return BackboneWithFPN(
        body if is_resnet else body.features,
        return_layers={name: str(level) for level, name in enumerate(levels)},
        in_channels_list=list(levels.values()),
        out_channels=channels,
        extra_blocks=LastLevelMaxPool() if finest_level == 2 else LastLevelP6P7(channels, channels),
    )


def _resnet_stages(body: ResNet) -> tuple[list[nn.Module], dict[str, int]]:
    """The stages in torchvision's count, and the channels of the layers that end the strides of 4 to 32, by name."""
    stem = nn.ModuleList([body.conv1, body.bn1])
    levels = {f"layer{number}": body.inplanes >> 4 - number for number in range(1, 5)}
    return [stem, *(body.get_submodule(name) for name in levels)], levels


def _mobilenet_stages(blocks: Any) -> tuple[list[nn.Module], dict[str, int]]:
    """The same of a MobileNet, whose last convolution counts as a stage."""
    strided = [i for i, block in enumerate(blocks) if getattr(block, "_is_cn", False)]  # strides 4, 8, 16, 32 begin
    starts = [0, *strided, len(blocks) - 1]
    last = [*(i - 1 for i in strided[1:]), len(blocks) - 1]
    stages = [blocks[start:end] for start, end in pairwise([*starts, len(blocks)])]
    return stages, {str(i): blocks[i].out_channels for i in last}
