"""What a detector does to images before its backbone sees them: what torchvision does, in an order that costs less."""

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class ResizingFirst(GeneralizedRCNNTransform):
    """:class:`torchvision.models.detection.transform.GeneralizedRCNNTransform` that normalizes what it has resized.

    Both are linear, so that their order changes the result by rounding alone. Torchvision's goes twice over all pixels
    of an image before, even if a quarter of them is then read, and holds them once more.
    """

    def normalize(self, image: Tensor) -> Tensor:
        """Only checks the type, as torchvision's does; :meth:`batch_images` normalizes."""
        if not image.is_floating_point():
            raise TypeError(
                f"Expected input images to be of floating type (in range [0, 1]), but found type {image.dtype} instead"
            )
        return image

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        first = images[0]
        std = torch.tensor(self.image_std, dtype=first.dtype)[:, None, None]
        mean = torch.tensor(self.image_mean, dtype=first.dtype)[:, None, None]
        factor = (1 / std).to(first.device, non_blocking=True)
        offset = (-mean / std).to(first.device, non_blocking=True)
        if torchvision._is_tracing():
            return self._onnx_batch_images([image * factor + offset for image in images], size_divisible)
        height, width = [
            (max([image.shape[dim] for image in images]) + size_divisible - 1) // size_divisible * size_divisible
            for dim in (1, 2)
        ]
        batch = first.new_zeros([len(images), first.shape[0], height, width])
        for i, image in enumerate(images):
            batch[i, :, : image.shape[1], : image.shape[2]].copy_(image).mul_(factor).add_(offset)
        return batch
