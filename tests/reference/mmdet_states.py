"""State dicts of mmdetection's detectors: its key names and shapes, with random weights.

Names and shapes were compared with those of the detectors that mmdetection 3.3.0 builds from its configurations of
libra_rcnn, mask_rcnn and pafpn.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnext50_32x4d": (3, 4, 6, 3),
    "resnext101_64x4d": (3, 4, 23, 3),
}
PUBLISHED = {
    "libra_faster_rcnn_r50_fpn_1x": ("faster_rcnn", "resnet50"),
    "libra_faster_rcnn_r101_fpn_1x": ("faster_rcnn", "resnet101"),
    "libra_faster_rcnn_x101_64x4d_fpn_1x": ("faster_rcnn", "resnext101_64x4d"),
    "libra_retinanet_r50_fpn_1x": ("retinanet", "resnet50"),
}
GAINS = {"lateral_convs": 0.3, "fpn_convs": 1.0, "refine": 0.5, "rpn_cls": 1.5, "rpn_reg": 0.05, "fc_cls": 2.0}
GAINS |= {"fc_reg": 0.7, "retina_cls": 0.7, "retina_reg": 0.05}
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def published_state(name: str, **arguments) -> dict[str, Tensor]:
    """What is under ``state_dict`` in the published file of this name, with other values."""
    kind, backbone = PUBLISHED[name]
    return synthetic_state(kind, backbone, **arguments)


def synthetic_state(
    kind: str = "faster_rcnn",
    backbone: str = "resnet18",
    *,
    libra: bool = True,
    refine: str = "non_local",
    pafpn: bool = False,
    version: int = 3,
    classes: int = 80,
    channels: int = 256,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The state dict of a detector of mmdetection: kind "faster_rcnn", "mask_rcnn" or "retinanet".

    ``version=1`` gives what mmdetection 1 saved: heads of the second stage without ``roi_head``, the background as the
    first class of scores, boxes and masks. ``refine`` is "non_local" or "conv".
    ``channels`` are the pyramid's.
    """
    generator = torch.Generator().manual_seed(seed)
    neck = "neck.0" if libra else "neck"
    widths = _widths(backbone)
    shapes = dict(_backbone(backbone))
    shapes |= dict(_pyramid(neck, widths[1:] if kind == "retinanet" else widths, channels, kind == "retinanet"))
    if pafpn:
        for i in range(3):
            shapes |= _conv(f"{neck}.downsample_convs.{i}.conv", channels, channels, 3)
            shapes |= _conv(f"{neck}.pafpn_convs.{i}.conv", channels, channels, 3)
    if libra and refine == "conv":
        shapes |= _conv("neck.1.refine.conv", channels, channels, 3)
    elif libra:
        for part in ("g", "theta", "phi", "conv_out"):
            shapes |= _conv(f"neck.1.refine.{part}.conv", channels, channels, 1)
    if kind == "retinanet":
        shapes |= dict(_retina_head(channels, classes))
    else:
        shapes |= dict(_two_stages(kind, channels, classes, version))
    return {key: _values(key, shape, generator) for key, shape in shapes.items()}


def _widths(backbone: str) -> tuple[int, ...]:
    """Channels of the four stages."""
    return tuple(64 * 2**i * (1 if backbone == "resnet18" else 4) for i in range(4))


def _conv(name: str, inputs: int, outputs: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)}


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _backbone(name: str) -> Shapes:
    yield "backbone.conv1.weight", (64, 3, 7, 7)
    yield from _norm("backbone.bn1", 64)
    groups = {"resnext50_32x4d": 32, "resnext101_64x4d": 64}.get(name, 1)
    inputs = 64
    for i, (blocks, outputs) in enumerate(zip(BLOCKS[name], _widths(name), strict=True)):
        planes = 64 * 2**i
        for j in range(blocks):
            key = f"backbone.layer{i + 1}.{j}"
            if name == "resnet18":
                convs = [(planes, inputs, 3), (planes, planes, 3)]
            else:
                each = planes // 16 if groups > 1 else planes  # channels of a group
                convs = [(each * groups, inputs, 1), (each * groups, each, 3), (outputs, each * groups, 1)]
            for k, (after, before, size) in enumerate(convs, start=1):
                yield f"{key}.conv{k}.weight", (after, before, size, size)
                yield from _norm(f"{key}.bn{k}", after)
            if inputs != outputs or (j == 0 and i > 0):
                yield f"{key}.downsample.0.weight", (outputs, inputs, 1, 1)
                yield from _norm(f"{key}.downsample.1", outputs)
            inputs = outputs


def _norm(name: str, channels: int) -> Shapes:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def _pyramid(neck: str, widths: tuple[int, ...], channels: int, extra: bool) -> Shapes:
    for i, width in enumerate(widths):
        yield from _conv(f"{neck}.lateral_convs.{i}.conv", width, channels, 1).items()
        yield from _conv(f"{neck}.fpn_convs.{i}.conv", channels, channels, 3).items()
    if extra:
        yield from _conv(f"{neck}.fpn_convs.{len(widths)}.conv", widths[-1], channels, 3).items()
        yield from _conv(f"{neck}.fpn_convs.{len(widths) + 1}.conv", channels, channels, 3).items()


def _retina_head(channels: int, classes: int) -> Shapes:
    for branch in ("cls_convs", "reg_convs"):
        for i in range(4):
            yield from _conv(f"bbox_head.{branch}.{i}.conv", channels, channels, 3).items()
    yield from _conv("bbox_head.retina_cls", channels, 9 * classes, 3).items()
    yield from _conv("bbox_head.retina_reg", channels, 9 * 4, 3).items()


def _two_stages(kind: str, channels: int, classes: int, version: int) -> Shapes:
    yield from _conv("rpn_head.rpn_conv", channels, channels, 3).items()
    yield from _conv("rpn_head.rpn_cls", channels, 3, 1).items()
    yield from _conv("rpn_head.rpn_reg", channels, 12, 1).items()
    prefix, rows = ("", classes + 1) if version == 1 else ("roi_head.", classes)
    yield from _linear(f"{prefix}bbox_head.fc_cls", 1024, classes + 1).items()
    yield from _linear(f"{prefix}bbox_head.fc_reg", 1024, 4 * rows).items()
    yield from _linear(f"{prefix}bbox_head.shared_fcs.0", channels * 7 * 7, 1024).items()
    yield from _linear(f"{prefix}bbox_head.shared_fcs.1", 1024, 1024).items()
    if kind == "mask_rcnn":
        for i in range(4):
            yield from _conv(f"{prefix}mask_head.convs.{i}.conv", 256 if i else channels, 256, 3).items()
        yield from _conv(f"{prefix}mask_head.upsample", 256, 256, 2).items()
        yield from _conv(f"{prefix}mask_head.conv_logits", 256, rows, 1).items()


def _values(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights with which maps stay near one and scores and boxes are spread without reaching their bounds."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(7)
    normal = torch.randn(shape, generator=generator)
    if key.endswith("running_var"):
        return normal.abs() + 0.5
    if ".bn" in key or "downsample.1" in key:
        size = 0.5 if ".bn2" in key or ".bn3" in key else 1.0  # the last of a block, so that sums do not grow
        return size * (1 + 0.1 * normal) if key.endswith("weight") else 0.1 * normal
    if key.endswith("bias"):
        if "retina_cls" in key:
            return normal - 7
        return 0.1 * normal
    scale = next((gain for name, gain in GAINS.items() if name in key), math.sqrt(2))
    return scale / math.sqrt(math.prod(shape[1:])) * normal
