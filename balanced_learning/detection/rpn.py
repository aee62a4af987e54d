"""torchvision's first stage with IoU-balanced sampling of anchors and an exchangeable box loss."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork

from .anchors import Anchors, reaches_beyond
from .matching import Matches, match
from .stages import BalancedStage, summed_loss


class LibraRPN(BalancedStage, RegionProposalNetwork):
    """:class:`torchvision.models.detection.rpn.RegionProposalNetwork` that trains balanced; proposals as before.

    Attributes:
        fg_bg_sampler, box_loss: as in :class:`~balanced_learning.detection.roi_heads.LibraRoIHeads`.
        allowed_border (int, optional): anchors that reach more than so many pixels beyond their image, without its
            padding, are not trained on. ``None``: all are.
    """

    allowed_border = None  # type: int | None  # an annotation would hide those of torchvision from TorchScript

    @torch.jit.unused
    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As torchvision's: float32 labels, of which 1 is an object. They are :class:`Matches`."""
        gt_boxes = [target["boxes"] for target in targets]
        is_object = [torch.ones(len(image), device=image.device) for image in gt_boxes]
        if self.allowed_border is None:
            matches = match(self.box_similarity, self.proposal_matcher, anchors, gt_boxes, is_object)
        else:
            matches = self._match_inside(anchors, gt_boxes, is_object, self.allowed_border)
        return matches, matches.matched_boxes

    @torch.jit.unused
    def _match_inside(
        self, anchors: list[Tensor], gt_boxes: list[Tensor], is_object: list[Tensor], border: int
    ) -> Matches:
        """Matches as if there were no anchors beyond the border, and ignores these."""
        if not isinstance(anchors, Anchors):
            raise TypeError(f"rpn.allowed_border={border} needs the anchors of a SizedAnchorGenerator or alike")
        sizes = zip(anchors, anchors.image_sizes, strict=True)
        beyond = [reaches_beyond(image, size, border) for image, size in sizes]
        inside = [image.masked_fill(far[:, None], 0) for image, far in zip(anchors, beyond, strict=True)]
        # The best of a ground truth that no anchor overlaps would be all of them; so each has a speck of its own.
        centers = [(image[:, :2] + image[:, 2:]) / 2 for image in gt_boxes]
        specks = [torch.cat([center, center + 2**-8], dim=1) for center in centers]
        candidates = [torch.cat(pair) for pair in zip(inside, specks, strict=True)]
        found = match(self.box_similarity, self.proposal_matcher, candidates, gt_boxes, is_object)
        labels, ious, matched_idxs = (
            [of[: len(image)] for of, image in zip(column, anchors, strict=True)]
            for column in (found, found.ious, found.matched_idxs)
        )
        matches = Matches(labels, ious, matched_idxs, gt_boxes)
        for i, far in enumerate(beyond):
            matches[i] = matches[i].masked_fill(far, -1)
        return matches

    @torch.jit.unused
    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As torchvision's, with ``box_loss``."""
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        # There is nothing to average over where all anchors are beyond the border.
        count, reduction = max(1, sampled.numel()), "mean" if sampled.numel() else "sum"
        box_loss = summed_loss(self.box_loss, pred_bbox_deltas[positive], torch.cat(regression_targets)[positive])
        is_object = torch.cat(labels)[sampled]
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], is_object, reduction=reduction
        )
        return objectness_loss, box_loss / count
