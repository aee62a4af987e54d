"""Libra Faster R-CNN and Libra RetinaNet in one call, with the arguments of torchvision's builders."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torchvision.models import ResNet50_Weights, WeightsEnum
from torchvision.models.detection import (
    FasterRCNN,
    FasterRCNN_ResNet50_FPN_Weights,
    RetinaNet,
    RetinaNet_ResNet50_FPN_Weights,
    fasterrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)

from .apply import apply_libra
from .backbones import backbone_by_name
from .conventions import AnchorConvention, Init, LossNormalizer, P6Source, apply_conventions


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
    fpn_channels: int = 256,
    sampler: bool | Callable = True,
    pyramid: bool | nn.Module = True,
    box_loss: bool | nn.Module = True,
    rpn: bool = False,
    path_aggregation: bool | nn.Module = False,
    anchors: AnchorConvention = "torchvision",
    roi_aligned: bool = False,
    roi_sampling_ratio: int = 2,
    rpn_allowed_border: int | None = None,
    rpn_max_negatives_per_positive: float | None = None,
    rpn_box_loss: nn.Module | None = None,
    init: Init = "torchvision",
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
            without weights, ``FrozenBatchNorm2d`` with them; as in mmdetection:
            :class:`~balanced_learning.detection.normalization.FrozenStatisticsBatchNorm2d`.
        fpn_channels (int): channels of all levels of the pyramid.
        sampler, pyramid, box_loss, rpn, path_aggregation: see :func:`apply_libra`.
        anchors, roi_aligned, roi_sampling_ratio, rpn_allowed_border, rpn_max_negatives_per_positive, rpn_box_loss,
            init: what mmdetection does differently, see
            :func:`~balanced_learning.detection.conventions.apply_conventions`.
        **kwargs: for :class:`torchvision.models.detection.FasterRCNN`.

    Returns:
        FasterRCNN: with the inputs and outputs of :func:`libra_fasterrcnn_resnet50_fpn`.

    Raises:
        ValueError: for an unknown backbone, or weights or stages it does not have, or as the two functions above.

    Example:
        >>> model = libra_fasterrcnn(backbone_name="resnet18", weights_backbone=None, num_classes=7)
    """
    backbone = backbone_by_name(
        backbone_name,
        weights_backbone,
        progress,
        trainable_backbone_layers,
        norm_layer,
        fpn_channels,
        finest_level=2,
    )
    model = FasterRCNN(backbone, num_classes, **kwargs)
    apply_libra(model, sampler=sampler, pyramid=pyramid, box_loss=box_loss, rpn=rpn, path_aggregation=path_aggregation)
    return apply_conventions(
        model,
        anchors=anchors,
        roi_aligned=roi_aligned,
        roi_sampling_ratio=roi_sampling_ratio,
        rpn_allowed_border=rpn_allowed_border,
        rpn_max_negatives_per_positive=rpn_max_negatives_per_positive,
        rpn_box_loss=rpn_box_loss,
        init=init,
    )


def libra_retinanet(
    *,
    backbone_name: str = "resnet50",
    progress: bool = True,
    num_classes: int = 91,
    weights_backbone: WeightsEnum | str | None = "IMAGENET1K_V1",
    trainable_backbone_layers: int | None = None,
    norm_layer: Callable[..., nn.Module] | None = None,
    fpn_channels: int = 256,
    pyramid: bool | nn.Module = True,
    box_loss: bool | nn.Module = True,
    path_aggregation: bool | nn.Module = False,
    anchors: AnchorConvention = "torchvision",
    p6_from: P6Source = "p5",
    p7_relu: bool = True,
    loss_normalizer: LossNormalizer = "image",
    init: Init = "torchvision",
    **kwargs: Any,
) -> RetinaNet:
    """Libra RetinaNet on P3 to P7 of any ResNet, ResNeXt or MobileNet of torchvision.

    Args:
        backbone_name, progress, num_classes, weights_backbone, trainable_backbone_layers, norm_layer, fpn_channels:
            see :func:`libra_fasterrcnn`.
        pyramid, box_loss, path_aggregation: see :func:`apply_libra`.
        anchors, p6_from, p7_relu, loss_normalizer, init: what mmdetection does differently, see
            :func:`~balanced_learning.detection.conventions.apply_conventions`.
        **kwargs: for :class:`torchvision.models.detection.RetinaNet`.

    Returns:
        RetinaNet: with the inputs and outputs of :func:`libra_fasterrcnn_resnet50_fpn`.

    Raises:
        ValueError: for an unknown backbone, or weights or stages it does not have, or as the two functions above.

    Example:
        >>> model = libra_retinanet(backbone_name="resnet18", weights_backbone=None, num_classes=7)
    """
    backbone = backbone_by_name(
        backbone_name,
        weights_backbone,
        progress,
        trainable_backbone_layers,
        norm_layer,
        fpn_channels,
        finest_level=3,
    )
    model = RetinaNet(backbone, num_classes, **kwargs)
    apply_libra(model, pyramid=pyramid, box_loss=box_loss, path_aggregation=path_aggregation)
    return apply_conventions(
        model, anchors=anchors, p6_from=p6_from, p7_relu=p7_relu, loss_normalizer=loss_normalizer, init=init
    )
