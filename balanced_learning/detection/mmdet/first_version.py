"""What mmdetection 1 does otherwise, beside anchors: in it, boxes end with their last pixel."""

from typing import Any

from ..pooling import AlignedMultiScaleRoIAlign
from .resizing import RoundingTransform


class LastPixelTransform(RoundingTransform):
    """Scales boxes to the size of the image by their last pixels, not by the corners behind them."""

    def postprocess(
        self,
        result: list[dict[str, Any]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Any]]:
        if self.training:
            return result
        last = [image["boxes"].new_tensor([0, 0, 1, 1]) for image in result]
        result = [image | {"boxes": image["boxes"] - one} for image, one in zip(result, last, strict=True)]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        return [image | {"boxes": image["boxes"] + one} for image, one in zip(result, last, strict=True)]


class UnalignedMultiScaleRoIAlign(AlignedMultiScaleRoIAlign):
    """:class:`torchvision.ops.MultiScaleRoIAlign`, but that boxes narrower than a cell stay as narrow."""

    shift = 0.5
