"""torchvision's RetinaNet heads with an exchangeable box loss, another normalizer, and P7 without activation."""

import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetHead, RetinaNetRegressionHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

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


class BatchNormalizedRetinaNetHead(RetinaNetHead):
    """:class:`torchvision.models.detection.retinanet.RetinaNetHead` that divides by the positives of the whole batch.

    Both losses are sums over all images, divided by the sum of their numbers of positives, of which an image has at
    least one, as in mmdetection; torchvision divides the sum of each image by its own number and averages the images.
    """

    @torch.jit.unused
    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        positives = torch.stack([(idxs >= 0).sum().clamp(min=1) for idxs in matched_idxs])  # [B]
        images = []
        for i in range(len(targets)):
            one = slice(i, i + 1)
            outputs = {name: output[one] for name, output in head_outputs.items()}
            images.append(super().compute_loss(targets[one], outputs, anchors[one], matched_idxs[one]))
        return {
            name: (torch.stack([image[name] for image in images]) * positives).sum() / positives.sum()
            for name in images[0]
        }


class LinearP6P7(LastLevelP6P7):
    """:class:`torchvision.ops.feature_pyramid_network.LastLevelP6P7` without the ReLU between P6 and P7."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(p[-1] if self.use_P5 else c[-1])
        p.extend([p6, self.p7(p6)])
        names.extend(["p6", "p7"])
        return p, names
