"""torchvision's protocols of samplers, matchers and targets, and TorchScript: its own stages beside balanced ones."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torchvision.ops
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from balanced_learning import IoUBalancedSampler
from balanced_learning.detection import apply_libra
from balanced_learning.detection.roi_heads import LibraRoIHeads
from balanced_learning.detection.rpn import LibraRPN
from tests.detection.test_stages import Constant, random_boxes, roi_heads, rpn

STOCK_LOSS = nn.SmoothL1Loss(reduction="sum", beta=1 / 9)


def balanced_as_stock(kind: str, model: nn.Module) -> nn.Module:
    """Balanced stages with the settings of torchvision."""
    if kind == "retinanet":
        return apply_libra(model, pyramid=False, box_loss=nn.L1Loss(reduction="sum"))
    apply_libra(model, sampler=False, pyramid=False, box_loss=STOCK_LOSS, rpn=True)
    model.rpn.box_loss = STOCK_LOSS
    return model


# Samplers


def first_of_labels(labels):
    """The first sixteen positives and negatives."""
    return tuple(
        [(image.cumsum(0) <= 16) & image for image in images]
        for images in ([image >= 1 for image in labels], [image == 0 for image in labels])
    )


class FirstOfThree:
    def __call__(self, labels, ious, matched_idxs):
        assert all(image.dtype == torch.int64 for image in (*labels, *matched_idxs))
        assert all(image.is_floating_point() for image in ious)
        return first_of_labels(labels)


class FirstModule(nn.Module):
    def forward(self, labels):
        return first_of_labels(labels)


class FirstModuleOfThree(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, labels, ious, matched_idxs):
        return FirstOfThree()(labels, ious, matched_idxs)


class Watcher:
    def __init__(self, sampler):
        self.sampler, self.ious = sampler, []

    def __call__(self, labels):
        self.ious += getattr(labels, "ious", [])
        return self.sampler(labels)


FIRST = [
    first_of_labels,
    lambda labels: first_of_labels(labels),
    lambda labels, ious, matched_idxs: first_of_labels(labels),
    FirstOfThree(),
    FirstModule(),
    FirstModuleOfThree(),
]


@pytest.mark.parametrize("sampler", FIRST, ids=range(len(FIRST)))
def test_a_sampler_of_either_protocol_draws_as_in_torchvision(sampler, build, targets, train_step):
    stock, balanced = build("fasterrcnn"), balanced_as_stock("fasterrcnn", build("fasterrcnn"))
    for stage in ("rpn", "roi_heads"):
        getattr(stock, stage).fg_bg_sampler = first_of_labels
        getattr(balanced, stage).fg_bg_sampler = sampler
    torch.testing.assert_close(train_step(balanced, targets)[0], train_step(stock, targets)[0], rtol=0, atol=0)


@pytest.mark.parametrize("sampler", FIRST, ids=range(len(FIRST)))
def test_apply_libra_takes_a_sampler_of_either_protocol(sampler, build, targets, train_step):
    stock = build("fasterrcnn")
    stock.roi_heads.fg_bg_sampler = first_of_labels
    balanced = apply_libra(build("fasterrcnn"), sampler=sampler, pyramid=False, box_loss=False)
    torch.testing.assert_close(train_step(balanced, targets)[0], train_step(stock, targets)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sampler", "is_balanced"),
    [
        (BalancedPositiveNegativeSampler(64, 0.25), False),
        (BalancedPositiveNegativeSampler(64, 0.25), True),
        (IoUBalancedSampler(64), True),
        (FirstOfThree(), True),
    ],
)
def test_watching_a_sampler_changes_nothing(sampler, is_balanced, build, targets, train_step):
    model = apply_libra(build("fasterrcnn"), rpn=True) if is_balanced else build("fasterrcnn")
    stages = model.rpn, model.roi_heads
    for stage in stages:
        stage.fg_bg_sampler = sampler
    expected = train_step(model, targets)
    for stage in stages:
        stage.fg_bg_sampler = Watcher(stage.fg_bg_sampler)
    torch.testing.assert_close(train_step(model, targets), expected, rtol=0, atol=0)
    assert [len(stage.fg_bg_sampler.ious) for stage in stages] == [3 * is_balanced] * 2


def test_a_sampler_can_be_exchanged_for_one_of_another_kind(build, targets, train_step):
    model = apply_libra(build("fasterrcnn"))
    for sampler in (*FIRST, IoUBalancedSampler(8), BalancedPositiveNegativeSampler(8, 0.5), FirstModule()):
        model.roi_heads.fg_bg_sampler = sampler
        assert train_step(model, targets)[0]["loss_box_reg"].isfinite()
    assert list(model.roi_heads.fg_bg_sampler.modules()) == [sampler]


def test_parameters_of_a_sampler_belong_to_the_model(build):
    model = apply_libra(build("fasterrcnn"), sampler=FirstModuleOfThree())
    assert [name for name, _ in model.named_parameters() if name.endswith("scale")] == [
        "roi_heads.fg_bg_sampler.sampler.scale"
    ]


def test_an_iou_balanced_sampler_in_a_stage_is_the_same_as_before():
    given, heads = IoUBalancedSampler(8, num_bins=2), roi_heads()
    heads.fg_bg_sampler = given
    held = heads.fg_bg_sampler
    assert held is given
    assert isinstance(held, IoUBalancedSampler)
    assert held == IoUBalancedSampler(8, num_bins=2)
    assert IoUBalancedSampler(8, num_bins=2) == held
    assert hash(held) == hash(IoUBalancedSampler(8, num_bins=2))
    assert held != IoUBalancedSampler(9, num_bins=2)
    assert dataclasses.replace(held, num_bins=5) == IoUBalancedSampler(8, num_bins=5)
    for copied in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):  # noqa: S301
        assert copied == held
    lists = {"labels": [torch.tensor([0, 1])], "ious": [torch.rand(2)], "matched_idxs": [torch.tensor([0, 0])]}
    for masks in (held(*lists.values()), held(**lists)):
        assert [image.tolist() for (image,) in masks] == [[False, True], [True, False]]
    with pytest.raises(ValueError, match="ious must have one tensor for each of the 1 images, got 0"):
        held(lists["labels"])


# Targets


def without(key):
    return lambda target: target.pop(key)


def cast(key, dtype):
    return lambda target: target.update({key: target[key].to(dtype)})


BAD = [
    *(without(key) for key in ("boxes", "labels", "masks", "keypoints")),
    cast("boxes", torch.int64),
    cast("boxes", torch.bfloat16),
    cast("labels", torch.int32),
    cast("labels", torch.float32),
    cast("keypoints", torch.float64),
    lambda target: target.update(labels=target["labels"][:1]),
    lambda target: target.update(boxes=target["boxes"][:, :3]),
    lambda target: target.update(boxes=target["boxes"].tolist()),
    lambda target: target.update(boxes=target["boxes"][:, [2, 3, 0, 1]]),
]


def outcome(call):
    """The result, or the type and the message of the error."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        try:
            return call()
        except Exception as error:
            return type(error), str(error)


