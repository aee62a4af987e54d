"""The order of classes: the background is mmdetection's last, and torchvision's first."""

import torch
from torch import Tensor

ANCHORS = 9  # of a position, in a RetinaNet
_NEVER = -100.0  # the logit of a class that is never found


def background_first(key: str, value: Tensor) -> Tensor:
    """A weight of mmdetection from version 2 on, in torchvision's order. ``key`` is mmdetection's name of it.

    Boxes and masks of the background, and a RetinaNet's class of that name, are not there: they become 0 and are never
    found.
    """
    if ".fc_cls." in key:
        return value.roll(1, dims=0)
    if ".fc_reg." in key:
        return torch.cat([torch.zeros_like(value[:4]), value])
    if ".conv_logits." in key:
        return torch.cat([torch.zeros_like(value[:1]), value])
    if ".retina_cls." in key:
        by_anchor = value.unflatten(0, (ANCHORS, -1))
        none = torch.full_like(by_anchor[:, :1], _NEVER if key.endswith("bias") else 0.0)
        return torch.cat([none, by_anchor], dim=1).flatten(0, 1)
    return value


def background_last(key: str, value: Tensor) -> Tensor:
    """The way back."""
    if ".fc_cls." in key:
        return value.roll(-1, dims=0)
    if ".fc_reg." in key:
        return value[4:]
    if ".conv_logits." in key:
        return value[1:]
    if ".retina_cls." in key:
        return value.unflatten(0, (ANCHORS, -1))[:, 1:].flatten(0, 1)
    return value
