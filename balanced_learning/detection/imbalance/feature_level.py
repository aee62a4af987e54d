"""The feature level: which maps of the backbone a detection uses, and how alike the levels of the pyramid are."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor
from torchvision.models.detection import FasterRCNN, RetinaNet

from ...pyramid import BalancedFeaturePyramid
from ...resizing import resize
from ..necks import find_refine_level
from .backbone_maps import watch
from .cka import LinearCKA
from .step import Targets, check_detector, in_evaluation, positive_anchors, propose


@dataclass(frozen=True)
class FeatureLevel:
    """What the L levels of a pyramid are made of, and how alike they are.

    Before the first batch there are no levels. Without positives, the boxes are NaN; the contribution to a level that
    has no boxes is NaN, and so is the likeness of a level that is the same at all positions.
    """

    levels: list[str]  # finest first, such as P2: of stride 2^2
    body_maps: list[str]  # that enter the FPN, such as C2
    boxes: list[float]  # the share of the positives that use each level
    contribution: Tensor  # [L, B]: to the boxes on level l, the share of each map b of the body; rows sum to 1
    likeness_before: Tensor  # [L, L], from 0 to 1: of the levels before integration
    likeness_after: Tensor  # [L, L]: and after it


class LevelMeter:
    r"""Measures :class:`FeatureLevel` of a detector, batch by batch, and leaves the model as it is.

    **Contribution**: what detections on a level are made of. The class scores of the positives on it (before softmax
    or sigmoid; proposals that are sampled, or anchors) are summed, and for each map of the backbone's body that enters
    the FPN, with activations a and gradient g of that sum, :math:`\sum |g \cdot a|` is taken. To first order it is what
    the score owes to the map; unlike the gradient alone it can be compared between maps of other scales and sizes.

    **Likeness**: :class:`~balanced_learning.detection.imbalance.cka.LinearCKA` between the levels, resized as a
    balanced pyramid resizes them to the level that it refines, at the positions that are in an image and not in its
    padding. Before integration they are the levels of the FPN; after it, of the model's own pyramid or, where it has
    none, of one that only integrates, ``BalancedFeaturePyramid(refine=None)``. Why CKA: it stays when the channels of a
    level are rotated or scaled, so it tells whether levels know the same of positions, in whatever channels. A cosine,
    or a correlation channel by channel, compares channels that were never trained to mean the same.

    Args:
        model (FasterRCNN or RetinaNet): torchvision's own, or after
            :func:`~balanced_learning.detection.apply_libra`.

    Raises:
        TypeError: for a model of another type.
        ValueError: for a backbone without a module ``fpn``.
    """

    def __init__(self, model: Any) -> None:
        check_detector(model, FasterRCNN, RetinaNet)
        if not hasattr(model.backbone, "fpn"):
            raise ValueError(f"model.backbone must have a module fpn, which {type(model.backbone).__name__} has not")
        self.model = model
        self._levels: list[str] = []
        self._body_maps: list[str] = []
        self._boxes = torch.zeros(0, dtype=torch.int64)
        self._contribution = torch.zeros(0, 0, dtype=torch.float64)
        self._before, self._after = LinearCKA(), LinearCKA()

    def add(self, images: list[Tensor], targets: Targets) -> None:
        """Measures a batch: images in [0, 1], and torchvision's targets, on the device of the model."""
        model = self.model
        with in_evaluation(model), torch.enable_grad(), watch(model.backbone) as seen:
            batch, targets = model.transform(images, targets)
            features = model.backbone(batch.tensors)
            if not self._levels:
                self._name(batch.tensors, list(features.values()), seen.body)
            find = _scores_of_anchors if isinstance(model, RetinaNet) else _scores_of_proposals
            self._contribute(*find(model, batch, features, targets), seen.body)
            self._compare(batch, seen.before or list(features.values()), seen.after)

    def _name(self, images: Tensor, levels: list[Tensor], body: list[Tensor]) -> None:
        self._levels, self._body_maps = (
            [f"{letter}{_octave(images.shape[-2:], x.shape[-2:])}" for x in maps]
            for letter, maps in (("P", levels), ("C", body))
        )
        self._boxes = torch.zeros(len(levels), dtype=torch.int64)
        self._contribution = torch.zeros(len(levels), len(body), dtype=torch.float64)

    def _contribute(self, scores: Tensor, level: Tensor, body: list[Tensor]) -> None:
        self._boxes += level.bincount(minlength=len(self._boxes)).cpu()
        for i in level.unique().tolist():
            score = scores[level == i].sum()
            gradients = torch.autograd.grad(score, body, retain_graph=True, materialize_grads=True)
            for b, (gradient, activations) in enumerate(zip(gradients, body, strict=True)):
                self._contribution[i, b] += (gradient * activations).abs().sum().item()

    @torch.no_grad()
    def _compare(self, batch: Any, before: list[Tensor], after: list[Tensor] | None) -> None:
        pyramid = getattr(self.model.backbone, "bfp", None)
        middle = getattr(pyramid, "refine_level", find_refine_level(self.model, len(before)))
        if after is None:
            after = BalancedFeaturePyramid(before[0].shape[1], refine_level=middle, refine=None)(before)
        size = before[middle].shape[-2:]
        inside = _find_inside(size, batch)
        for cka, levels in ((self._before, before), (self._after, after)):
            resized = torch.stack([resize(x, size, middle - i) for i, x in enumerate(levels)], dim=1)  # [N, L, C, H, W]
            cka.add(resized.permute(0, 3, 4, 1, 2)[inside])

    def result(self) -> FeatureLevel:
        """Of all batches so far."""
        return FeatureLevel(
            self._levels,
            self._body_maps,
            (self._boxes / self._boxes.sum()).tolist(),
            (self._contribution / self._contribution.sum(dim=1, keepdim=True)).float(),
            self._before.result(),
            self._after.result(),
        )