def assert_same_outcome(of_stock, of_balanced):
    if isinstance(of_stock, tuple) and isinstance(of_stock[0], type):
        assert of_balanced == of_stock
    else:
        torch.testing.assert_close(of_balanced, of_stock, rtol=0, atol=0)


@pytest.fixture(scope="module")
def pair(kind, build):
    return build(kind), balanced_as_stock(kind, build(kind))


@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("spoil", BAD, ids=range(len(BAD)))
def test_a_bad_target_has_the_outcome_of_torchvision(spoil, num_images, pair, images, targets):
    spoiled = [dict(target) for target in targets[:num_images]]
    spoil(spoiled[0])
    assert_same_outcome(*(outcome(lambda m=model: m.train()(images[:num_images], spoiled)) for model in pair))


@pytest.mark.parametrize("num_targets", [None, 0, 1, 2, 4])
def test_a_wrong_number_of_targets_has_the_outcome_of_torchvision(num_targets, pair, images, targets):
    wrong = None if num_targets is None else [*targets, targets[0]][:num_targets]
    assert_same_outcome(*(outcome(lambda m=model: m.train()(images, wrong)) for model in pair))


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spoil", BAD[:10], ids=range(10))
def test_roi_heads_alone_refuse_a_bad_target_as_torchvision(spoil, training, num_images, targets):
    """Also boxes of a wrong type, which the model as a whole makes floating-point when it resizes them."""
    spoiled = [dict(target) for target in targets[:num_images]]
    spoil(spoiled[0])
    boxes = [random_boxes(5) for _ in spoiled]
    outcomes = []
    for cls in (RoIHeads, LibraRoIHeads):
        heads = roi_heads(cls).train(training)
        for part in ("mask", "keypoint"):
            for kind in ("roi_pool", "head", "predictor"):
                setattr(heads, f"{part}_{kind}", Constant(None))
        outcomes.append(outcome(lambda heads=heads: heads({}, boxes, [(96, 128)] * num_images, spoiled)))
    assert isinstance(outcomes[0][0], type)  # an error: if not for the target, then for the lack of a predictor
    assert outcomes[1] == outcomes[0]


def test_an_image_without_objects_has_no_box_loss(kind, build):
    """Its target as torchvision's own tests have it: labels and keypoints of other shapes than [0] and [0, 17, 3]."""
    target = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(1, 1, dtype=torch.int64),
        "masks": torch.zeros(0, 100, 100, dtype=torch.uint8),
        "keypoints": torch.zeros(17, 0, 3),
    }
    model = apply_libra(build(kind), rpn=kind != "retinanet").train()
    losses = model([torch.rand(3, 100, 100)], [target])
    without_positives = {"loss_box_reg", "loss_rpn_box_reg", "loss_mask", "loss_keypoint", "bbox_regression"}
    assert {name: loss.item() for name, loss in losses.items() if name in without_positives} == dict.fromkeys(
        without_positives & set(losses), 0
    )
    assert all(loss.isfinite() for loss in losses.values())


