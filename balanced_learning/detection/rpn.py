"""torchvision's first stage with IoU-balanced sampling of anchors and an exchangeable box loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.rpn import RegionProposalNetwork

from ._common import Match, match, summed_loss


class LibraRPN(RegionProposalNetwork):
    """:class:`torchvision.models.detection.rpn.RegionProposalNetwork` that trains balanced; proposals as before.

    Attributes:
        fg_bg_sampler, box_loss: as in :class:`~balanced_learning.detection.roi_heads.LibraRoIHeads`.
    """

    box_loss: nn.Module

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Match], list[Tensor]]:
        """As torchvision's, but with whole matches for labels: its ``forward`` only hands them to ``compute_loss``."""
        matches, matched_boxes = [], []
        for boxes, target in zip(anchors, targets, strict=True):
            gt_boxes = target["boxes"]
            matches.append(match(self.proposal_matcher, boxes, gt_boxes, gt_boxes.new_ones(len(gt_boxes))))
            matched_boxes.append(gt_boxes[matches[-1].matched_idxs] if len(gt_boxes) else boxes.new_zeros(boxes.shape))
        return matches, matched_boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Match], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        columns = [list(column) for column in zip(*labels, strict=True)]
        if isinstance(self.fg_bg_sampler, BalancedPositiveNegativeSampler):
            columns = columns[:1]
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in self.fg_bg_sampler(*columns))
        sampled = torch.cat([positive, negative])
        box_loss = summed_loss(self.box_loss, pred_bbox_deltas[positive], torch.cat(regression_targets)[positive])
        is_object = torch.cat(columns[0])[sampled].to(objectness.dtype)
        objectness_loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], is_object)
        return objectness_loss, box_loss / sampled.numel()
