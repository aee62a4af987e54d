"""An RPN and a Fast R-CNN alone, beside the Faster R-CNN whose stages they are."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from balanced_learning.detection import apply_libra
from balanced_learning.detection.conventions import apply_conventions
from balanced_learning.detection.proposals import first_stage, second_stage
from balanced_learning.training.transform import ResizingFirst

SIZES = {"min_size": 150, "max_size": 190}  # so that all images are resized, by different factors


@pytest.fixture(params=["stock", "libra"])
def whole(request, build) -> Callable[..., nn.Module]:
    """A Faster R-CNN that proposes as much in training as in evaluation."""

    def prepare(kind: str = "fasterrcnn") -> nn.Module:
        model = build(kind, **SIZES, rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=100)
        return apply_libra(model, rpn=True) if request.param == "libra" else model

    return prepare


@torch.no_grad()
def propose(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The targets with the proposals of the model's own RPN, in pixels of the images."""
    found = first_stage(copy.deepcopy(model)).eval()(images)
    return [target | {"proposals": image["boxes"]} for target, image in zip(targets, found, strict=True)]


def test_an_rpn_detects_its_proposals(whole, images):
    model = whole().eval()
    with torch.no_grad():
        inputs, _ = model.transform(images)
        expected, _ = model.rpn(inputs, model.backbone(inputs.tensors))
        found = first_stage(copy.deepcopy(model))(images)
    for image, size, resized, proposals in zip(found, images, inputs.image_sizes, expected, strict=True):
        scale = torch.tensor([after / before for after, before in zip(resized, size.shape[1:], strict=True)])
        torch.testing.assert_close(image["boxes"] * scale.flip(0).repeat(2), proposals)
        assert len(proposals) == 100
        assert torch.equal(image["scores"], image["scores"].sort(descending=True).values)
        assert (image["scores"] > 0).all()
        assert (image["scores"] < 1).all()
        assert image["labels"].dtype == torch.int64
        assert image["labels"].tolist() == [1] * 100
        assert image["scores"].shape == (100,)


def test_an_rpn_trains_as_in_a_faster_rcnn(whole, targets, train_step):
    expected, _ = train_step(whole(), targets)
    found, gradients = train_step(first_stage(whole()), targets)
    assert found == {name: expected[name] for name in ("loss_objectness", "loss_rpn_box_reg")}
    assert {"rpn.head.bbox_pred.weight", "backbone.fpn.inner_blocks.0.0.weight"} <= gradients.keys()


def test_state_dicts_lack_the_other_stage_alone(whole):
    keys = list(whole().state_dict())
    assert list(first_stage(whole()).state_dict()) == [key for key in keys if not key.startswith("roi_heads.")]
    assert list(second_stage(whole()).state_dict()) == [key for key in keys if not key.startswith("rpn.")]


