"""The augmentation policies of torchvision's reference script."""

from typing import Any

from torchvision import tv_tensors
from torchvision.transforms import v2


def augmentation(name: str) -> Any:
    """Returns the policy as a transform of an image and its target together."""
    flip = v2.RandomHorizontalFlip(0.5)
    fill = {tv_tensors.Image: (123, 117, 104), "others": 0}
    policies = {
        "none": [],
        "hflip": [flip],
        "multiscale": [v2.RandomShortestSize(min_size=list(range(480, 801, 32)), max_size=1333), flip],
        "lsj": [
            v2.ScaleJitter(target_size=(1024, 1024), antialias=True),
            v2.RandomCrop((1024, 1024), pad_if_needed=True, fill=fill),
            flip,
        ],
        "ssd": [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=fill), v2.RandomIoUCrop(), flip],
        "ssdlite": [v2.RandomIoUCrop(), flip],
    }
    return v2.Compose([*policies[name], v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])
