"""The detector that a configuration asks for."""

from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection._utils import overwrite_eps
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from balanced_learning.detection import apply_libra, libra_fasterrcnn, libra_retinanet
from balanced_learning.training import distributed, randomness
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.config import Config, ModelConfig
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
        overwrite_eps(model, checkpoint.norm_eps)
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
        model.backbone.compile(dynamic=False)  # in place, for each size: with sizes left open, inductor fails on CPUs
    return model


def build_model(config: Config, num_classes: int) -> FasterRCNN | RetinaNet:
    """Builds Libra Faster R-CNN or Libra RetinaNet, or what is left of it with parts switched off.

    Nothing is read or downloaded: but for the values of its weights, the detector is as it will be with those that it
    starts from.

    Args:
        config: the settings.
        num_classes: background included.

    Raises:
        UserError: for a backbone that there is not, or not with as many stages to train.
    """
    detector = _build(config, num_classes)
    detector.transform.__class__ = ResizingFirst
    if isinstance(detector, FasterRCNN):
        _settle_strides(detector.roi_heads.box_roi_pool)
    return detector


def _settle_strides(pool: MultiScaleRoIAlign) -> None:
    """Lets the pooler see its levels, from P2 on, of an image.

    It takes the strides of the levels from the first batch it sees and keeps them, though no checkpoint does; and from
    small, padded images it takes wrong ones.
    """
    size = 256
    levels = {name: torch.zeros(1, 1, size >> level, size >> level) for level, name in enumerate(pool.featmap_names, 2)}
    pool(levels, [torch.zeros(0, 4)], [(size, size)])


def _build(config: Config, num_classes: int) -> FasterRCNN | RetinaNet:
    model = config.model
    is_rcnn = model.model == "libra_fasterrcnn"
    parts: dict[str, Any] = {
        "pyramid": model.pyramid,
        "box_loss": model.box_loss,
        "path_aggregation": model.path_aggregation,
    }
    options: dict[str, Any] = {"min_size": model.min_size, "max_size": model.max_size}
    options["_skip_resize"] = config.data.data_augmentation in ("multiscale", "lsj")  # they decide the size in training
    if is_rcnn:
        parts |= {"sampler": model.sampler, "rpn": model.rpn}
        options |= {"rpn_score_thresh": model.rpn_score_thresh}
    if model.small:
        return apply_libra((small_fasterrcnn if is_rcnn else small_retinanet)(num_classes, **options), **parts)

    options |= parts
    if model.weights or model.weights_backbone:  # what torchvision's builders do to a backbone with weights
        options |= {"norm_layer": FrozenBatchNorm2d, "trainable_backbone_layers": 3}
    if model.trainable_backbone_layers is not None:
        options["trainable_backbone_layers"] = model.trainable_backbone_layers
    build = libra_fasterrcnn if is_rcnn else libra_retinanet
    try:
        return build(backbone_name=model.backbone, weights_backbone=None, num_classes=num_classes, **options)
    except ValueError as error:
        raise UserError(f"--backbone {model.backbone}: {error}") from None