# Matchers


class EverySecond(Matcher):
    def __call__(self, quality: Tensor) -> Tensor:
        matched_idxs = super().__call__(quality)
        matched_idxs[::2] = self.BETWEEN_THRESHOLDS
        return matched_idxs


def giou_as_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return torchvision.ops.generalized_box_iou(boxes1, boxes2).clamp(min=0)


class OfNobody:
    """A matcher with no more than torchvision asks for: a ground truth takes the boxes it covers by two fifths."""

    BELOW_LOW_THRESHOLD, BETWEEN_THRESHOLDS = -1, -2

    def __call__(self, quality: Tensor) -> Tensor:
        ious, matched_idxs = quality.max(dim=0)
        return torch.where(ious > 0.4, matched_idxs, torch.where(ious > 0.2, -2, -1))


@pytest.mark.parametrize("matcher", [EverySecond(0.5, 0.3, True), OfNobody()])
def test_a_matcher_of_the_user_decides_as_in_torchvision(matcher, build, targets, train_step):
    stock, balanced = build("fasterrcnn"), balanced_as_stock("fasterrcnn", build("fasterrcnn"))
    usual = train_step(stock, targets)[0]
    for model in (stock, balanced):
        model.rpn.proposal_matcher = model.roi_heads.proposal_matcher = matcher
    expected = train_step(stock, targets)
    assert expected[0] != usual
    torch.testing.assert_close(train_step(balanced, targets), expected, rtol=0, atol=0)


def test_a_similarity_of_the_user_decides_as_in_torchvision(build, targets, train_step):
    """In the RPN: torchvision's second stage does not use it."""
    stock, balanced = build("fasterrcnn"), balanced_as_stock("fasterrcnn", build("fasterrcnn"))
    usual = train_step(stock, targets)[0]
    for model in (stock, balanced):
        model.rpn.box_similarity = model.roi_heads.box_similarity = giou_as_iou
    expected = train_step(stock, targets)
    assert expected[0] != usual
    torch.testing.assert_close(train_step(balanced, targets), expected, rtol=0, atol=0)
    balanced.rpn.fg_bg_sampler = balanced.roi_heads.fg_bg_sampler = IoUBalancedSampler(16)
    assert all(loss.isfinite() for loss in train_step(balanced, targets)[0].values())


@pytest.mark.parametrize("counts", [(4, 0, 2), (0, 0), (0,), (3,)])
@pytest.mark.parametrize("matcher", [Matcher, EverySecond])
def test_targets_are_assigned_with_the_types_of_torchvision(matcher, counts):
    boxes, gt_boxes = [random_boxes(50) for _ in counts], [random_boxes(count) for count in counts]
    gt_labels = [torch.full((count,), 7) if count else torch.tensor([[0]]) for count in counts]
    targets = [{"boxes": image} for image in gt_boxes]
    stock, libra = roi_heads(RoIHeads), roi_heads(LibraRoIHeads)
    stock.proposal_matcher = libra.proposal_matcher = matcher(0.5, 0.3)
    expected = stock.assign_targets_to_proposals(boxes, gt_boxes, gt_labels)
    matched_idxs, labels = libra.assign_targets_to_proposals(boxes, gt_boxes, gt_labels)
    torch.testing.assert_close((matched_idxs, list(labels)), expected, rtol=0, atol=0)
    libra.fg_bg_sampler = IoUBalancedSampler(16)
    sampled = libra.subsample(labels)
    assert all((image[idxs] >= 0).all() for image, idxs in zip(labels, sampled, strict=True))

    stock, libra = rpn(RegionProposalNetwork), rpn(LibraRPN)
    stock.proposal_matcher = libra.proposal_matcher = matcher(0.5, 0.3, allow_low_quality_matches=True)
    expected = stock.assign_targets_to_anchors(boxes, targets)
    labels, matched_boxes = libra.assign_targets_to_anchors(boxes, targets)
    torch.testing.assert_close((list(labels), matched_boxes), expected, rtol=0, atol=0)


# TorchScript


@pytest.mark.filterwarnings("ignore")
def test_inference_can_be_scripted_as_in_torchvision(kind, build, images, targets, detect):
    balanced = apply_libra(build(kind), pyramid=False, rpn=kind != "retinanet").eval()
    expected = detect(build(kind))
    scripted = torch.jit.script(balanced)
    _, detections = scripted(images)
    assert all(len(image["boxes"]) for image in detections)
    torch.testing.assert_close(detections, expected)
    plain = [{key: value for key, value in target.items() if isinstance(value, Tensor)} for target in targets]
    with pytest.raises(torch.jit.Error):
        scripted.train()(images, plain)
    assert balanced.train()(images, targets)  # scripting changed nothing
