"""Libra Faster R-CNN and Libra RetinaNet in one call, with the arguments of torchvision's builders."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torchvision import models
from torchvision.models import ResNet, ResNet50_Weights, WeightsEnum, get_model, get_model_weights, list_models
from torchvision.models.detection import (
    FasterRCNN,
    FasterRCNN_ResNet50_FPN_Weights,
    RetinaNet,
    RetinaNet_ResNet50_FPN_Weights,
    fasterrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from .apply import apply_libra


def libra_fasterrcnn_resnet50_fpn(
    *,
    weights: FasterRCNN_ResNet50_FPN_Weights | str | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: ResNet50_Weights | str | None = ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    sampler: bool | Callable = True,
    pyramid: bool | nn.Module = True,
    box_loss: bool | nn.Module = True,
    rpn: bool = False,
    path_aggregation: bool | nn.Module = False,
    **kwargs: Any,
) -> FasterRCNN:
    """Libra Faster R-CNN with a ResNet-50 FPN, as :func:`torchvision.models.detection.fasterrcnn_resnet50_fpn`.

    Args:
        weights, progress, num_classes, weights_backbone, trainable_backbone_layers: torchvision's. ``weights`` are
            those of the plain detector, to start from; the necks have none.
        sampler, pyramid, box_loss, rpn, path_aggregation: see :func:`apply_libra`.
        **kwargs: for :func:`torchvision.models.detection.fasterrcnn_resnet50_fpn`.

    Returns:
        FasterRCNN: which takes a list of images ``[3, H, W]`` in [0, 1], in training also their targets, and returns
        a dict of losses in training, otherwise a list of detections, as torchvision's does.

    Example:
        >>> model = libra_fasterrcnn_resnet50_fpn(weights_backbone=None, num_classes=7)
    """
    model = fasterrcnn_resnet50_fpn(
        weights=weights,
        progress=progress,
        num_classes=num_classes,
        weights_backbone=weights_backbone,
        trainable_backbone_layers=trainable_backbone_layers,
        **kwargs,
    )
    return apply_libra(
        model, sampler=sampler, pyramid=pyramid, box_loss=box_loss, rpn=rpn, path_aggregation=path_aggregation
    )


def libra_retinanet_resnet50_fpn(
    *,
    weights: RetinaNet_ResNet50_FPN_Weights | str | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: ResNet50_Weights | str | None = ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    pyramid: bool | nn.Module = True,
    box_loss: bool | nn.Module = True,
    path_aggregation: bool | nn.Module = False,
    **kwargs: Any,
) -> RetinaNet:
    """Libra RetinaNet with a ResNet-50 FPN, as :func:`torchvision.models.detection.retinanet_resnet50_fpn`.

    Args:
        weights, progress, num_classes, weights_backbone, trainable_backbone_layers: torchvision's. ``weights`` are
            those of the plain detector, to start from; the necks have none.
        pyramid, box_loss, path_aggregation: see :func:`apply_libra`.
        **kwargs: for :func:`torchvision.models.detection.retinanet_resnet50_fpn`.

    Returns:
        RetinaNet: with the inputs and outputs of :func:`libra_fasterrcnn_resnet50_fpn`.

    Example:
        >>> model = libra_retinanet_resnet50_fpn(weights_backbone=None, num_classes=7)
    """
    model = retinanet_resnet50_fpn(
        weights=weights,
        progress=progress,
        num_classes=num_classes,
        weights_backbone=weights_backbone,
        trainable_backbone_layers=trainable_backbone_layers,
        **kwargs,
    )
    return apply_libra(model, pyramid=pyramid, box_loss=box_loss, path_aggregation=path_aggregation)


def libra_fasterrcnn(
    *,
    backbone_name: str = "resnet50",
    progress: bool = True,
    num_classes: int = 91,
    weights_backbone: WeightsEnum | str | None = "IMAGENET1K_V1",
    trainable_backbone_layers: int | None = None,
    norm_layer: Callable[..., nn.Module] | None = None,
    sampler: bool | Callable = True,
    pyramid: bool | nn.Module = True,
    box_loss: bool | nn.Module = True,
    rpn: bool = False,
    path_aggregation: bool | nn.Module = False,
    **kwargs: Any,
) -> FasterRCNN:
    """Libra Faster R-CNN on P2 to P6 of any ResNet, ResNeXt or MobileNet of torchvision.

    Args:
        backbone_name (str): ``"resnet18"`` to ``"resnet152"``, ``"resnext101_64x4d"``, ``"wide_resnet50_2"``,
            ``"mobilenet_v2"``, ``"mobilenet_v3_large"``, ... A level of the pyramid is made of the last block of its
            stride, so that the MobileNets, too, have P2 to P5 (torchvision's own builders give them two maps of
            stride 32).
        progress (bool): whether a download shows its progress.
        num_classes (int): number of classes, background included.
        weights_backbone (WeightsEnum or str, optional): weights of the backbone; without, it starts from scratch.
        trainable_backbone_layers (int, optional): how many stages, from the last, are trained: 0 to 5, or to 6 of a
            MobileNet, whose last convolution counts as one. By default 3 with weights, all without.
        norm_layer (Callable, optional): makes the normalization layers of the backbone. By default ``BatchNorm2d``
            without weights, ``FrozenBatchNorm2d`` with them.
        sampler, pyramid, box_loss, rpn, path_aggregation: see :func:`apply_libra`.
        **kwargs: for :class:`torchvision.models.detection.FasterRCNN`.

    Returns:
        FasterRCNN: with the inputs and outputs of :func:`libra_fasterrcnn_resnet50_fpn`.

    Raises:
        ValueError: for an unknown backbone, or weights or stages it does not have.

    Example:
        >>> model = libra_fasterrcnn(backbone_name="resnet18", weights_backbone=None, num_classes=7)
    """
    backbone = _backbone(
        backbone_name, weights_backbone, progress, trainable_backbone_layers, norm_layer, finest_level=2
    )
    model = FasterRCNN(backbone, num_classes, **kwargs)
    return apply_libra(
        model, sampler=sampler, pyramid=pyramid, box_loss=box_loss, rpn=rpn, path_aggregation=path_aggregation
    )


def libra_retinanet(
    *,
    backbone_name: str = "resnet50",
    progress: bool = True,
    num_classes: int = 91,
    weights_backbone: WeightsEnum | str | None = "IMAGENET1K_V1",
    trainable_backbone_layers: int | None = None,
    norm_layer: Callable[..., nn.Module] | None = None,
    pyramid: bool | nn.Module = True,
    box_loss: bool | nn.Module = True,
    path_aggregation: bool | nn.Module = False,
    **kwargs: Any,
) -> RetinaNet:
    """Libra RetinaNet on P3 to P7 of any ResNet, ResNeXt or MobileNet of torchvision.

    Args:
        backbone_name, progress, num_classes, weights_backbone, trainable_backbone_layers, norm_layer: see
            :func:`libra_fasterrcnn`.
        pyramid, box_loss, path_aggregation: see :func:`apply_libra`.
        **kwargs: for :class:`torchvision.models.detection.RetinaNet`.

    Returns:
        RetinaNet: with the inputs and outputs of :func:`libra_fasterrcnn_resnet50_fpn`.

    Raises:
        ValueError: for an unknown backbone, or weights or stages it does not have.

    Example:
        >>> model = libra_retinanet(backbone_name="resnet18", weights_backbone=None, num_classes=7)
    """
    backbone = _backbone(
        backbone_name, weights_backbone, progress, trainable_backbone_layers, norm_layer, finest_level=3
    )
    return apply_libra(
        RetinaNet(backbone, num_classes, **kwargs),
        pyramid=pyramid,
        box_loss=box_loss,
        path_aggregation=path_aggregation,
    )


def _backbone(
    name: str,
    weights: WeightsEnum | str | None,
    progress: bool,
    trainable_layers: int | None,
    norm_layer: Callable[..., nn.Module] | None,
    finest_level: int,
) -> BackboneWithFPN:
    """The backbone of torchvision's ``*_resnet50_fpn`` builders, for any ResNet or MobileNet: P2 to P6, or P3 to P7."""
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
