"""The augmentation policies of torchvision's reference script, and the images that are too narrow for them."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

_SHORT_SIDES, _LONG_SIDE = range(480, 801, 32), 1333
_JITTER_SIDE, _JITTER_SCALES = 1024, (0.1, 2.0)
_LEAST_CROP = 0.3  # of a side


class IoUCrop(v2.RandomIoUCrop):
    """:class:`torchvision.transforms.v2.RandomIoUCrop` for targets with more than one set of boxes.

    The crop is drawn for the first set. Of each, what has its centre outside becomes empty; torchvision's takes what is
    so of the first set for what is so of all.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if params and isinstance(inpt, tv_tensors.BoundingBoxes):
            x, y = 0.5 * (inpt[:, 0] + inpt[:, 2]), 0.5 * (inpt[:, 1] + inpt[:, 3])
            left, top = params["left"], params["top"]
            right, bottom = left + params["width"], top + params["height"]
            params = params | {"is_within_crop_area": (left < x) & (x < right) & (top < y) & (y < bottom)}
        return super().transform(inpt, params)


def augmentation(name: str) -> Any:
    """Returns the policy as a transform of an image and its target together.

    Images and boxes are augmented alike whether there are ``proposals`` in the target or not.
    """
    flip = v2.RandomHorizontalFlip(0.5)
    fill = {tv_tensors.Image: (123, 117, 104), "others": 0}
    crop = IoUCrop(min_scale=_LEAST_CROP)
    square = (_JITTER_SIDE, _JITTER_SIDE)
    policies = {
        "none": [],
        "hflip": [flip],
        "multiscale": [v2.RandomShortestSize(min_size=list(_SHORT_SIDES), max_size=_LONG_SIDE), flip],
        "lsj": [
            v2.ScaleJitter(target_size=square, scale_range=_JITTER_SCALES, antialias=True),
            v2.RandomCrop(square, pad_if_needed=True, fill=fill),
            flip,
        ],
        "ssd": [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=fill), crop, flip],
        "ssdlite": [crop, flip],
    }
    return v2.Compose([*policies[name], v2.ClampBoundingBoxes(), _sanitize])


def _sanitize(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Leaves out boxes of less than a pixel with their labels. Torchvision's would take out the same of proposals."""
    proposals = {name: value for name, value in target.items() if name == "proposals"}
    rest = {name: value for name, value in target.items() if name != "proposals"}
    image, rest = v2.SanitizeBoundingBoxes()(image, rest)
    return image, rest | proposals


def fault_when_resized(
    widths: Tensor, heights: Tensor, *, min_size: int, max_size: int, policy: str = "none"
) -> Tensor:
    """Finds the images of which a side may become less than a pixel, where torchvision raises.

    Args:
        widths (Tensor[N]): in pixels, of whole numbers.
        heights (Tensor[N]): the same.
        min_size: that of the detector.
        max_size: the same.
        policy: how the images are augmented; ``"none"`` in evaluation.

    Returns:
        Tensor[N]: a bool each.
    """
    short, long = torch.minimum(widths, heights).double(), torch.maximum(widths, heights).double()
    if policy == "multiscale":
        return (short * torch.minimum(_over(_SHORT_SIDES[0], short), _over(_LONG_SIDE, long))).floor() < 1
    if policy == "lsj":  # which calculates in float32
        return (short.float() * (_over(_JITTER_SIDE, long).float() * _JITTER_SCALES[0])).floor() < 1
    fault = (short * torch.minimum(_over(min_size, short), _over(max_size, long))).floor() < 1
    if policy in ("ssd", "ssdlite"):
        fault |= (heights.float() * _LEAST_CROP).floor() < 1  # the crop divides by its height
    if policy == "ssd":  # zooming out may add almost a pixel to the short side's fraction that the long side keeps
        zoomed = (long * (short + 1) / short).ceil() - 1
        fault |= (short * torch.minimum(_over(min_size, short), _over(max_size, zoomed))).floor() < 1
    return fault


def _over(number: int, sides: Tensor) -> Tensor:
    """Quotients to the last bit, as Python has them; ``number / sides`` would multiply by the reciprocals."""
    return torch.full_like(sides, number) / sides
