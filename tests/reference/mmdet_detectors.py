"""mmdetection's detectors as functions of their state dict and an image, from the pixels to the detections.

Written for the tests from what mmdetection 3.3.0, and 1.x where ``legacy`` is said, compute at the settings of their
configurations of Faster R-CNN and RetinaNet with a pyramid, plain or balanced. Nothing of torchvision is used.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.reference.mmdet_boxes import anchors, decode, kept, levels, preprocess, roi_align
from tests.reference.mmdet_maps import State, conv, features

RPN_SCALES, RETINA_SCALES = [8.0], [4 * 2 ** (k / 3) for k in range(3)]
ONES, RCNN_STDS = (1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)


class Detections(NamedTuple):
    boxes: Tensor  # [D, 4] in pixels of the image
    scores: Tensor
    classes: Tensor  # from 0 on


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


def mask_head(state: State, pooled: Tensor) -> Tensor:
    """Logits [R, rows, 2 H, 2 W] of the masks in boxes with the features [R, C, H, W]."""
    prefix = "roi_head.mask_head" if "roi_head.mask_head.upsample.weight" in state else "mask_head"
    x = pooled
    for i in range(4):
        x = conv(state, f"{prefix}.convs.{i}.conv", x).relu()
    weight, bias = state[f"{prefix}.upsample.weight"], state[f"{prefix}.upsample.bias"]
    x = torch.einsum("rcyx,cdij->rdyixj", x, weight).flatten(4).flatten(2, 3) + bias[:, None, None]
    return conv(state, f"{prefix}.conv_logits", x.relu())


def detect_two_stages(state: State, image: Tensor, scale: tuple[int, int], *, legacy: bool = False) -> Detections:
    """Detections of a Faster R-CNN in an image [3, H, W] of values in [0, 1]."""
    batch, size = preprocess(image, scale)
    maps = features(state, batch)
    boxes = proposals(state, maps, size, legacy=legacy)
    logits, deltas = box_head(state, roi_features(maps, boxes, legacy=legacy))
    return best_of_proposals(logits, deltas, boxes, size, image.shape[1:], legacy=legacy)


def best_of_proposals(
    logits: Tensor, deltas: Tensor, boxes: Tensor, size: tuple[int, int], original: tuple[int, int], *, legacy=False
) -> Detections:
    """Of each class above 0.05 what suppression at 0.5 leaves, in the ``original`` size; the 100 best of all."""
    scores = logits.softmax(dim=1)
    if legacy:  # the background is the first class, of boxes too
        scores, deltas = scores[:, 1:], deltas[:, 1:]
    else:
        scores = scores[:, :-1]
    place, label = (scores > 0.05).nonzero().unbind(1)
    found = decode(boxes, deltas, RCNN_STDS, size, legacy=legacy)[place, label]
    return _best(_rescaled(found, size, original), scores[place, label], label, legacy=legacy)


def detect_retinanet(state: State, image: Tensor, scale: tuple[int, int], *, legacy: bool = False) -> Detections:
    """Detections of a RetinaNet in an image [3, H, W] of values in [0, 1]."""
    batch, size = preprocess(image, scale)
    maps = features(state, batch)
    outputs = [retina_head(state, level) for level in maps]
    boxes = [
        anchors(level.shape[2:], 8 * 2**i, RETINA_SCALES, legacy=legacy, dtype=level.dtype)
        for i, level in enumerate(maps)
    ]
    return best_of_anchors(outputs, boxes, size, image.shape[1:], legacy=legacy)


def best_of_anchors(
    outputs: list[tuple[Tensor, Tensor]],
    boxes: list[Tensor],
    size: tuple[int, int],
    original: tuple[int, int],
    *,
    legacy: bool = False,
) -> Detections:
    """As :func:`best_of_proposals`, of the 1,000 best pairs of anchor and class of each level that are above 0.05.

    mmdetection 1 takes the 1,000 anchors with the best class instead, and all their classes. Boxes without area, as
    anchors in the padding become, are left out.
    """
    found, scores, labels = [], [], []
    for (logits, deltas), level in zip(outputs, boxes, strict=True):
        decoded = decode(level, deltas[:, None], ONES, size, legacy=legacy)[:, 0]
        probabilities = logits.sigmoid()
        if legacy:
            best = probabilities.amax(dim=1).argsort(descending=True, stable=True)[:1000]
            decoded, probabilities = decoded[best], probabilities[best]
        place, label = (probabilities > 0.05).nonzero().unbind(1)
        order = probabilities[place, label].argsort(descending=True, stable=True)[: None if legacy else 1000]
        found.append(decoded[place[order]])
        scores.append(probabilities[place[order], label[order]])
        labels.append(label[order])
    candidates = torch.cat(found)
    valid = (candidates[:, 2:] - candidates[:, :2] + float(legacy) > 0).all(dim=1)
    in_image = _rescaled(candidates[valid], size, original)
    return _best(in_image, torch.cat(scores)[valid], torch.cat(labels)[valid], legacy=legacy)


def _rescaled(boxes: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    height, width = (before / after for before, after in zip(original, size, strict=True))
    return boxes * boxes.new_tensor([width, height, width, height])


def _best(boxes: Tensor, scores: Tensor, classes: Tensor, *, legacy: bool) -> Detections:
    keep = kept(boxes, scores, classes, 0.5, legacy=legacy)[:100]
    return Detections(boxes[keep], scores[keep], classes[keep])
