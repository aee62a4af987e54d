"""The detector that the options ask for."""

from argparse import Namespace

from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from balanced_learning.detection import (
    apply_libra,
    libra_fasterrcnn,
    libra_fasterrcnn_resnet50_fpn,
    libra_retinanet,
    libra_retinanet_resnet50_fpn,
)
from errors import UserError


def build_model(args: Namespace, num_classes: int) -> nn.Module:
    """Libra Faster R-CNN or Libra RetinaNet, or what is left of it with parts switched off."""
    is_rcnn = args.model == "libra_fasterrcnn"
    parts = {"pyramid": args.pyramid, "box_loss": args.box_loss, "path_aggregation": args.path_aggregation}
    sizes = {"min_size": args.min_size, "max_size": args.max_size}
    sizes["_skip_resize"] = args.data_augmentation in ("multiscale", "lsj")  # they decide the size in training
    if is_rcnn:
        parts |= {"sampler": args.sampler, "rpn": args.rpn}
        sizes |= {"rpn_score_thresh": args.rpn_score_thresh}
    if args.small:
        return apply_libra((_small_fasterrcnn if is_rcnn else _small_retinanet)(num_classes, **sizes), **parts)

    options = {"trainable_backbone_layers": args.trainable_backbone_layers, **sizes, **parts}
    flag = f"--weights {args.weights}" if args.weights else f"--weights-backbone {args.weights_backbone}"
    try:
        if args.weights:
            with_weights = libra_fasterrcnn_resnet50_fpn if is_rcnn else libra_retinanet_resnet50_fpn
            return with_weights(weights=args.weights, **options)
        build = libra_fasterrcnn if is_rcnn else libra_retinanet
        return build(
            backbone_name=args.backbone, weights_backbone=args.weights_backbone, num_classes=num_classes, **options
        )
    except (OSError, RuntimeError) as error:  # no connection, no room, or a broken file
        raise UserError(
            f"{flag}: the weights could not be downloaded ({error}); --weights-backbone none without --weights trains "
            "from scratch"
        ) from None
    except KeyError:
        raise UserError(f"{flag}: torchvision has no such weights") from None
    except ValueError as error:
        raise UserError(f"--backbone {args.backbone} {flag}: {error}") from None


def _small_fasterrcnn(num_classes: int, **options: float) -> FasterRCNN:
    """A Faster R-CNN that a CPU can train from scratch: ResNet-18, 64 channels, 64 sampled boxes, small anchors."""
    return FasterRCNN(
        _small_backbone(finest_stage=1),
        rpn_anchor_generator=AnchorGenerator([(16 * 2**level,) for level in range(5)], [(0.5, 1.0, 2.0)] * 5),
        box_head=TwoMLPHead(64 * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, num_classes),
        box_batch_size_per_image=64,
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_train=300,
        rpn_post_nms_top_n_test=150,
        **options,
    )


def _small_retinanet(num_classes: int, **options: float) -> RetinaNet:
    """The same for RetinaNet."""
    sizes = [tuple(int(16 * 2 ** (level + third / 3)) for third in range(3)) for level in range(5)]
    anchors = AnchorGenerator(sizes, [(0.5, 1.0, 2.0)] * 5)
    return RetinaNet(_small_backbone(finest_stage=2), num_classes, anchor_generator=anchors, **options)


def _small_backbone(finest_stage: int) -> BackboneWithFPN:
    stages = range(finest_stage, 5)
    return BackboneWithFPN(
        resnet18(weights=None),
        return_layers={f"layer{stage}": str(i) for i, stage in enumerate(stages)},
        in_channels_list=[64 * 2 ** (stage - 1) for stage in stages],
        out_channels=64,
        extra_blocks=LastLevelMaxPool() if finest_stage == 1 else LastLevelP6P7(64, 64),
    )
