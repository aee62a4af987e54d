"""What mmdetection does differently from torchvision, as options: with them, one can be compared with the other."""

from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, Literal, TypeVar

from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ..samplers import IoUBalancedSampler
from .anchors import FixedStrideAnchorGenerator, SizedAnchorGenerator, whole_octaves
from .convention_checks import check_options, check_parts
from .pooling import AlignedMultiScaleRoIAlign
from .retinanet import BatchNormalizedRetinaNetHead, LinearP6P7
from .rpn import LibraRPN

Detector = TypeVar("Detector", FasterRCNN, RetinaNet)
AnchorConvention = Literal["torchvision", "rounded", "exact", "centered"]
P6Source = Literal["p5", "c5"]
LossNormalizer = Literal["image", "batch"]
Init = Literal["torchvision", "mmdet"]


def apply_conventions(
    model: Detector,
    *,
    anchors: AnchorConvention = "torchvision",
    roi_aligned: bool = False,
    roi_sampling_ratio: int = 2,
    rpn_allowed_border: int | None = None,
    rpn_max_negatives_per_positive: float | None = None,
    rpn_box_loss: nn.Module | None = None,
    p6_from: P6Source = "p5",
    p7_relu: bool = True,
    loss_normalizer: LossNormalizer = "image",
    init: Init = "torchvision",
) -> Detector:
    """Lets a torchvision detector compute as mmdetection's, in place, option by option.

    By default nothing is changed. Comes after :func:`~balanced_learning.detection.apply_libra`, if that is called, and
    once. The keys of the state dict keep their names; of the weights, ``init`` and ``p6_from`` make new ones.

    Args:
        model (FasterRCNN or RetinaNet): a detector of torchvision, balanced or not.
        anchors (str): ``"torchvision"``: as far apart as the padded image divided by the size of the map, corners
            rounded. ``"rounded"``: at multiples of 4, 8, 16, ... pixels from P2 on, or 8, 16, ... from P3 of a
            RetinaNet. ``"exact"``: there, corners not rounded. ``"centered"``: in the middle between them, corners
            rounded. With these three, a RetinaNet's sizes of a third of an octave are no longer cut to whole numbers.
        roi_aligned (bool): whether RoIAlign takes pixels for points at their centre.
        roi_sampling_ratio (int): points of a bin of RoIAlign in each direction; 0: as many as it has pixels.
        rpn_allowed_border (int, optional): the RPN is not trained on anchors that reach more than so many pixels beyond
            their image, of which the padding is no part. ``None``: on all, which mmdetection calls -1.
        rpn_max_negatives_per_positive (float, optional): at most so many negatives are sampled for each positive anchor
            of an image, and for one where there is none.
        rpn_box_loss (nn.Module, optional): the box loss of the RPN, with a ``reduction`` attribute. ``None``: its own.
        p6_from (str): what P6 of a RetinaNet is made of, ``"p5"`` or ``"c5"``, the last map of the backbone's body.
        p7_relu (bool): whether there is a ReLU between P6 and P7 of a RetinaNet.
        loss_normalizer (str): ``"image"``: the losses of a RetinaNet are divided by the positives of each image, and
            averaged. ``"batch"``: divided by the positives of all images together.
        init (str): ``"mmdet"``: the FPN and the two layers of the box head get new weights by Xavier's rule, the
            classifier and the box regression of an R-CNN normal ones with deviations of 0.01 and 0.001.

    Returns:
        FasterRCNN or RetinaNet: the same model.

    Raises:
        TypeError: for a model, part or option of another type.
        ValueError: for an unknown value, or an option of the other kind of detector.

    Example:
        >>> from torchvision.models.detection import retinanet_resnet50_fpn
        >>> model = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
        >>> apply_conventions(model, p6_from="c5").backbone.fpn.extra_blocks.p6
        Conv2d(2048, 256, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
    """
    options = {name: value for name, value in locals().items() if name != "model"}
    parameters = signature(apply_conventions).parameters
    check_options(model, options)
    check_parts(model, {name for name, value in options.items() if value != parameters[name].default})
    if isinstance(model, RetinaNet):
        model.anchor_generator = _anchor_generator(model.anchor_generator, anchors, first_stride=8)
        _change_p6p7(model.backbone, p6_from, p7_relu)
        if loss_normalizer == "batch":
            model.head.__class__ = BatchNormalizedRetinaNetHead
    else:
        rpn: Any = model.rpn
        rpn.anchor_generator = _anchor_generator(rpn.anchor_generator, anchors, first_stride=4)
        _change_rpn(rpn, rpn_allowed_border, rpn_max_negatives_per_positive, rpn_box_loss)
        _change_pools(model, roi_aligned, roi_sampling_ratio)
    if init == "mmdet":
        _initialize(model)
    return model


