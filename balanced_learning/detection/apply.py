"""Turns torchvision's detectors into Libra R-CNN and Libra RetinaNet, in place."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.retinanet import RetinaNetRegressionHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from ..losses import BalancedL1Loss
from ..path_aggregation import PathAggregation
from ..pyramid import BalancedFeaturePyramid
from ..samplers import IoUBalancedSampler
from .necks import add_necks, check_path, check_pyramid
from .retinanet import LibraRetinaNetRegressionHead
from .roi_heads import LibraRoIHeads
from .rpn import LibraRPN
from .stages import has_reduction

Detector = TypeVar("Detector", FasterRCNN, RetinaNet)


def apply_libra(
    model: Detector,
    *,
    sampler: bool | Callable = True,
    pyramid: bool | nn.Module = True,
    box_loss: bool | nn.Module = True,
    rpn: bool = False,
    path_aggregation: bool | nn.Module = False,
) -> Detector:
    """Builds the three ideas of Libra R-CNN into a torchvision detector, in place.

    Weights stay, every key of the state dict keeps its name (a balanced pyramid adds ``backbone.bfp.*``, a bottom-up
    path ``backbone.path_aggregation.*``), targets and detections keep torchvision's format, and its normalisers of the
    losses stay. For each part ``True`` is the paper's setting, ``False`` torchvision's own; anything else is used as
    it is. The samplers (``fg_bg_sampler``) and matchers (``proposal_matcher``) of both stages can be exchanged as in
    torchvision.

    :func:`torch.jit.script`, which torch has deprecated, compiles the inference of a model with ``pyramid=False`` and
    no path aggregation. A balanced pyramid cannot be scripted, and a scripted model raises an error in training.

    Args:
        model (FasterRCNN or RetinaNet): a detector of torchvision, with any weights and number of classes.
            ``MaskRCNN`` and ``KeypointRCNN`` are balanced in their box branch.
        sampler (bool or IoUBalancedSampler): how the second stage samples proposals. ``True``: three bins up to the
            IoU below which a proposal is a negative (0.5), with the model's own batch size and fraction of positives.
            Or any callable that takes the labels, as torchvision's sampler does (they carry ``ious`` and
            ``matched_idxs``), or these three lists. RetinaNet samples nothing: there, ``True`` has no effect.
        pyramid (bool or BalancedFeaturePyramid): what the maps of the backbone go through. ``True``: non-local
            refinement at P4, or at the middle level of a pyramid that is not P2 to P6 or P3 to P7. It is part of the
            ``forward`` of torchvision's ``BackboneWithFPN``; a backbone of another class keeps its own and gets a
            forward hook, which torch.fx does not see.
        box_loss (bool or nn.Module): ``True``: :class:`~balanced_learning.BalancedL1Loss` with alpha 0.5, gamma 1.5 and
            beta 1 (RetinaNet: 0.11). Or a loss with a ``reduction`` attribute, such as ``nn.SmoothL1Loss(beta=1.0)``,
            the baseline of the paper's table 6. Whatever its reduction, its sum enters torchvision's normalisation.
        rpn (bool): whether the first stage is balanced, too: the parts that are not ``False``, in the paper's setting,
            with bins up to the RPN's own negative threshold (0.3) and beta 1/9. For other settings of its sampler,
            assign ``model.rpn.fg_bg_sampler = dataclasses.replace(model.rpn.fg_bg_sampler, num_bins=5)`` afterwards.
        path_aggregation (bool or PathAggregation): whether the levels of the FPN go through a bottom-up path, before
            coarser ones are made of them: PAFPN, and with a balanced pyramid behind it the paper's Balanced PAFPN
            (table 5). Their sizes must halve from level to level, which those of torchvision's MobileNet detectors do
            not. An FPN that is put in place of ``model.backbone.fpn`` afterwards is an error at the next call.

    Returns:
        FasterRCNN or RetinaNet: the same model.

    Raises:
        TypeError: for a model or part of another type.
        ValueError: if the model is balanced already, or a part does not exist in it.

    Example:
        >>> from torchvision.models.detection import fasterrcnn_resnet50_fpn
        >>> model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        >>> apply_libra(model).backbone.bfp
        BalancedFeaturePyramid(
          in_channels=256, refine_level=2
          (refine): NonLocal(
            (theta): Conv2d(256, 256, kernel_size=(1, 1), stride=(1, 1))
            (phi): Conv2d(256, 256, kernel_size=(1, 1), stride=(1, 1))
            (g): Conv2d(256, 256, kernel_size=(1, 1), stride=(1, 1))
            (out): Conv2d(256, 256, kernel_size=(1, 1), stride=(1, 1))
          )
        )
    """
    _check(model, sampler, pyramid, box_loss, rpn, path_aggregation)
    stages: list[tuple[Any, type[nn.Module], dict[str, Any]]] = []
    if isinstance(model, RetinaNet):
        if box_loss is not False:
            loss = _paper_loss(beta=0.11) if box_loss is True else box_loss
            stages.append((model.head.regression_head, LibraRetinaNetRegressionHead, {"box_loss": loss}))
    else:
        if rpn:
            parts = _parts(model.rpn, sampler is not False, box_loss is not False, beta=1 / 9)
            stages.append((model.rpn, LibraRPN, parts))
        if sampler is not False or box_loss is not False:
            stages.append((model.roi_heads, LibraRoIHeads, _parts(model.roi_heads, sampler, box_loss, beta=1.0)))
    for stage, cls, _ in stages:
        _check_methods(stage, cls)

    add_necks(model, path_aggregation, pyramid)
    for stage, cls, parts in stages:
        stage.__class__ = cls  # with its weights, settings and hooks
        for name, part in parts.items():
            setattr(stage, name, part)
    return model


def _parts(stage: Any, sampler: bool | Callable, box_loss: bool | nn.Module, beta: float) -> dict[str, Any]:
    """The attributes that balance a stage."""
    parts: dict[str, Any] = {}
    if sampler is True:
        own, matcher = stage.fg_bg_sampler, stage.proposal_matcher
        for part, name in ((own, "batch_size_per_image"), (own, "positive_fraction"), (matcher, "low_threshold")):
            if not hasattr(part, name):
                kind = type(part).__name__
                raise TypeError(f"sampler must be False or a sampler for a model whose {kind} has no {name}, got True")
        sampler = IoUBalancedSampler(own.batch_size_per_image, own.positive_fraction, max_iou=matcher.low_threshold)
    if sampler is not False:
        parts["fg_bg_sampler"] = sampler
    if box_loss is True:
        box_loss = _paper_loss(beta)
    elif box_loss is False:
        box_loss = nn.SmoothL1Loss(reduction="sum", beta=1 / 9)  # torchvision's, in both stages
    return parts | {"box_loss": box_loss}


def _check_methods(stage: nn.Module, cls: type[nn.Module]) -> None:
    """Refuses a stage with a method of its own, as other libraries set for their hooks: ours would not be called."""
    for name in vars(cls):
        if name in vars(stage):
            of = f"{name} of {type(stage).__name__}"
            raise TypeError(f"model must have torchvision's {of}, which was replaced; call apply_libra before")


def _paper_loss(beta: float) -> BalancedL1Loss:
    return BalancedL1Loss(alpha=0.5, gamma=1.5, beta=beta, reduction="sum")


def _check(
    model: nn.Module,
    sampler: bool | Callable,
    pyramid: bool | nn.Module,
    box_loss: bool | nn.Module,
    rpn: bool,
    path_aggregation: bool | nn.Module,
) -> None:
    """Everything that can be wrong, before anything is changed."""
    if not isinstance(model, FasterRCNN | RetinaNet):
        raise TypeError(
            "model must be a FasterRCNN, MaskRCNN, KeypointRCNN or RetinaNet of torchvision.models.detection, "
            f"got {type(model).__name__}"
        )
    if not (isinstance(sampler, bool) or callable(sampler)) or isinstance(sampler, type):
        raise TypeError(f"sampler must be True, False or an IoUBalancedSampler, got {sampler!r}")
    if not isinstance(pyramid, bool | nn.Module):
        raise TypeError(f"pyramid must be True, False or a BalancedFeaturePyramid, got {pyramid!r}")
    if not isinstance(box_loss, bool | nn.Module) or (box_loss not in (True, False) and not has_reduction(box_loss)):
        raise TypeError(
            f"box_loss must be True, False or a loss with a reduction of 'none', 'mean' or 'sum', got {box_loss!r}"
        )
    if not isinstance(rpn, bool):
        raise TypeError(f"rpn must be True or False, got {rpn!r}")
    if not isinstance(path_aggregation, bool | nn.Module):
        raise TypeError(f"path_aggregation must be True, False or a PathAggregation, got {path_aggregation!r}")
    ours: tuple[type, ...] = (LibraRoIHeads, LibraRPN, LibraRetinaNetRegressionHead)
    if pyramid is not False or path_aggregation is not False:
        ours += (BalancedFeaturePyramid, PathAggregation)  # which a backbone may have built in, if none is added
    has_neck = hasattr(model.backbone, "bfp") or hasattr(model.backbone, "path_aggregation")
    if has_neck or any(isinstance(module, ours) for module in model.modules()):
        raise ValueError("model is balanced already: apply_libra works once on a model, with all parts in one call")

    if isinstance(model, RetinaNet):
        if not isinstance(sampler, bool):
            raise ValueError(f"sampler must be True or False for a RetinaNet, which samples nothing, got {sampler!r}")
        if rpn:
            raise ValueError("rpn must be False for a RetinaNet, which has no RPN")
        head = getattr(model.head, "regression_head", None)
        stages = [(head, RetinaNetRegressionHead, box_loss is not False)]
    else:
        second_stage = sampler is not False or box_loss is not False
        stages = [(model.roi_heads, RoIHeads, second_stage), (model.rpn, RegionProposalNetwork, rpn)]
    for stage, stock, is_replaced in stages:
        if is_replaced and type(stage) is not stock:
            raise TypeError(f"model must have torchvision's {stock.__name__}, got {type(stage).__name__}")
    if pyramid is not False:
        check_pyramid(model, pyramid)
    if path_aggregation is not False:
        check_path(model, path_aggregation)
