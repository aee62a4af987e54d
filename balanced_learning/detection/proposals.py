"""The two stages of a Faster R-CNN, each as a detector of its own: an RPN, and a Fast R-CNN on given proposals."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from .rpn import LibraRPN

Size = tuple[int, int]
Targets = list[dict[str, Tensor]]


def first_stage(model: FasterRCNN) -> FasterRCNN:
    """Leaves the RPN of a detector alone, in place: its proposals are the detections.

    In training the model returns the losses of the RPN; otherwise for each image ``boxes [P, 4]``, best first, in
    pixels of the image, ``scores [P]``, the objectness after the sigmoid, and ``labels [P]`` of ones. They are as many
    as the RPN proposes in evaluation. The state dict has no keys ``roi_heads.*``.

    Args:
        model (FasterRCNN): stock or balanced.

    Returns:
        FasterRCNN: the same model.

    Raises:
        TypeError: for a model of another type, or with another first stage.
    """
    rpn: Any = _rpn_of(model)
    rpn.__class__ = ScoredLibraRPN if isinstance(rpn, LibraRPN) else ScoredRPN
    model.roi_heads = ProposalsOnly().train(model.training)
    return model


def second_stage(model: FasterRCNN) -> FasterRCNN:
    """Takes the RPN from a detector, in place: Fast R-CNN, whose proposals are given with the targets.

    It is called ``model(images, targets)`` in evaluation, too. There, targets need ``boxes`` (perhaps ``[0, 4]``) and
    ``proposals [P, 4]``, xyxy in pixels of the image. As the RPN's own, these are clipped to their image, and those
    with a side below a thousandth of a pixel are left out. There may be none. The state dict has no keys ``rpn.*``.

    Args:
        model (FasterRCNN): stock or balanced; ``MaskRCNN`` and ``KeypointRCNN`` keep their branches.

    Returns:
        FasterRCNN: the same model.

    Raises:
        TypeError: for a model of another type, or with another first stage.
    """
    _rpn_of(model)
    model.rpn = GivenProposals().train(model.training)
    model.transform.register_forward_hook(_resize_proposals)  # which any other class of transform will run
    return model


def _rpn_of(model: Any) -> Any:
    if not isinstance(model, FasterRCNN):
        raise TypeError(f"model must be a FasterRCNN of torchvision.models.detection, got {type(model).__name__}")
    if type(model.rpn) not in (RegionProposalNetwork, LibraRPN):
        raise TypeError(f"model must have a RegionProposalNetwork or LibraRPN, got {type(model.rpn).__name__}")
    return model.rpn


class ScoredProposals(list[Tensor]):
    """The proposals of a batch, a tensor [P, 4] an image.

    Attributes:
        scores (list[Tensor[P]]): the objectness of each, after the sigmoid.
    """

    def __init__(self, boxes: list[Tensor], scores: list[Tensor]) -> None:
        super().__init__(boxes)
        self.scores = scores


class _KeepingScores(RegionProposalNetwork):
    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, image_shapes: list[Size], num_anchors_per_level: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As torchvision's, as :class:`ScoredProposals`; none in training, where nobody takes them."""
        if self.training:
            return [], []
        boxes, scores = super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
        return ScoredProposals(boxes, scores), scores


class ScoredRPN(_KeepingScores):
    """:class:`torchvision.models.detection.rpn.RegionProposalNetwork` that keeps the scores of its proposals."""


class ScoredLibraRPN(_KeepingScores, LibraRPN):
    """:class:`~balanced_learning.detection.rpn.LibraRPN` that keeps the scores of its proposals."""


class ProposalsOnly(nn.Module):
    """Stands for the second stage where there is none: proposals are detections of one class."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: ScoredProposals,
        image_shapes: list[Size],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training:
            return [], {}
        found = zip(proposals, proposals.scores, strict=True)
        ones = torch.ones_like
        return [{"boxes": b, "scores": s, "labels": ones(s, dtype=torch.int64)} for b, s in found], {}


class GivenProposals(nn.Module):
    """Stands for the first stage where there is none: proposals come with the targets."""

    min_size = 1e-3  # of a side, in pixels of the image that the detector sees, as the RPN's

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: Targets | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        if targets is None:
            raise ValueError("targets must be given in evaluation, too: a Fast R-CNN finds its proposals there")
        proposals = []
        for target, size in zip(targets, images.image_sizes, strict=True):
            boxes = clip_boxes_to_image(target["proposals"].to(images.tensors), size)
            proposals.append(boxes[remove_small_boxes(boxes, self.min_size)])
        return proposals, {}


def _proposals_of(target: dict[str, Tensor], i: int) -> Tensor:
    name = f'targets[{i}]["proposals"]'
    if "proposals" not in target:
        raise ValueError(f"{name} is missing: a Fast R-CNN has no others")
    boxes = target["proposals"]
    if not (isinstance(boxes, Tensor) and boxes.is_floating_point()):
        raise TypeError(f"{name} must be a tensor of a floating-point type, got {getattr(boxes, 'dtype', type(boxes))}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} must be of shape [P, 4], got {list(boxes.shape)}")
    if not boxes.isfinite().all():
        raise ValueError(f"{name} must be finite, got {boxes[~boxes.isfinite().all(dim=1)][0].tolist()}")
    return boxes


def _resize_proposals(
    transform: GeneralizedRCNNTransform, args: tuple[Any, ...], output: tuple[ImageList, Targets | None]
) -> None:
    """Resizes the proposals as the transform has resized the images, in the copies that it makes of the targets."""
    images, targets = output
    for i, target in enumerate(targets or []):
        before, after = args[0][i].shape[-2:], images.image_sizes[i]
        target["proposals"] = resize_boxes(_proposals_of(target, i), before, after)