def _octave(pixels: Size, cells: Size) -> int:
    """How often a map was halved, each time rounded up."""
    return max(math.ceil(math.log2(whole / part)) for whole, part in zip(pixels, cells, strict=True))


def _scores_of_proposals(
    model: Any, batch: Any, features: dict[str, Tensor], targets: Targets
) -> tuple[Tensor, Tensor]:
    """The class scores of the positives, and the level that each uses, by its place among the features. [P], [P]"""
    heads = model.roi_heads
    sampled, _, labels, _ = heads.select_training_samples(propose(model, batch, features, targets), targets)
    boxes = [image[label > 0] for image, label in zip(sampled, labels, strict=True)]
    label = torch.cat([image[image > 0] for image in labels])
    logits, _ = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, batch.image_sizes)))
    names = heads.box_roi_pool.featmap_names
    places = torch.tensor([i for i, name in enumerate(features) if name in names], device=label.device)
    level = heads.box_roi_pool.map_levels(boxes) if len(places) > 1 else torch.zeros_like(label)
    return logits.gather(1, label[:, None])[:, 0], places[level]


def _scores_of_anchors(
    model: RetinaNet, batch: Any, features: dict[str, Tensor], targets: Targets
) -> tuple[Tensor, Tensor]:
    """As :func:`_scores_of_proposals`, of the positive anchors."""
    maps = list(features.values())
    logits = model.head(maps)["cls_logits"]  # [N, A, K]
    anchors_of = zip(maps, model.anchor_generator.num_anchors_per_location(), strict=True)
    ends = torch.tensor([x.shape[-2:].numel() * num for x, num in anchors_of], device=logits.device).cumsum(dim=0)
    scores, levels = [], []
    for of_image, anchors, target in zip(logits, model.anchor_generator(batch, maps), targets, strict=True):
        positive, matched_idxs = positive_anchors(model, anchors, target)
        scores.append(of_image[positive, target["labels"][matched_idxs]])
        levels.append(torch.bucketize(positive, ends, right=True))
    return torch.cat(scores), torch.cat(levels)


def _find_inside(size: Size, batch: Any) -> Tensor:
    """Whether the center of a position, on maps of this size, lies in the image and not in its padding. [N, H, W]"""
    inside = []
    for image_size in batch.image_sizes:
        rows, columns = (
            (torch.arange(cells) + 0.5) * padded / cells < pixels
            for cells, padded, pixels in zip(size, batch.tensors.shape[-2:], image_size, strict=True)
        )
        inside.append(rows[:, None] & columns)
    return torch.stack(inside).to(batch.tensors.device)
