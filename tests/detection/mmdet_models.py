"""Detectors of from_mmdet and their inputs, for the tests of their parts."""

from collections import OrderedDict
from functools import cache

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from balanced_learning.detection import from_mmdet
from tests.reference.mmdet_states import synthetic_state

SIZE, PADDED = (90, 121), (96, 128)  # of an image, and of the batch that it is in
VERSIONS = pytest.mark.parametrize("legacy", [False, True], ids=["mmdetection 3", "mmdetection 1"])
KINDS = pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@cache
def detector(kind: str = "faster_rcnn", backbone: str = "resnet18", *, legacy: bool = False, **arguments):
    """The state and the model made of it, both in float64."""
    state = synthetic_state(kind, backbone, version=1 if legacy else 3, channels=32, **arguments)
    model = from_mmdet({"state_dict": state, "meta": {"mmdet_version": "1.0rc1" if legacy else "3.3.0"}})
    return {key: value.double() if value.is_floating_point() else value for key, value in state.items()}, model.double()


def batch() -> ImageList:
    """A random image of SIZE, padded."""
    pixels = torch.zeros(1, 3, *PADDED, dtype=torch.float64)
    pixels[..., : SIZE[0], : SIZE[1]] = torch.randn(1, 3, *SIZE, dtype=torch.float64)
    return ImageList(pixels, [SIZE])


def pyramid_of(image: tuple[int, int], first: int = 4, channels: int = 32) -> OrderedDict:
    """Random maps of five levels for an image of this size, the finest with the stride ``first``."""
    sizes = [tuple(-(-side // (first * 2**i)) for side in image) for i in range(5)]
    names = ("0", "1", "2", "3", "pool")
    return OrderedDict((n, torch.randn(1, channels, *s).double()) for n, s in zip(names, sizes, strict=True))


def random_boxes(num: int, image: tuple[int, int], smallest: float = 1) -> Tensor:
    """Boxes of all sizes up to the image's, in it."""
    bounds = torch.tensor([image[1], image[0]], dtype=torch.float64)
    sides = smallest * (bounds / smallest) ** torch.rand(num, 2, dtype=torch.float64)
    corner = torch.rand(num, 2, dtype=torch.float64) * (bounds - sides)
    return torch.cat([corner, corner + sides], dim=1)


def last_pixels(boxes: Tensor, legacy: bool) -> Tensor:
    """The same boxes as mmdetection 1 has them, with the last pixel as their last corner."""
    return boxes - torch.tensor([0.0, 0.0, 1.0, 1.0]).to(boxes) * legacy
