"""torchvision's first stage with IoU-balanced sampling of anchors and an exchangeable box loss."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork

from .matching import match
from .stages import BalancedStage, summed_loss


class LibraRPN(BalancedStage, RegionProposalNetwork):
    """:class:`torchvision.models.detection.rpn.RegionProposalNetwork` that trains balanced; proposals as before.

    Attributes:
        fg_bg_sampler, box_loss: as in :class:`~balanced_learning.detection.roi_heads.LibraRoIHeads`.
    """

    @torch.jit.unused
    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As torchvision's: float32 labels, of which 1 is an object. They are :class:`Matches`."""
        gt_boxes = [target["boxes"] for target in targets]
        is_object = [torch.ones(len(image), device=image.device) for image in gt_boxes]
        matches = match(self.box_similarity, self.proposal_matcher, anchors, gt_boxes, is_object)
        return matches, matches.matched_boxes

    @torch.jit.unused
    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As torchvision's, with ``box_loss``."""
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        box_loss = summed_loss(self.box_loss, pred_bbox_deltas[positive], torch.cat(regression_targets)[positive])
        is_object = torch.cat(labels)[sampled]
        objectness_loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], is_object)
        return objectness_loss, box_loss / sampled.numel()
