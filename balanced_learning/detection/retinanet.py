"""torchvision's RetinaNet box head with an exchangeable loss."""

import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetRegressionHead

from .stages import summed_loss


class LibraRetinaNetRegressionHead(RetinaNetRegressionHead):
    """:class:`torchvision.models.detection.retinanet.RetinaNetRegressionHead` with another box loss.

    Attributes:
        box_loss (nn.Module): a loss with a ``reduction`` attribute. As in torchvision, its sum over the positives of an
            image is divided by their number, and the images are averaged.
    """

    __jit_ignored_attributes__ = ("box_loss",)

    @torch.jit.unused
    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> Tensor:
        """As torchvision's, with ``box_loss``."""
        losses = []
        for target, deltas, boxes, idxs in zip(
            targets, head_outputs["bbox_regression"], anchors, matched_idxs, strict=False
        ):
            positive = torch.where(idxs >= 0)[0]
            wanted = self.box_coder.encode_single(target["boxes"][idxs[positive]], boxes[positive])
            losses.append(summed_loss(self.box_loss, deltas[positive], wanted) / max(1, len(positive)))
        return torch.stack(losses).sum() / len(targets)