def _anchor_generator(generator: AnchorGenerator, anchors: str, first_stride: int) -> AnchorGenerator:
    if anchors == "torchvision":
        return generator
    sizes = [whole_octaves(level) for level in generator.sizes]
    strides = [first_stride << level for level in range(len(sizes))]
    return FixedStrideAnchorGenerator(
        sizes, generator.aspect_ratios, strides, rounded=anchors != "exact", centered=anchors == "centered"
    )


def _change_rpn(
    rpn: Any, allowed_border: int | None, max_negatives_per_positive: float | None, box_loss: nn.Module | None
) -> None:
    if allowed_border is max_negatives_per_positive is box_loss is None:
        return
    if type(rpn) is RegionProposalNetwork:
        rpn.__class__ = LibraRPN
        rpn.box_loss = nn.SmoothL1Loss(reduction="sum", beta=1 / 9)  # torchvision's
    if box_loss is not None:
        rpn.box_loss = box_loss
    if max_negatives_per_positive is not None:
        sampler = rpn.fg_bg_sampler
        if isinstance(sampler, BalancedPositiveNegativeSampler):
            sampler = IoUBalancedSampler(
                sampler.batch_size_per_image, sampler.positive_fraction, num_bins=1, instance_balanced=False
            )
        rpn.fg_bg_sampler = replace(sampler, max_negatives_per_positive=max_negatives_per_positive)
    if allowed_border is not None:
        rpn.allowed_border = allowed_border
        if type(rpn.anchor_generator) is AnchorGenerator:
            rpn.anchor_generator.__class__ = SizedAnchorGenerator


def _change_p6p7(backbone: Any, p6_from: str, p7_relu: bool) -> None:
    if p6_from == "c5" and backbone.fpn.extra_blocks.use_P5:
        blocks = backbone.fpn.extra_blocks
        channels = backbone.fpn.inner_blocks[-1][0].in_channels
        blocks.p6 = LastLevelP6P7(channels, backbone.out_channels).p6.to(blocks.p6.weight).train(blocks.p6.training)
        blocks.use_P5 = False
    if not p7_relu:
        backbone.fpn.extra_blocks.__class__ = LinearP6P7


def _change_pools(model: FasterRCNN, aligned: bool, sampling_ratio: int) -> None:
    for name in ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool"):
        if (pool := getattr(model.roi_heads, name, None)) is None:
            continue
        if sampling_ratio != 2:
            pool.sampling_ratio = sampling_ratio
        if aligned:
            pool.__class__ = AlignedMultiScaleRoIAlign


def _initialize(model: Any) -> None:
    xavier = nn.init.xavier_uniform_
    layers: list[tuple[Any, Any]] = [
        (module, xavier) for module in model.backbone.fpn.modules() if isinstance(module, nn.Conv2d)
    ]
    if isinstance(model, FasterRCNN):
        heads: Any = model.roi_heads
        layers += [(module, xavier) for module in heads.box_head.modules() if isinstance(module, nn.Linear)]
        layers.append((heads.box_predictor.cls_score, partial(nn.init.normal_, std=0.01)))
        layers.append((heads.box_predictor.bbox_pred, partial(nn.init.normal_, std=0.001)))
    for layer, init in layers:
        init(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
