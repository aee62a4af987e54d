"""The detector that a configuration asks for."""

from functools import partial
from typing import Any

import torch
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from balanced_learning.detection import (
    apply_libra,
    libra_fasterrcnn,
    libra_fasterrcnn_resnet50_fpn,
    libra_retinanet,
    libra_retinanet_resnet50_fpn,
)
from balanced_learning.training import randomness
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.config import Config
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError
from balanced_learning.training.small import small_fasterrcnn, small_retinanet


def make_model(config: Config, labels: Labels, checkpoint: Checkpoint | None) -> Any:
    """Builds the model of a run on the CPU, with the weights of its checkpoint or those that it starts from.

    Raises:
        UserError: as :func:`build_model`, or if the checkpoint does not fit.
    """
    with randomness.seeded(config.training.seed, "weights"):
        model = build_model(config, labels.num_classes, pretrained=checkpoint is None)
    if checkpoint:
        checkpoint.restore({"model": model})
    return model


def build_model(config: Config, num_classes: int, *, pretrained: bool = True) -> FasterRCNN | RetinaNet:
    """Builds Libra Faster R-CNN or Libra RetinaNet, or what is left of it with parts switched off.

    Args:
        config: the settings.
        num_classes: background included.
        pretrained: whether to load the weights that the configuration starts from. Without, nothing is downloaded, and
            the detector is as it would be with them but for their values: for the weights of a checkpoint.

    Raises:
        UserError: for a backbone or weights that there are not, or that cannot be downloaded.
    """
    detector = _build(config, num_classes, pretrained)
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


def _build(config: Config, num_classes: int, pretrained: bool) -> FasterRCNN | RetinaNet:
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
    if model.trainable_backbone_layers is not None:
        options["trainable_backbone_layers"] = model.trainable_backbone_layers
    flag = f"--weights {model.weights}" if model.weights else f"--weights-backbone {model.weights_backbone}"
    build = libra_fasterrcnn if is_rcnn else libra_retinanet
    try:
        if not pretrained and (model.weights or model.weights_backbone):
            options = _as_if_pretrained(on_coco=model.weights is not None) | options
            return build(backbone_name=model.backbone, weights_backbone=None, num_classes=num_classes, **options)
        if model.weights:
            with_weights = libra_fasterrcnn_resnet50_fpn if is_rcnn else libra_retinanet_resnet50_fpn
            return with_weights(weights=model.weights, **options)
        return build(
            backbone_name=model.backbone, weights_backbone=model.weights_backbone, num_classes=num_classes, **options
        )
    except (OSError, RuntimeError) as error:  # no connection, no room, or a broken file
        raise UserError(
            f"{flag}: the weights could not be downloaded ({error}); --weights-backbone none without --weights trains "
            "from scratch"
        ) from None
    except KeyError:
        raise UserError(f"{flag}: torchvision has no such weights") from None
    except ValueError as error:
        raise UserError(f"--backbone {model.backbone} {flag}: {error}") from None


def _as_if_pretrained(on_coco: bool) -> dict[str, Any]:
    """The arguments that make a builder do without weights what torchvision does for them."""
    # torchvision sets the epsilon of its COCO weights, which were trained without one, to 0.
    norm_layer = partial(FrozenBatchNorm2d, eps=0.0) if on_coco else FrozenBatchNorm2d
    return {"norm_layer": norm_layer, "trainable_backbone_layers": 3}
