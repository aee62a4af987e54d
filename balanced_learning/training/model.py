"""The detector that a configuration asks for."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from balanced_learning import BalancedFeaturePyramid, BalancedL1Loss, IoUBalancedSampler, _torch_private
from balanced_learning.detection import apply_libra, libra_fasterrcnn, libra_retinanet
from balanced_learning.detection.conventions import apply_conventions
from balanced_learning.detection.normalization import FrozenStatisticsBatchNorm2d
from balanced_learning.detection.pooling import settle_strides
from balanced_learning.detection.proposals import first_stage, second_stage
from balanced_learning.detection.stages import WeightedLoss
from balanced_learning.training import distributed, randomness
from balanced_learning.training.checkpoint import Checkpoint, set_norm_eps
from balanced_learning.training.config import Config, ConventionsConfig, ModelConfig
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError
from balanced_learning.training.small import small_fasterrcnn, small_retinanet
from balanced_learning.training.transform import ResizingFirst
from balanced_learning.training.weights import load_weights


def make_model(config: Config, labels: Labels, checkpoint: Checkpoint | None) -> Any:
    """Builds the model of a run on the CPU, with the weights of its checkpoint or those that it starts from.

    What it takes of the latter is printed.

    Raises:
        UserError: as :func:`build_model`, or if weights cannot be had or do not fit.
    """
    with randomness.seeded(config.training.seed, "weights"):
        model = build_model(config, labels.num_classes)
    if checkpoint:
        checkpoint.restore({"model": model})
        set_norm_eps(model, checkpoint.norm_eps)
    elif (taken := load_weights(model, config.model, labels)) and distributed.is_main():
        print(taken)
    return model


def prepare(model: Any, config: ModelConfig, device: torch.device) -> Any:
    """Puts a model on the device that it trains on, in the form that the settings ask for.

    The names of its state dict stay.
    """
    model = model.to(device)
    if config.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.compile:
        _torch_private.compile_for_every_size()
        model.backbone.compile(dynamic=False)  # in place, for each size: with sizes left open, inductor fails on CPUs
    return model


def build_model(config: Config, num_classes: int) -> FasterRCNN | RetinaNet:
    """Builds Libra Faster R-CNN, one of its stages or Libra RetinaNet, or what is left of it with parts switched off.

    Nothing is read or downloaded: but for the values of its weights, the detector is as it will be with those that it
    starts from.

    Args:
        config: the settings.
        num_classes: background included.

    Raises:
        UserError: for a backbone that there is not, or not with as many stages to train, and for settings that a
            detector of this kind does not have.
    """
    detector = _build(config, num_classes)
    if config.model.is_rpn:
        first_stage(detector)
    elif config.model.is_fast_rcnn:
        second_stage(detector)
    detector.transform.__class__ = ResizingFirst
    if not config.model.is_retinanet and not config.model.is_rpn:
        settle_strides(detector)
    return detector


def _build(config: Config, num_classes: int) -> FasterRCNN | RetinaNet:
    model = config.model
    parts: dict[str, Any] = {
        "pyramid": model.pyramid,
        "box_loss": _box_loss(config),
        "path_aggregation": model.path_aggregation,
    }
    if not model.is_retinanet:
        parts |= {"sampler": model.sampler, "rpn": model.balances_rpn}
    options = _torchvisions_options(config)
    try:
        if model.small:
            make = small_retinanet if model.is_retinanet else small_fasterrcnn
            detector = apply_libra(make(num_classes, **options), **parts)
        else:
            build = libra_retinanet if model.is_retinanet else libra_fasterrcnn
            options |= parts | _backbone_options(config) | _anchor_options(model)
            detector = build(num_classes=num_classes, **options)
    except ValueError as error:
        raise UserError(f"--backbone {model.backbone}: {error}") from None
    _tune_parts(detector, config)
    try:
        return apply_conventions(detector, **_conventions(config))
    except ValueError as error:
        raise UserError(f"--model {model.model}: {error}") from None


def _torchvisions_options(config: Config) -> dict[str, Any]:
    """The arguments of torchvision's detectors."""
    model, conventions = config.model, config.conventions
    options: dict[str, Any] = {"min_size": model.min_size, "max_size": model.max_size}
    options["_skip_resize"] = config.data.data_augmentation in ("multiscale", "lsj")  # they decide the size in training
    limit = conventions.detections_per_image
    if model.is_retinanet:
        return options | ({} if limit is None else {"detections_per_img": limit})
    options |= {
        "rpn_score_thresh": model.rpn_score_thresh,
        "box_detections_per_img": limit,
        "box_batch_size_per_image": model.box_batch_size_per_image,
    }
    for when in ("pre_nms_top_n_train", "pre_nms_top_n_test", "post_nms_top_n_train", "post_nms_top_n_test"):
        options[f"rpn_{when}"] = getattr(conventions, f"rpn_{when}")
    return {name: value for name, value in options.items() if value is not None}


