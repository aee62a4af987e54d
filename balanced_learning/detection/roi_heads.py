"""torchvision's second stage with IoU-balanced sampling and an exchangeable box loss."""

from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import roi_heads as torchvisions
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou

from .matching import Matches, match, take_matched
from .stages import BalancedStage, summed_loss

Targets = list[dict[str, Tensor]]


class LibraRoIHeads(BalancedStage, RoIHeads):
    """:class:`torchvision.models.detection.roi_heads.RoIHeads` that trains balanced; inference is torchvision's own.

    It does not call torchvision's ``fastrcnn_loss``: what a program puts in its place has no effect.

    Attributes:
        fg_bg_sampler: called with :class:`~balanced_learning.detection.matching.Matches`, as torchvision calls it with
            labels. Any sampler of torchvision's protocol can be assigned, an
            :class:`~balanced_learning.IoUBalancedSampler`, or a callable that takes the same three lists.
        box_loss (nn.Module): a loss with a ``reduction`` attribute. Its sum over the positives is divided by the number
            of boxes sampled, positives and negatives, as torchvision does.
    """

    # For TorchScript, which has no super() and compiles a method under the name of its function.
    infer = FunctionType(
        *(RoIHeads.forward.__code__, RoIHeads.forward.__globals__, "infer"),
        closure=RoIHeads.forward.__closure__,  # of another library that wraps it
    )
    infer.__annotations__ = RoIHeads.forward.__annotations__

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training:
            return [], self.losses(features, proposals, image_shapes, targets)
        return self.infer(features, proposals, image_shapes, targets)

    @torch.jit.unused
    def losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> dict[str, Tensor]:
        """As torchvision's ``forward`` in training, with the same errors."""
        self._check_types(targets or [])
        proposals, matched_idxs, labels, regression_targets = self.select_training_samples(proposals, targets)
        box_features = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        class_logits, box_regression = self.box_predictor(box_features)
        losses = self.box_losses(class_logits, box_regression, torch.cat(labels), torch.cat(regression_targets))

        positive = [image_labels > 0 for image_labels in labels]
        boxes = [b[p] for b, p in zip(proposals, positive, strict=True)]
        idxs = [m[p] for m, p in zip(matched_idxs, positive, strict=True)]
        if self.has_mask():
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
            masks, gt_labels = zip(*((t["masks"], t["labels"]) for t in targets or []), strict=True)
            losses["loss_mask"] = torchvisions.maskrcnn_loss(logits, boxes, masks, gt_labels, idxs)
        if self.has_keypoint():
            logits = self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, boxes, image_shapes)))
            keypoints = [t["keypoints"] for t in targets or []]
            losses["loss_keypoint"] = torchvisions.keypointrcnn_loss(logits, boxes, keypoints, idxs)
        return losses

    @torch.jit.unused
    def select_training_samples(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """As torchvision's, for all images at once."""
        self.check_targets(targets)
        proposals, matches = self.match_proposals(proposals, targets or [])
        positives, negatives = self.fg_bg_sampler(matches)
        sampled = torch.where(torch.cat(positives) | torch.cat(negatives))[0]
        ends = torch.tensor([len(image) for image in proposals], device="cpu").cumsum(dim=0)
        splits = torch.searchsorted(sampled.cpu(), ends)[:-1]
        proposals, labels, matched_idxs = (
            list(torch.cat(column).index_select(0, sampled).tensor_split(splits))
            for column in (proposals, matches, matches.matched_idxs)
        )
        matched_boxes = take_matched(matches.gt_boxes, matched_idxs)
        return proposals, matched_idxs, labels, self.box_coder.encode(matched_boxes, proposals)

    @torch.jit.unused
    def match_proposals(self, proposals: list[Tensor], targets: Targets) -> tuple[list[Tensor], Matches]:
        """The candidates of the sampler, proposals and ground truths of each image, and what they were matched to."""
        gt_boxes = [target["boxes"].to(proposals[0].dtype) for target in targets]
        boxes = self.add_gt_proposals(proposals, gt_boxes)
        _, matches = self.assign_targets_to_proposals(boxes, gt_boxes, [target["labels"] for target in targets])
        return boxes, matches

    @torch.jit.unused
    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], Matches]:
        """As torchvision's, which does not use ``box_similarity`` here; the labels are :class:`Matches`."""
        matches = match(box_iou, self.proposal_matcher, proposals, gt_boxes, gt_labels)
        return matches.matched_idxs, matches

    def _check_types(self, targets: Targets) -> None:
        """Raises what torchvision's ``forward`` raises."""
        for target in targets:
            boxes, labels = target["boxes"].dtype, target["labels"].dtype
            if boxes not in (torch.float, torch.double, torch.half):
                raise TypeError(f"target boxes must of float type, instead got {boxes}")
            if labels != torch.int64:
                raise TypeError(f"target labels must of int64 type, instead got {labels}")
            if self.has_keypoint() and (keypoints := target["keypoints"].dtype) != torch.float32:
                raise TypeError(f"target keypoints must of float type, instead got {keypoints}")

    def box_losses(
        self, class_logits: Tensor, box_regression: Tensor, labels: Tensor, regression_targets: Tensor
    ) -> dict[str, Tensor]:
        """Cross entropy of the S sampled boxes, and the box loss of the positives for their own class.

        ``class_logits [S, classes]``, ``box_regression [S, 4 classes]``, ``labels [S]``, ``regression_targets [S, 4]``.
        """
        # There is nothing to average over where there are neither ground truths nor proposals.
        count, reduction = max(1, labels.numel()), "mean" if labels.numel() else "sum"
        positive = torch.where(labels > 0)[0]
        deltas = box_regression.unflatten(1, (-1, 4))[positive, labels[positive]]  # [P, 4]
        return {
            "loss_classifier": F.cross_entropy(class_logits, labels, reduction=reduction),
            "loss_box_reg": summed_loss(self.box_loss, deltas, regression_targets[positive]) / count,
        }
