"""Backbones by name, with a feature pyramid on the last block of each stride."""

from collections.abc import Callable

from torch import nn
from torchvision import models
from torchvision.models import ResNet, WeightsEnum, get_model, get_model_weights, list_models
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7


def backbone_by_name(
    name: str,
    weights: WeightsEnum | str | None,
    progress: bool,
    trainable_layers: int | None,
    norm_layer: Callable[..., nn.Module] | None,
    finest_level: int,
) -> BackboneWithFPN:
    """The backbone of torchvision's ``*_resnet50_fpn`` builders, for any ResNet or MobileNet: P2 to P6, or P3 to P7.

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
    extra_blocks = LastLevelMaxPool() if finest_level == 2 else LastLevelP6P7(256, 256)
    if isinstance(body, ResNet):
        stages = list(range(finest_level - 1, 5))
        return _resnet_fpn_extractor(body, trainable_layers, returned_layers=stages, extra_blocks=extra_blocks)
    return _mobilenet_fpn(body.features, trainable_layers, finest_level, extra_blocks)


def _mobilenet_fpn(
    blocks: nn.Sequential, trainable_layers: int, finest_level: int, extra_blocks: ExtraFPNBlock
) -> BackboneWithFPN:
    """A pyramid from ``finest_level`` to P5 and extra blocks; ``trainable_layers`` counts torchvision's six stages."""
    strided = [i for i, block in enumerate(blocks) if getattr(block, "_is_cn", False)]  # strides 4, 8, 16, 32 begin
    stages = [0, *strided, len(blocks) - 1]
    first_trained = [*stages, len(blocks)][len(stages) - trainable_layers]
    blocks[:first_trained].requires_grad_(False)
    last = [*(i - 1 for i in strided[1:]), len(blocks) - 1][finest_level - 2 :]
    return BackboneWithFPN(
        blocks,
        return_layers={str(i): str(level) for level, i in enumerate(last)},
        in_channels_list=[blocks[i].out_channels for i in last],
        out_channels=256,
        extra_blocks=extra_blocks,
    )