def test_a_fast_rcnn_samples_what_a_faster_rcnn_with_that_rpn_does(whole, images, targets):
    """Sampled boxes, labels, matches and regression targets, for two images of different size."""
    images, targets = images[:2], [targets[0], targets[2]]
    faster = whole().train()
    with torch.no_grad():
        inputs, moved = faster.transform(images, targets)
        faster.rpn.eval()
        own, _ = faster.rpn(inputs, faster.backbone(inputs.tensors))
    given = propose(faster, images, targets)
    fast = second_stage(copy.deepcopy(faster)).train()
    inputs, resized = fast.transform(images, given)
    proposals, losses = fast.rpn(inputs, {}, resized)
    assert losses == {}
    torch.testing.assert_close(proposals, own, rtol=0, atol=1e-3)
    selections = []
    for model, candidates, wanted in ((faster, own, moved), (fast, proposals, resized)):
        torch.manual_seed(7)
        selections.append(model.roi_heads.select_training_samples(list(candidates), wanted))
    boxes, matched_idxs, labels, regression_targets = selections[0]
    torch.testing.assert_close(selections[1][0], boxes, rtol=0, atol=1e-3)
    assert all(
        torch.equal(a, b) for a, b in zip(selections[1][1] + selections[1][2], matched_idxs + labels, strict=True)
    )
    torch.testing.assert_close(selections[1][3], regression_targets, rtol=0, atol=1e-3)
    assert all((image > 0).any() and (image == 0).any() for image in labels)


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn"])
def test_a_fast_rcnn_detects_and_trains_on_given_proposals(whole, kind, images, targets, detect, train_step):
    model = whole(kind)
    given = propose(model, images, targets)
    expected = detect(model)
    fast = second_stage(model)
    with torch.no_grad():
        found = fast.eval()(images, given)
    for one, another in zip(found, expected, strict=True):
        assert one.keys() == another.keys()
        torch.testing.assert_close(one["boxes"], another["boxes"], rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(one["scores"], another["scores"], rtol=1e-3, atol=1e-3)
        assert len(one["boxes"]) > 0
    losses, gradients = train_step(fast, given)
    heads = {"loss_classifier", "loss_box_reg"} | ({"loss_mask"} if kind == "maskrcnn" else set())
    assert losses.keys() == heads
    assert "backbone.fpn.layer_blocks.0.0.weight" in gradients


def test_targets_of_an_evaluation_may_have_no_boxes_and_stay_as_they_are(whole, images, targets, empty_targets):
    model = whole()
    given = propose(model, images, empty_targets)
    for target in given:
        del target["masks"], target["keypoints"]
    before = [target["proposals"].clone() for target in given]
    with torch.no_grad():
        assert all(len(image["boxes"]) for image in second_stage(model).eval()(images, given))
    assert all(torch.equal(target["proposals"], boxes) for target, boxes in zip(given, before, strict=True))


def test_the_transform_of_the_training_program_resizes_proposals_too(whole, images, targets):
    model = second_stage(whole()).eval()
    given = propose(whole(), images, targets)
    _, expected = model.transform(images, given)
    model.transform.__class__ = ResizingFirst
    _, found = model.transform(images, given)
    for one, another, before in zip(found, expected, given, strict=True):
        assert torch.equal(one["proposals"], another["proposals"])
        assert not torch.allclose(one["proposals"], before["proposals"])


def test_images_without_proposals_have_no_detections_and_train_on_their_boxes(whole, images, targets, train_step):
    model = second_stage(whole())
    images, targets = images[::2], [target | {"proposals": torch.zeros(0, 4)} for target in targets[::2]]
    with torch.no_grad():
        assert [len(image["boxes"]) for image in model.eval()(images, targets)] == [0, 0]
    losses = model.train()(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_box_reg"] > 0 or losses["loss_classifier"] > 0


def test_proposals_without_a_side_are_left_out_and_others_are_clipped(build, images):
    model = second_stage(build("fasterrcnn"))  # of the size of the images
    boxes = [[10, 10, 10, 20], [30, 10, 20, 20], [5, 5, 15, 15], [-50, -50, 20, 1000], [200, 200, 300, 300]]
    target = {"boxes": torch.zeros(0, 4), "proposals": torch.tensor(boxes, dtype=torch.float32)}
    inputs, resized = model.eval().transform(images[:1], [target])
    proposals, _ = model.rpn(inputs, {}, resized)
    assert proposals[0].tolist() == [[5, 5, 15, 15], [0, 0, 20, 96]]


@pytest.mark.parametrize(
    ("proposals", "error", "message"),
    [
        (None, ValueError, "is missing"),
        (
            [[1.0, 2, 3, 4]],
            TypeError,
            r"must be a tensor of a floating-point type, got .*list",
        ),
        (torch.tensor([[1, 2, 3, 4]]), TypeError, r"must be a tensor of a floating-point type, got torch\.int64"),
        (torch.zeros(4), ValueError, r"must be of shape \[P, 4\], got \[4\]"),
        (
            torch.tensor([[1, 2, math.nan, 4]]),
            ValueError,
            r"must be finite, got \[1.0, 2.0, nan",
        ),
        (torch.tensor([[1, 2, math.inf, 4]]), ValueError, "must be finite"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_proposals_are_errors_that_name_them(build, images, targets, training, proposals, error, message):
    model = second_stage(build("fasterrcnn")).train(training)
    given = [target | {"proposals": torch.tensor([[1.0, 2, 30, 40]])} for target in targets]
    if proposals is None:
        del given[1]["proposals"]
    else:
        given[1]["proposals"] = proposals
    with pytest.raises(error, match=r'^targets\[1\]\["proposals"\] ' + message):
        model(images, given)


def test_a_fast_rcnn_without_targets_is_an_error(build, images):
    with pytest.raises(ValueError, match="targets must be given in evaluation, too"):
        second_stage(build("fasterrcnn")).eval()(images)


@pytest.mark.parametrize("stage", [first_stage, second_stage])
def test_other_models_are_errors(build, stage):
    with pytest.raises(TypeError, match=r"model must be a FasterRCNN of .*, got RetinaNet"):
        stage(build("retinanet"))
    model = stage(build("fasterrcnn"))
    with pytest.raises(TypeError, match="model must have a RegionProposalNetwork or LibraRPN, got"):
        stage(model)


@pytest.mark.parametrize("stage", [first_stage, second_stage])
def test_a_stage_with_conventions_can_be_copied(whole, stage, images, targets, train_step):
    model = whole()
    given = propose(model, images, targets)
    apply_conventions(model, anchors="exact", roi_aligned=True, rpn_allowed_border=0, rpn_max_negatives_per_positive=5)
    stage(model)
    expected, _ = train_step(model, given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert train_step(other, given)[0] == expected