_NORMS = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d, "frozen_statistics": FrozenStatisticsBatchNorm2d}


def _backbone_options(config: Config) -> dict[str, Any]:
    model, norm = config.model, config.conventions.norm
    options: dict[str, Any] = {"backbone_name": model.backbone, "weights_backbone": None}
    options["fpn_channels"] = model.fpn_channels
    if model.weights or model.weights_backbone:  # what torchvision's builders do to a backbone with weights
        options |= {"norm_layer": FrozenBatchNorm2d, "trainable_backbone_layers": 3}
    if norm:
        options["norm_layer"] = _NORMS[norm]
    if model.trainable_backbone_layers is not None:
        options["trainable_backbone_layers"] = model.trainable_backbone_layers
    return options


def _anchor_options(model: ModelConfig) -> dict[str, Any]:
    """Anchors of another size than torchvision's, on its five levels, and a pooler that takes boxes of their sizes."""
    if model.anchor_size == ModelConfig.anchor_size:
        return {}
    sizes = [model.anchor_size * 2**level for level in range(5)]
    ratios = [(0.5, 1.0, 2.0)] * len(sizes)
    if model.is_retinanet:
        octaves = [tuple(int(size * 2 ** (third / 3)) for third in range(3)) for size in sizes]
        return {"anchor_generator": AnchorGenerator(octaves, ratios)}
    return {
        "rpn_anchor_generator": AnchorGenerator([(size,) for size in sizes], ratios),
        "box_roi_pool": MultiScaleRoIAlign(
            ["0", "1", "2", "3"], 7, sampling_ratio=2, canonical_scale=7 * model.anchor_size
        ),
    }


def _box_loss(config: Config) -> nn.Module | bool:
    """The box loss of the second stage, or of RetinaNet; False: torchvision's own."""
    libra = config.libra
    if config.model.box_loss:
        loss: nn.Module = balanced_l1(config)
    elif libra.beta is None and libra.box_loss_weight == 1:
        return False
    else:
        loss = smooth_l1(config)
    return loss if libra.box_loss_weight == 1 else WeightedLoss(loss, libra.box_loss_weight)


def balanced_l1(config: Config) -> BalancedL1Loss:
    """The box loss with balanced L1, without its weight; by default, and in place of L1's beta of 0, the paper's."""
    libra = config.libra
    beta = libra.beta or (0.11 if config.model.is_retinanet else 1.0)
    return BalancedL1Loss(libra.alpha, libra.gamma, beta, reduction="sum")


def smooth_l1(config: Config) -> nn.SmoothL1Loss:
    """The box loss without balanced L1, and without its weight; by default torchvision's own."""
    beta = config.libra.beta
    if beta is None:
        beta = 0.0 if config.model.is_retinanet else 1 / 9
    return nn.SmoothL1Loss(reduction="sum", beta=beta)


def _tune_parts(detector: Any, config: Config) -> None:
    """Gives the parts that the paper's setting chose for the detector the settings of the run."""
    libra = config.libra
    for stage in () if config.model.is_retinanet else (detector.rpn, detector.roi_heads):
        if isinstance(stage.fg_bg_sampler, IoUBalancedSampler):
            stage.fg_bg_sampler = replace(
                stage.fg_bg_sampler, num_bins=libra.num_bins, instance_balanced=libra.instance_balanced
            )
    if config.model.pyramid and (libra.refine, libra.pyramid_init) != ("non_local", "zero"):
        bfp = detector.backbone.bfp
        refine = None if libra.refine == "none" else libra.refine
        detector.backbone.bfp = BalancedFeaturePyramid(
            bfp.in_channels, refine_level=bfp.refine_level, refine=refine, init=libra.pyramid_init
        )


def _conventions(config: Config) -> dict[str, Any]:
    """The arguments of :func:`apply_conventions`."""
    libra, conventions = config.libra, config.conventions
    names = [
        *("anchors", "init", "roi_aligned", "roi_sampling_ratio", "rpn_allowed_border"),
        *("rpn_max_negatives_per_positive", "p6_from", "p7_relu", "loss_normalizer"),
    ]
    options = {name: getattr(conventions, name) for name in names}
    beta = conventions.rpn_beta
    if config.model.balances_rpn and config.model.box_loss:
        options["rpn_box_loss"] = BalancedL1Loss(libra.alpha, libra.gamma, beta, reduction="sum")
    elif config.model.balances_rpn or beta != ConventionsConfig.rpn_beta:
        options["rpn_box_loss"] = nn.SmoothL1Loss(reduction="sum", beta=beta)
    return options
