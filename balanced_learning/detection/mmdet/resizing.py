"""The sizes to which mmdetection resizes images."""

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class RoundingTransform(GeneralizedRCNNTransform):
    """:class:`torchvision.models.detection.transform.GeneralizedRCNNTransform` whose sizes are rounded in evaluation.

    As those of mmdetection, to the nearest whole pixel; torchvision rounds down. In training it is torchvision's.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.training or target is not None:
            return super().resize(image, target)
        sides = image.shape[-2:]
        scale = min(self.min_size[-1] / min(sides), self.max_size / max(sides))
        size = [int(side * scale + 0.5) for side in sides]
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0], None
