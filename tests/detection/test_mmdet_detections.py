"""Detections of the assembled detector in a photo against mmdetection's formulas put together."""

from copy import deepcopy

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from tests.detection.mmdet_models import detector
from tests.reference.mmdet_detectors import detect_retinanet, detect_two_stages
from tests.training.coco_data import real_data

__all__ = ["real_data"]

DETECT = {"faster_rcnn": detect_two_stages, "retinanet": detect_retinanet}


@pytest.fixture
def photo(real_data):
    def open_photo(name: str) -> torch.Tensor:
        return pil_to_tensor(Image.open(real_data("coco_tiny") / "val2017" / name)).double() / 255

    return open_photo


@pytest.mark.parametrize(
    ("kind", "arguments", "name", "scale"),
    [
        ("faster_rcnn", {}, "000000010764.jpg", (192, 128)),
        pytest.param(
            "faster_rcnn", {"libra": False, "pafpn": True}, "000000020992.jpg", (250, 150), marks=pytest.mark.slow
        ),
        ("retinanet", {}, "000000005001.jpg", (171, 128)),
    ],
    ids=["Libra Faster R-CNN", "Faster R-CNN with PAFPN", "Libra RetinaNet"],
)
def test_detections_are_mmdetections(kind, arguments, name, scale, photo):
    state, model = detector(kind, **arguments)
    image = photo(name)
    theirs = DETECT[kind](state, image, scale)
    ours = detections(model, image, scale)
    assert len(theirs.scores) == 100
    torch.testing.assert_close(ours["scores"], theirs.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours["boxes"], theirs.boxes, rtol=0, atol=1e-3)
    assert torch.equal(ours["labels"], theirs.classes + 1)


@pytest.mark.parametrize("kind", DETECT)
def test_boxes_of_mmdetection_1_end_after_their_last_pixel(kind, photo):
    """In a photo that is neither resized nor padded, without boxes thinner than a cell.

    No level of the RetinaNet has more than 1,000 pairs of anchor and class, of which the versions choose differently.
    """
    state, model = detector(kind, legacy=True)
    if kind == "retinanet":
        state, model = dict(state), deepcopy(model)
        state["bbox_head.retina_cls.bias"] = state["bbox_head.retina_cls.bias"] - 1.5
        model.head.classification_head.cls_logits.bias.data -= 1.5
    image = photo("000000005001.jpg")[:, 100:228, 200:360]
    theirs = DETECT[kind](state, image, image.shape[1:], legacy=True)
    ours = detections(model, image, image.shape[1:])
    assert len(theirs.scores) == 100
    torch.testing.assert_close(ours["scores"], theirs.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours["boxes"][:, :2], theirs.boxes[:, :2], rtol=0, atol=1e-3)
    torch.testing.assert_close(ours["boxes"][:, 2:], theirs.boxes[:, 2:] + 1, rtol=0, atol=1e-3)
    assert torch.equal(ours["labels"], theirs.classes + 1)


def test_boxes_of_mmdetection_1_are_scaled_with_their_last_pixels():
    _, model = detector(legacy=True)
    boxes = torch.tensor([[10.0, 20, 30, 40]])
    (found,) = model.transform.postprocess([{"boxes": boxes}], [(160, 192)], [(80, 96)])
    assert found["boxes"].tolist() == [[10 / 2, 20 / 2, 29 / 2 + 1, 39 / 2 + 1]]


@torch.no_grad()
def detections(model, image: torch.Tensor, scale: tuple[int, int]) -> dict[str, torch.Tensor]:
    """With images of another size than 800 x 1333, to be quick."""
    kept = model.transform.min_size, model.transform.max_size
    model.transform.min_size, model.transform.max_size = (min(scale),), max(scale)
    (found,) = model([image])
    model.transform.min_size, model.transform.max_size = kept
    return found
