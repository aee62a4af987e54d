"""Small detectors that a CPU can train from scratch: Faster R-CNN and RetinaNet on a narrow ResNet of three stages."""

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import BasicBlock, conv1x1
from torchvision.ops import Conv2dNormActivation, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

STEM_CHANNELS = 32
STAGES = {"stage1": 64, "stage2": 96, "stage3": 128}  # channels, of strides 4, 8 and 16
LEVEL_CHANNELS, ROI_SIZE, HEAD_CHANNELS = 64, 5, 256
RATIOS = (0.5, 1.0, 2.0)


def small_fasterrcnn(num_classes: int, **options: Any) -> FasterRCNN:
    """A Faster R-CNN with levels of strides 4 to 32, small anchors, few proposals and 64 boxes to learn from."""
    few = {
        "box_batch_size_per_image": 64,
        "rpn_pre_nms_top_n_train": 200,
        "rpn_pre_nms_top_n_test": 200,
        "rpn_post_nms_top_n_train": 100,
        "rpn_post_nms_top_n_test": 200,
    }
    detector = FasterRCNN(
        _backbone(list(STAGES), LastLevelMaxPool()),
        rpn_anchor_generator=AnchorGenerator([(16 * 2**level,) for level in range(4)], [RATIOS] * 4),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], ROI_SIZE, sampling_ratio=2, canonical_scale=112),
        box_head=TwoMLPHead(LEVEL_CHANNELS * ROI_SIZE**2, HEAD_CHANNELS),
        box_predictor=FastRCNNPredictor(HEAD_CHANNELS, num_classes),
        **(few | options),
    )
    return detector.to(memory_format=torch.channels_last)  # which CPUs convolve faster


def small_retinanet(num_classes: int, **options: Any) -> RetinaNet:
    """A RetinaNet with levels of strides 8 to 64, small anchors and a normalized head."""
    sizes = [tuple(int(16 * 2 ** (level + third / 3)) for third in range(3)) for level in range(4)]
    backbone = _backbone(["stage2", "stage3"], LastLevelP6P7(LEVEL_CHANNELS, LEVEL_CHANNELS))
    anchors = AnchorGenerator(sizes, [RATIOS] * 4)
    num_anchors = anchors.num_anchors_per_location()[0]
    norm = partial(nn.GroupNorm, 8)  # without, it hardly learns from scratch
    head = RetinaNetHead(LEVEL_CHANNELS, num_anchors, num_classes, norm_layer=norm)
    detector = RetinaNet(backbone, num_classes, anchor_generator=anchors, head=head, **options)
    return detector.to(memory_format=torch.channels_last)


def _backbone(stages: list[str], extra_blocks: nn.Module) -> BackboneWithFPN:
    """An FPN on these stages; batch norm never meets a map of one pixel, for images are padded to a multiple of 32."""
    body = nn.Sequential(OrderedDict(stem=Conv2dNormActivation(3, STEM_CHANNELS, stride=2)))
    for (stage, channels), in_channels in zip(STAGES.items(), (STEM_CHANNELS, *STAGES.values()), strict=False):
        body.add_module(stage, _stage(in_channels, channels))
    levels = {stage: str(number) for number, stage in enumerate(stages)}
    return BackboneWithFPN(body, levels, [STAGES[stage] for stage in stages], LEVEL_CHANNELS, extra_blocks)


def _stage(in_channels: int, channels: int) -> BasicBlock:
    shortcut = nn.Sequential(conv1x1(in_channels, channels, stride=2), nn.BatchNorm2d(channels))
    return BasicBlock(in_channels, channels, stride=2, downsample=shortcut)
