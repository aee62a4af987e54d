"""torchvision's first stage with IoU-balanced sampling of anchors and an exchangeable box loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.rpn import RegionProposalNetwork

from ._common import Matches, match, summed_loss


class LibraRPN(RegionProposalNetwork):
    """:class:`torchvision.models.detection.rpn.RegionProposalNetwork` that trains balanced; proposals as before.

    Attributes:
        fg_bg_sampler, box_loss: as in :class:`~balanced_learning.detection.roi_heads.LibraRoIHeads`.
    """

    box_loss: nn.Module

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[Matches, list[Tensor]]:
        """As torchvision's, but with whole matches for labels: its ``forward`` only hands them to ``compute_loss``."""
        gt_boxes = [target["boxes"] for target in targets]
        is_object = [torch.ones(len(image), dtype=torch.int64, device=image.device) for image in gt_boxes]
        matches = match(self.proposal_matcher, anchors, gt_boxes, is_object)
        return matches, matches.matched_boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: Matches, regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        is_random = isinstance(self.fg_bg_sampler, BalancedPositiveNegativeSampler)
        masks = self.fg_bg_sampler(*labels[: 1 if is_random else 3])
        positive, negative = (torch.where(torch.cat(images))[0] for images in masks)
        sampled = torch.cat([positive, negative])
        box_loss = summed_loss(self.box_loss, pred_bbox_deltas[positive], torch.cat(regression_targets)[positive])
        is_object = torch.cat(labels.labels)[sampled].to(objectness.dtype)
        objectness_loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], is_object)
        return objectness_loss, box_loss / sampled.numel()
