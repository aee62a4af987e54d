"""Detectors from the weights of mmdetection, and the way back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights, RetinaNet

from .classes import background_first, background_last
from .keys import current_name, to_mmdetection, to_torchvision
from .layout import Layout

State = dict[str, Tensor]
_COUNTER = ".num_batches_tracked"  # of batch norm, which some files lack


def from_mmdet(state_dict: Mapping[str, Any]) -> Any:
    """A detector with the weights of mmdetection, which finds what they find there.

    Takes Faster R-CNN, Mask R-CNN and RetinaNet on an FPN, balanced or not, with or without the bottom-up path of
    PAFPN, on a ResNet or ResNeXt that torchvision has, trained with mmdetection 1, 2 or 3. Mean, deviation and sizes of
    images are those of its configurations for COCO; RoIAlign, losses and the order of classes those of its version.
    Backbones in the style of Caffe, which take other images, have the same names and cannot be told apart.

    Args:
        state_dict (dict[str, Tensor]): the weights; or the checkpoint that holds them as ``"state_dict"``, whose
            ``"meta"`` may tell the version and the names of the classes. Of a RetinaNet, nothing else tells that it was
            trained with mmdetection 1, in which boxes end with their last pixel.

    Returns:
        FasterRCNN, MaskRCNN or RetinaNet: in evaluation mode; takes a list of RGB images ``[3, H, W]`` in [0, 1]. Its
        ``categories`` is a dict from label to name, and its ``category_ids`` one from label to the id in COCO; what is
        not known is left out.

    Raises:
        TypeError: if ``state_dict`` is no dict, or holds something else than tensors.
        ValueError: for the weights of something else; names the first that is odd or missing.

    Example:
        >>> model = from_mmdet(torch.load("libra_faster_rcnn_r50_fpn_1x_coco.pth"))  # doctest: +SKIP
    """
    state, meta = unpack(state_dict)
    layout = Layout.of(state, meta)
    model = layout.build()
    load(model, state, layout)
    model.categories, model.category_ids = class_names(meta, layout.num_classes)
    return model


def to_mmdet(model: FasterRCNN | RetinaNet) -> State:
    """The weights of a detector with the names, and the order of classes, of mmdetection 3.

    Args:
        model (FasterRCNN or RetinaNet): a detector of :func:`from_mmdet` or of the builders, on a ResNet or ResNeXt.

    Returns:
        dict[str, Tensor]: the state dict.

    Raises:
        ValueError: for a model with a weight that mmdetection's have not; names it.
    """
    rename = to_mmdetection(isinstance(model, RetinaNet))
    state = {}
    for key, value in model.state_dict().items():
        if (name := rename(key)) is None:
            raise ValueError(f"model must have no weights but those of mmdetection's detectors, got {key!r}")
        state[name] = background_last(name, value)
    if hasattr(model.backbone, "bfp"):
        return state
    return {key.replace("neck.0.", "neck."): value for key, value in state.items()}


def unpack(content: Mapping[str, Any]) -> tuple[State, Mapping[str, Any]]:
    """The weights, with the names of mmdetection 3, and what the checkpoint around them tells.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"state_dict must be a dict of tensors, got {type(content).__name__}")
    meta = content.get("meta") if "state_dict" in content else None
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict must be a dict of tensors, got {type(state).__name__}")
    for key, value in state.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise TypeError(f"state_dict must be a dict of names and tensors, got {key!r}: {type(value).__name__}")
    return {current_name(key): value for key, value in state.items()}, meta if isinstance(meta, Mapping) else {}


def load(model: Any, state: State, layout: Layout) -> None:
    """Loads weights of mmdetection into the detector of their layout.

    Raises:
        ValueError: for the first that has no place, another shape, or is missing.
    """
    rename = to_torchvision(layout.is_retinanet)
    own = model.state_dict()
    converted = {}
    for key, value in state.items():
        name = rename(key)
        if name not in own:
            raise ValueError(f"state_dict must hold the weights of a {layout} alone, got {key!r}")
        if not layout.has_background_first:
            value = background_first(key, value)
        if value.shape != own[name].shape:
            raise ValueError(f"state_dict has {key!r} in another shape than that of a {layout}: {list(value.shape)}")
        converted[name] = value
    missing = [key for key in own if key not in converted and not key.endswith(_COUNTER)]
    if missing:
        name = to_mmdetection(layout.is_retinanet)(missing[0])
        raise ValueError(f"state_dict must hold all weights of a {layout}, and has no {name!r}")
    model.load_state_dict(own | converted)


def class_names(meta: Mapping[str, Any], num_classes: int) -> tuple[dict[int, str], dict[int, int]]:
    """The names of the labels, and their ids in COCO: as the checkpoint tells, or, of 80 classes, those of COCO."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    coco = {name: number for number, name in enumerate(names) if number and name != "N/A"}
    dataset = meta.get("dataset_meta")
    found = meta.get("CLASSES") or (dataset.get("classes") if isinstance(dataset, Mapping) else None)
    if found is None and len(coco) == num_classes - 1:
        found = tuple(coco)
    if not isinstance(found, (list, tuple)) or len(found) != num_classes - 1:
        return {}, {}
    ids = dict(enumerate(coco.values(), 1)) if tuple(found) == tuple(coco) else {}
    return {label: str(name) for label, name in enumerate(found, 1)}, ids
