"""Checkpoints of mmdetection in all their forms: what is loaded, what is refused, and the way back."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet

from balanced_learning.detection import from_mmdet, to_mmdet
from tests.reference.mmdet_states import published_state, synthetic_state
from tests.training.coco_data import real_data

__all__ = ["real_data"]

SLOW = pytest.mark.slow
LAYOUTS = {
    "libra": {},
    "plain": {"libra": False},
    "pafpn": {"pafpn": True, "libra": False},
    "mask": {"kind": "mask_rcnn"},
    "retinanet": {"kind": "retinanet"},
    "plain_retinanet": {"kind": "retinanet", "libra": False},
}


@cache
def cached_state(layout: str = "libra", version: int = 3, classes: int = 80) -> Mapping[str, Tensor]:
    return synthetic_state(**LAYOUTS[layout], channels=8, version=version, classes=classes)


def of_objects(model) -> dict[str, Tensor]:
    """The model's state without the rows of label 0, which in RetinaNet and of boxes and masks is nothing.

    The scores of the background go behind those of the classes, where mmdetection 2 and 3 have them.
    """
    state = dict(model.state_dict())
    for key, value in state.items():
        if ".box_predictor.cls_score" in key:
            state[key] = value.roll(-1, dims=0)
        elif ".box_predictor.bbox_pred" in key:
            state[key] = value[4:]
        elif "mask_fcn_logits" in key:
            state[key] = value[1:]
        elif "classification_head.cls_logits" in key:
            state[key] = value.unflatten(0, (9, -1))[:, 1:].flatten(0, 1)
    return state


def contents(tensors: Iterable[Tensor]) -> Counter:
    return Counter(
        (tuple(x.shape), x.dtype, hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()) for x in tensors
    )


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("libra_faster_rcnn_r50_fpn_1x", FasterRCNN),
        pytest.param("libra_faster_rcnn_r101_fpn_1x", FasterRCNN, marks=SLOW),
        pytest.param("libra_faster_rcnn_x101_64x4d_fpn_1x", FasterRCNN, marks=SLOW),
        pytest.param("libra_retinanet_r50_fpn_1x", RetinaNet, marks=SLOW),
    ],
)
def test_published_checkpoints_are_carried_over_without_rest(name, cls):
    state = published_state(name)
    model = from_mmdet(state)
    assert type(model) is cls
    assert not model.training
    assert contents(of_objects(model).values()) == contents(state.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_carried_over_without_rest_and_back_bit_by_bit(layout):
    state = cached_state(layout)
    model = from_mmdet(state)
    assert contents(of_objects(model).values()) == contents(state.values())
    back = to_mmdet(model)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value), key
        assert back[key].dtype == value.dtype, key


@pytest.mark.parametrize("layout", ["libra", "mask"])
def test_mmdetection_1_has_the_background_first(layout):
    state = cached_state(layout, version=1)
    model = from_mmdet(state)
    heads = model.state_dict()
    for ours, theirs in (("cls_score", "fc_cls"), ("bbox_pred", "fc_reg")):
        for end in ("weight", "bias"):
            shown, expected = heads[f"roi_heads.box_predictor.{ours}.{end}"], state[f"bbox_head.{theirs}.{end}"]
            skipped = 0 if ours == "cls_score" else 4
            assert torch.equal(shown[skipped:], expected[skipped:])
    back = to_mmdet(model)
    assert back.keys() == cached_state(layout).keys()
    assert torch.equal(back["roi_head.bbox_head.fc_cls.bias"], state["bbox_head.fc_cls.bias"].roll(-1))
    assert torch.equal(back["roi_head.bbox_head.fc_reg.weight"], state["bbox_head.fc_reg.weight"][4:])
    if layout == "mask":
        assert isinstance(model, MaskRCNN)
        rows = state["mask_head.conv_logits.weight"]
        assert torch.equal(back["roi_head.mask_head.conv_logits.weight"], rows[1:])


FORMS = {
    "whole checkpoint": lambda state: {"state_dict": state, "meta": {"epoch": 12}, "optimizer": {"state": {}}},
    "checkpoint without meta": lambda state: {"state_dict": state},
    "of several devices": lambda state: {f"module.{key}": value for key, value in state.items()},
    "checkpoint of several devices": lambda state: {
        "state_dict": {f"module.{key}": value for key, value in state.items()}
    },
    "without counters": lambda state: {key: x for key, x in state.items() if not key.endswith("num_batches_tracked")},
    "in another order": lambda state: dict(reversed(state.items())),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_same_weights(form):
    state = cached_state()
    found = to_mmdet(from_mmdet(FORMS[form](dict(state))))
    for key, value in state.items():
        assert "num_batches_tracked" in key or torch.equal(found[key], value), key


def test_half_precision_becomes_float32():
    state = {key: x.half() if x.is_floating_point() else x for key, x in cached_state().items()}
    model = from_mmdet(state)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for key, value in to_mmdet(model).items():
        assert torch.equal(value, state[key].to(value.dtype)), key


def test_the_given_weights_are_left_alone_and_not_shared():
    state = {key: value.clone() for key, value in cached_state().items()}
    model = from_mmdet(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert state.keys() == cached_state().keys()
    assert all(torch.equal(state[key], value) for key, value in cached_state().items())


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


def changed(key, value):
    return lambda state: state | {key: value}


REFUSED = {
    "detr": (lambda _: {"transformer.encoder.layers.0.norm1.weight": torch.ones(3)}, "transformer.encoder.layers.0"),
    "another head": (changed("roi_head.bbox_head.fc_iou.weight", torch.ones(1, 8)), "roi_head.bbox_head.fc_iou.weight"),
    "cascade": (changed("roi_head.bbox_head.0.fc_cls.bias", torch.ones(81)), "roi_head.bbox_head.0.fc_cls.bias"),
    "a missing key": (without("rpn_head.rpn_reg.bias"), "rpn_head.rpn_reg.bias"),
    "a missing part of the neck": (without("neck.1.refine.phi.conv.weight"), "neck.1.refine.phi.conv.weight"),
    "a wrong shape": (changed("rpn_head.rpn_conv.weight", torch.ones(8, 8, 1, 1)), "rpn_head.rpn_conv.weight"),
    "another backbone": (without("backbone.layer3.1.conv1.weight"), "backbone.layer3.1"),
    "no ResNet that torchvision has": (
        lambda s: {k: v for k, v in s.items() if ".layer4.1." not in k},
        "(2, 2, 2, 1) blocks",
    ),
    "empty": (lambda _: {}, "bbox_head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_something_else_is_refused_by_its_first_odd_key(name):
    edit, key = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(key)):
        from_mmdet(edit(dict(cached_state())))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([], "list"),
        (None, "None"),
        ({"neck.0.lateral_convs.0.conv.weight": 3}, "neck.0.lateral_convs.0.conv.weight"),
        ({"state_dict": 5}, "state_dict"),
    ],
    ids=["list", "none", "number among tensors", "number as state"],
)
def test_what_holds_no_weights_is_refused(content, named):
    with pytest.raises((TypeError, ValueError), match=named):
        from_mmdet(content)


def test_categories_of_coco(real_data):
    annotations = json.loads((real_data("coco_tiny") / "annotations" / "instances_val2017.json").read_text())
    model = from_mmdet(cached_state())
    categories = sorted(annotations["categories"], key=lambda category: category["id"])
    assert list(model.categories.items()) == list(enumerate((c["name"] for c in categories), start=1))
    assert list(model.category_ids.items()) == list(enumerate((c["id"] for c in categories), start=1))


@pytest.mark.parametrize("layout", ["libra", "retinanet"])
@pytest.mark.parametrize(
    "meta",
    [{"CLASSES": ("cat", "dog")}, {"dataset_meta": {"classes": ("cat", "dog"), "palette": [(1, 2, 3), (4, 5, 6)]}}],
    ids=["mmdetection 2", "mmdetection 3"],
)
def test_categories_of_a_checkpoint(layout, meta):
    model = from_mmdet({"state_dict": cached_state(layout, classes=2), "meta": meta})
    assert model.categories == {1: "cat", 2: "dog"}


def test_unknown_categories_have_no_name():
    model = from_mmdet(cached_state("libra", classes=2))
    assert (model.categories, model.category_ids) == ({}, {})


def test_a_pyramid_without_refinement_is_seen_in_the_list_of_necks():
    state = {key: value for key, value in cached_state().items() if not key.startswith("neck.1.")}
    model = from_mmdet(state)
    assert isinstance(model.backbone.bfp.refine, torch.nn.Identity)
    assert to_mmdet(model).keys() == state.keys()


def test_the_convolutions_of_old_retinanets_are_found():
    new = cached_state("retinanet")
    state = {re.sub(r"(bbox_head\.(?:cls|reg)_convs\.\d)\.conv", r"\1", key): value for key, value in new.items()}
    assert "bbox_head.cls_convs.0.weight" in state
    assert to_mmdet(from_mmdet(state)).keys() == new.keys()
