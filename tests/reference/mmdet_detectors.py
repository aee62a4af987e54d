"""mmdetection's detectors as functions of their state dict and an image, from the pixels to the detections.

Written for the tests from what mmdetection 3.3.0, and 1.x where ``legacy`` is said, compute at the settings of their
configurations of Faster R-CNN and RetinaNet with a pyramid, plain or balanced. Nothing of torchvision is used.
"""

from collections.abc import Mapping
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_learning import BalancedFeaturePyramid
from tests.reference.mmdet import explicit_pyramid, path_aggregation
from tests.reference.mmdet_boxes import anchors, decode, kept, levels, preprocess, roi_align

State = Mapping[str, Tensor]
RPN_SCALES, RETINA_SCALES = [8.0], [4 * 2 ** (k / 3) for k in range(3)]
ONES, RCNN_STDS = (1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)


class Detections(NamedTuple):
    boxes: Tensor  # [D, 4] in pixels of the image
    scores: Tensor
    classes: Tensor  # from 0 on


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """The convolution of this name, padded so that stride 1 keeps the size."""
    weight = state[f"{name}.weight"]
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[-1] // 2, groups=groups)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """Batch norm with the statistics that training left."""
    mean, var, weight, bias = (
        state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def backbone(state: State, x: Tensor) -> list[Tensor]:
    """C2 to C5 of a ResNet or ResNeXt; the stride of a bottleneck is in its 3 x 3 convolution."""
    x = F.max_pool2d(norm(state, "backbone.bn1", conv(state, "backbone.conv1", x, 2)).relu(), 3, 2, 1)
    maps = []
    for stage in range(1, 5):
        for block in count():
            key = f"backbone.layer{stage}.{block}"
            if f"{key}.conv1.weight" not in state:
                break
            x = _residual_block(state, key, x, 2 if stage > 1 and block == 0 else 1)
        maps.append(x)
    return maps


def _residual_block(state: State, key: str, x: Tensor, stride: int) -> Tensor:
    bottleneck = f"{key}.conv3.weight" in state
    strides = (1, stride, 1) if bottleneck else (stride, 1)
    y = x
    for i, step in enumerate(strides, start=1):
        y = norm(state, f"{key}.bn{i}", conv(state, f"{key}.conv{i}", y, step))
        if i < len(strides):
            y = y.relu()
    if f"{key}.downsample.0.weight" in state:
        x = norm(state, f"{key}.downsample.1", conv(state, f"{key}.downsample.0", x, stride))
    return (x + y).relu()


def pyramid(state: State, maps: list[Tensor]) -> list[Tensor]:
    """Five levels of the neck before it balances them: of FPN or PAFPN, from C2 on or, with extra convolutions, C3."""
    neck = "neck.0" if "neck.0.lateral_convs.0.conv.weight" in state else "neck"
    used = next(i for i in count() if f"{neck}.lateral_convs.{i}.conv.weight" not in state)
    laterals = [conv(state, f"{neck}.lateral_convs.{i}.conv", x) for i, x in enumerate(maps[-used:])]
    for i in range(used - 1, 0, -1):
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], laterals[i - 1].shape[2:], mode="nearest")
    outputs = [conv(state, f"{neck}.fpn_convs.{i}.conv", x) for i, x in enumerate(laterals)]
    if f"{neck}.fpn_convs.{used}.conv.weight" in state:
        outputs.append(conv(state, f"{neck}.fpn_convs.{used}.conv", maps[-1], 2))
        outputs.append(conv(state, f"{neck}.fpn_convs.{used + 1}.conv", outputs[-1], 2))
    else:
        outputs.append(outputs[-1][..., ::2, ::2])
    if f"{neck}.downsample_convs.0.conv.weight" not in state:
        return outputs
    own = {"downsample_convs": "down", "pafpn_convs": "out"}
    parameters = {
        f"{own[part]}.{i}.{end}": state[f"{neck}.{part}.{i}.conv.{end}"]
        for part in own
        for i in range(used - 1)
        for end in ("weight", "bias")
    }
    return path_aggregation(outputs, parameters, used)


@torch.no_grad()
def balanced(state: State, maps: list[Tensor]) -> list[Tensor]:
    """The levels after BFP, if the neck has it, at the refine level of the configurations: P4."""
    if "neck.1.refine.theta.conv.weight" not in state:
        return maps
    own = {"theta": "theta", "phi": "phi", "g": "g", "conv_out": "out"}
    level = 1 if "bbox_head.retina_cls.weight" in state else 2
    bfp = BalancedFeaturePyramid(maps[0].shape[1], refine_level=level).to(maps[0])
    bfp.load_state_dict(
        {
            f"refine.{own[part]}.{end}": state[f"neck.1.refine.{part}.conv.{end}"]
            for part in own
            for end in ("weight", "bias")
        }
    )
    return explicit_pyramid(bfp, maps)


def features(state: State, batch: Tensor) -> list[Tensor]:
    """What the heads see, finest level first."""
    return balanced(state, pyramid(state, backbone(state, batch)))


