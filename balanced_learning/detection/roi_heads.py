"""torchvision's second stage with IoU-balanced sampling and an exchangeable box loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import RoIHeads, keypointrcnn_loss, maskrcnn_loss

from ._common import Matches, match, summed_loss

Targets = list[dict[str, Tensor]]


class LibraRoIHeads(RoIHeads):
    """:class:`torchvision.models.detection.roi_heads.RoIHeads` that trains balanced; inference is torchvision's own.

    Attributes:
        fg_bg_sampler: called with labels, IoUs and matched indices, as :class:`~balanced_learning.IoUBalancedSampler`
            is; torchvision's own random sampler is also accepted.
        box_loss (nn.Module): a loss with a ``reduction`` attribute. Its sum over the positives is divided by the number
            of boxes sampled, positives and negatives, as torchvision does.
    """

    box_loss: nn.Module

    def select_training_samples(
        self, proposals: list[Tensor], targets: Targets | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], tuple[Tensor, ...]]:
        if isinstance(self.fg_bg_sampler, BalancedPositiveNegativeSampler):
            return super().select_training_samples(proposals, targets)
        self.check_targets(targets)
        proposals, matches = self.candidates(proposals, targets or [])
        positives, negatives = self.fg_bg_sampler(*matches[:3])
        sampled = torch.where(torch.cat(positives) | torch.cat(negatives))[0]
        ends = torch.tensor([len(image) for image in proposals], device="cpu").cumsum(dim=0)
        splits = torch.searchsorted(sampled.cpu(), ends)[:-1]
        proposals, labels, matched_idxs, matched_boxes = (
            list(torch.cat(column)[sampled].tensor_split(splits))
            for column in (proposals, matches.labels, matches.matched_idxs, matches.matched_boxes)
        )
        return proposals, matched_idxs, labels, self.box_coder.encode(matched_boxes, proposals)

    def candidates(self, proposals: list[Tensor], targets: Targets) -> tuple[list[Tensor], Matches]:
        """What the sampler chooses from: the proposals and the ground truths of each image, and their matches."""
        gt_boxes = [target["boxes"].to(proposals[0].dtype) for target in targets]
        boxes = self.add_gt_proposals(proposals, gt_boxes)
        return boxes, match(self.proposal_matcher, boxes, gt_boxes, [target["labels"] for target in targets])

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, matched_idxs, labels, regression_targets = self.select_training_samples(proposals, targets)
        box_features = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, box_regression = self.box_predictor(box_features)
        losses = self._box_losses(class_logits, box_regression, torch.cat(labels), torch.cat(regression_targets))

        positive = [image_labels > 0 for image_labels in labels]
        boxes = [b[p] for b, p in zip(proposals, positive, strict=True)]
        idxs = [m[p] for m, p in zip(matched_idxs, positive, strict=True)]
        if self.has_mask():
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
            masks, gt_labels = zip(*((t["masks"], t["labels"]) for t in targets or []), strict=True)
            losses["loss_mask"] = maskrcnn_loss(logits, boxes, masks, gt_labels, idxs)
        if self.has_keypoint():
            logits = self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, boxes, image_shapes)))
            losses["loss_keypoint"] = keypointrcnn_loss(logits, boxes, [t["keypoints"] for t in targets or []], idxs)
        return [], losses

    def _box_losses(
        self, class_logits: Tensor, box_regression: Tensor, labels: Tensor, regression_targets: Tensor
    ) -> dict[str, Tensor]:
        """Cross entropy of the S sampled boxes, and the box loss of the positives for their own class.

        ``class_logits [S, classes]``, ``box_regression [S, 4 classes]``, ``labels [S]``, ``regression_targets [S, 4]``.
        """
        if labels.numel() == 0:  # neither ground truth nor proposals: nothing to average over
            return {"loss_classifier": class_logits.sum(), "loss_box_reg": box_regression.sum()}
        positive = torch.where(labels > 0)[0]
        deltas = box_regression.unflatten(1, (-1, 4))[positive, labels[positive]]  # [P, 4]
        return {
            "loss_classifier": F.cross_entropy(class_logits, labels),
            "loss_box_reg": summed_loss(self.box_loss, deltas, regression_targets[positive]) / labels.numel(),
        }