def rpn_head(state: State, level: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [H * W * 3] and deltas [H * W * 3, 4] of one image's level, in the order of the anchors."""
    x = conv(state, "rpn_head.rpn_conv", level).relu()
    return _by_anchor(conv(state, "rpn_head.rpn_cls", x), 1)[:, 0], _by_anchor(conv(state, "rpn_head.rpn_reg", x), 4)


def retina_head(state: State, level: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [H * W * 9, classes] and deltas [H * W * 9, 4] of one image's level, in the order of the anchors."""
    outputs = []
    for branch, last in (("cls_convs", "retina_cls"), ("reg_convs", "retina_reg")):
        x = level
        for i in range(4):
            x = conv(state, f"bbox_head.{branch}.{i}.conv", x).relu()
        outputs.append(conv(state, f"bbox_head.{last}", x))
    return _by_anchor(outputs[0], outputs[0].shape[1] // 9), _by_anchor(outputs[1], 4)


def _by_anchor(x: Tensor, values: int) -> Tensor:
    return x[0].permute(1, 2, 0).reshape(-1, values)


def box_head(state: State, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [R, classes + 1] and deltas [R, rows, 4]."""
    prefix = "roi_head.bbox_head" if "roi_head.bbox_head.fc_cls.weight" in state else "bbox_head"
    x = pooled.flatten(1)
    for layer in ("shared_fcs.0", "shared_fcs.1"):
        x = (x @ state[f"{prefix}.{layer}.weight"].T + state[f"{prefix}.{layer}.bias"]).relu()
    logits, deltas = (
        x @ state[f"{prefix}.{name}.weight"].T + state[f"{prefix}.{name}.bias"] for name in ("fc_cls", "fc_reg")
    )
    return logits, deltas.unflatten(1, (-1, 4))


def proposals(state: State, maps: list[Tensor], size: tuple[int, int], *, legacy: bool = False) -> Tensor:
    """Up to 1,000 boxes of the first stage, best first: of 1,000 a level, those that suppression at 0.7 leaves."""
    boxes, scores, groups = [], [], []
    for i, level in enumerate(maps):
        logits, deltas = rpn_head(state, level)
        candidates = anchors(level.shape[2:], 4 * 2**i, RPN_SCALES, legacy=legacy, dtype=level.dtype)
        best = logits.sigmoid().argsort(descending=True, stable=True)[:1000]
        boxes.append(decode(candidates[best], deltas[best, None], ONES, size, legacy=legacy)[:, 0])
        scores.append(logits[best].sigmoid())
        groups.append(torch.full_like(best, i))
    found, order = torch.cat(boxes), torch.cat(scores)
    valid = (found[:, 2:] - found[:, :2] + float(legacy) > 0).all(dim=1).nonzero()[:, 0]
    keep = kept(found[valid], order[valid], torch.cat(groups)[valid], 0.7, legacy=legacy)[:1000]
    return found[valid[keep]]


def roi_features(maps: list[Tensor], boxes: Tensor, *, legacy: bool = False) -> Tensor:
    """[R, C, 7, 7], of each box from one of the four finest levels."""
    level_of = levels(boxes, legacy=legacy)
    pooled = maps[0].new_zeros(len(boxes), maps[0].shape[1], 7, 7)
    for i in range(4):
        pooled[level_of == i] = roi_align(maps[i][0], boxes[level_of == i], 4 * 2**i, legacy=legacy)
    return pooled


def detect_two_stages(state: State, image: Tensor, scale: tuple[int, int], *, legacy: bool = False) -> Detections:
    """Detections of a Faster R-CNN in an image [3, H, W] of values in [0, 1]."""
    batch, size = preprocess(image, scale)
    maps = features(state, batch)
    boxes = proposals(state, maps, size, legacy=legacy)
    logits, deltas = box_head(state, roi_features(maps, boxes, legacy=legacy))
    scores = logits.softmax(dim=1)
    if legacy:  # the background is the first class, of boxes too
        scores, deltas = scores[:, 1:], deltas[:, 1:]
    else:
        scores = scores[:, :-1]
    found = _in_image(decode(boxes, deltas, RCNN_STDS, size, legacy=legacy), image, size)
    place, label = (scores > 0.05).nonzero().unbind(1)
    return _best(found[place, label], scores[place, label], label, legacy=legacy)


def detect_retinanet(state: State, image: Tensor, scale: tuple[int, int], *, legacy: bool = False) -> Detections:
    """Detections of a RetinaNet: of each level the 1,000 best pairs of anchor and class above 0.05.

    mmdetection 1 takes the 1,000 anchors with the best class instead, and all their classes.
    """
    batch, size = preprocess(image, scale)
    boxes, scores, labels = [], [], []
    for i, level in enumerate(features(state, batch)):
        logits, deltas = retina_head(state, level)
        candidates = anchors(level.shape[2:], 8 * 2**i, RETINA_SCALES, legacy=legacy, dtype=level.dtype)
        found = decode(candidates, deltas[:, None], ONES, size, legacy=legacy)[:, 0]
        probabilities = logits.sigmoid()
        if legacy:
            best = probabilities.amax(dim=1).argsort(descending=True, stable=True)[:1000]
            found, probabilities = found[best], probabilities[best]
        place, label = (probabilities > 0.05).nonzero().unbind(1)
        order = probabilities[place, label].argsort(descending=True, stable=True)[: None if legacy else 1000]
        boxes.append(found[place[order]])
        scores.append(probabilities[place[order], label[order]])
        labels.append(label[order])
    found = torch.cat(boxes)
    valid = (found[:, 2:] - found[:, :2] + float(legacy) > 0).all(dim=1)
    found = _in_image(found[valid], image, size)
    return _best(found, torch.cat(scores)[valid], torch.cat(labels)[valid], legacy=legacy)


def _in_image(boxes: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = (before / after for before, after in zip(image.shape[1:], size, strict=True))
    return boxes * boxes.new_tensor([width, height, width, height])


def _best(boxes: Tensor, scores: Tensor, classes: Tensor, *, legacy: bool) -> Detections:
    keep = kept(boxes, scores, classes, 0.5, legacy=legacy)[:100]
    return Detections(boxes[keep], scores[keep], classes[keep])
