import itertools
import math

import pytest
import torch
import torchvision.ops
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import roi_heads as torchvisions
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from balanced_learning import IoUBalancedSampler
from balanced_learning.detection import apply_libra, matching
from balanced_learning.detection.matching import match
from balanced_learning.detection.retinanet import LibraRetinaNetRegressionHead
from balanced_learning.detection.roi_heads import LibraRoIHeads
from balanced_learning.detection.rpn import LibraRPN

# An object, a box around its upper four fifths, one around its upper half, and two elsewhere.
OBJECT, UPPER, HALF = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0], [0.0, 0.0, 10.0, 5.0]
AWAY, FAR_AWAY = [20.0, 20.0, 30.0, 30.0], [40.0, 40.0, 45.0, 50.0]
# Absolute errors of predicting 0.5 for each delta of UPPER, which are 0, 1/8, 0, log(10/8), and times 10, 10, 5, 5 in
# the second stage; for those of OBJECT, which are 0, they are 4 x 0.5.
PREDICTION, OBJECT_LOSS = 0.5, 2.0
UPPER_LOSS = 1 + (0.5 - 1 / 8) + (0.5 - math.log(10 / 8))
UPPER_LOSS_ROI = 1 + (10 / 8 - 0.5) + (5 * math.log(10 / 8) - 0.5)

REDUCTIONS = ["none", "mean", "sum"]


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *_):
        return self.value


class Spy:
    """A sampler that remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, labels, ious, matched_idxs):
        self.asked += zip(labels, ious, matched_idxs, strict=True)
        return IoUBalancedSampler(64)(labels, ious, matched_idxs)


def ground_truth(*boxes: list[float], label: int = 1) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.full((len(boxes),), label)}


def random_boxes(count: int) -> Tensor:
    corners = 80 * torch.rand(count, 2)
    return torch.cat([corners, corners + 5 + 60 * torch.rand(count, 2)], dim=1)


def best_iou(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    return torchvision.ops.box_iou(boxes, torch.cat([gt_boxes, torch.zeros(1, 4)])).amax(dim=1)


def roi_heads(cls: type[RoIHeads] = LibraRoIHeads, outputs: tuple[Tensor, Tensor] | None = None) -> RoIHeads:
    """The second stage with torchvision's settings, and fixed class logits and box deltas for outputs."""
    return cls(
        box_roi_pool=Constant(None),
        box_head=Constant(None),
        box_predictor=Constant(outputs),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=512,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )


def rpn(cls: type[RegionProposalNetwork] = LibraRPN) -> RegionProposalNetwork:
    top_n = {"training": 100, "testing": 100}
    return cls(nn.Identity(), nn.Identity(), 0.7, 0.3, 256, 0.5, top_n, top_n, 0.7)


def assert_same_step(model: nn.Module, stock: nn.Module, targets, train_step) -> None:
    torch.testing.assert_close(train_step(model, targets), train_step(stock, targets), rtol=0, atol=0)


def test_stages_with_the_settings_of_torchvision_equal_it_bit_by_bit(kind, build, targets, train_step):
    loss = nn.L1Loss(reduction="sum") if kind == "retinanet" else nn.SmoothL1Loss(reduction="sum", beta=1 / 9)
    model = apply_libra(build(kind), sampler=False, pyramid=False, box_loss=loss)
    assert any(isinstance(module, LibraRoIHeads | LibraRetinaNetRegressionHead) for module in model.modules())
    assert_same_step(model, build(kind), targets, train_step)


def test_rpn_with_the_settings_of_torchvision_equals_it_bit_by_bit(build, targets, train_step):
    model = apply_libra(build("fasterrcnn"), sampler=False, pyramid=False, box_loss=False, rpn=True)
    assert isinstance(model.rpn, LibraRPN)
    assert_same_step(model, build("fasterrcnn"), targets, train_step)


def test_roi_heads_match_as_torchvision_and_hand_the_ious_to_the_sampler():
    proposals = [random_boxes(300), random_boxes(200), random_boxes(100)]
    targets = [ground_truth(*random_boxes(count).tolist(), label=3) for count in (5, 1, 0)]
    boxes = [torch.cat([p, t["boxes"]]) for p, t in zip(proposals, targets, strict=True)]
    stock, libra = roi_heads(RoIHeads), roi_heads()
    libra.fg_bg_sampler = Spy()
    libra.select_training_samples(proposals, targets)

    gt_boxes, gt_labels = ([target[key] for target in targets] for key in ("boxes", "labels"))
    expected = stock.assign_targets_to_proposals(boxes, gt_boxes, gt_labels)
    for i, (labels, ious, matched_idxs) in zip(range(3), libra.fg_bg_sampler.sampler.asked, strict=True):
        assert torch.equal(matched_idxs, expected[0][i])
        assert torch.equal(labels, expected[1][i])
        assert torch.equal(ious, best_iou(boxes[i], gt_boxes[i]))
        assert (ious[len(proposals[i]) :] == 1).all()  # the ground truths, which are among the candidates


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_all_is_background_where_there_is_no_ground_truth_whatever_the_thresholds(threshold):
    proposals, targets = [random_boxes(20), random_boxes(30)], [ground_truth(OBJECT, label=3), ground_truth()]
    given = proposals, *([target[key] for target in targets] for key in ("boxes", "labels"))
    found = []
    for cls in (RoIHeads, LibraRoIHeads):
        stage = roi_heads(cls)
        stage.proposal_matcher.high_threshold = stage.proposal_matcher.low_threshold = threshold
        found.append(stage.assign_targets_to_proposals(*given))
    for theirs, ours in zip(*found, strict=True):
        assert all(map(torch.equal, theirs, ours))
    assert not found[1][1][1].any()


def test_losses_of_masks_that_another_library_puts_in_place_are_called(build, targets, train_step, monkeypatch):
    monkeypatch.setattr(torchvisions, "maskrcnn_loss", lambda logits, *_: 0 * logits.sum() + 7)
    losses, _ = train_step(apply_libra(build("maskrcnn")), targets)
    assert losses["loss_mask"].item() == 7


def test_another_image_costs_few_operations_in_the_second_stage():
    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.total += not function.is_view  # a view launches nothing
            return function(*args, **(kwargs or {}))

    def operations(heads: RoIHeads, num_images: int) -> int:
        targets = [ground_truth(*random_boxes(5).tolist()) for _ in range(num_images)]
        with Count() as count:
            heads.select_training_samples([random_boxes(100) for _ in targets], targets)
        return count.total

    stock, libra = roi_heads(RoIHeads), roi_heads()
    stock.fg_bg_sampler, libra.fg_bg_sampler = BalancedPositiveNegativeSampler(512, 0.25), IoUBalancedSampler()
    of_stock, of_libra = (operations(heads, 9) - operations(heads, 2) for heads in (stock, libra))
    assert of_libra < of_stock / 4


def test_rpn_matches_as_torchvision_and_hands_the_ious_to_the_sampler():
    anchors = [random_boxes(400) for _ in range(3)]
    targets = [ground_truth(*random_boxes(count).tolist()) for count in (8, 1, 0)]
    stock, libra = rpn(RegionProposalNetwork), rpn()
    libra.fg_bg_sampler, libra.box_loss = Spy(), nn.L1Loss()
    matches, matched_boxes = libra.assign_targets_to_anchors(anchors, targets)
    libra.compute_loss(torch.zeros(1200, 1), torch.zeros(1200, 4), matches, [torch.zeros(400, 4)] * 3)

    expected_labels, expected_boxes = stock.assign_targets_to_anchors(anchors, targets)
    assert all(map(torch.equal, matched_boxes, expected_boxes))
    low_quality = 0
    for i, (labels, ious, _) in zip(range(3), libra.fg_bg_sampler.sampler.asked, strict=True):
        assert torch.equal(labels, expected_labels[i].long())
        assert torch.equal(matches[i], expected_labels[i])
        assert torch.equal(ious, best_iou(anchors[i], targets[i]["boxes"]))
        low_quality += ((labels > 0) & (ious < 0.7)).sum()
    assert low_quality > 0  # the best anchor of an object is positive whatever its IoU


@pytest.mark.parametrize("at_a_time", [1, 2, 8])
def test_images_are_matched_alike_alone_and_together(at_a_time, device, monkeypatch):
    """Also an object whose label says to ignore what is on it."""
    counts = (5, 1, 0, 3)
    boxes, gt_boxes = ([random_boxes(size).to(device) for size in sizes] for sizes in ((40,) * 4, counts))
    gt_labels = [torch.tensor([-1, 1, 2, 3, 4], device=device)[:count] for count in counts]
    monkeypatch.setattr(matching, "_MAX_IOUS", at_a_time * 5 * 40)
    for stage, stock in ((roi_heads(), roi_heads(RoIHeads)), (rpn(), rpn(RegionProposalNetwork))):
        matches = match(torchvision.ops.box_iou, stage.proposal_matcher, boxes, gt_boxes, gt_labels)
        for image in range(len(counts)):
            if counts[image] == 0:
                columns = (matches, matches.ious, matches.matched_idxs, matches.matched_boxes)
                assert not any(column[image].any() for column in columns)
                continue
            expected = stock.proposal_matcher(torchvision.ops.box_iou(gt_boxes[image], boxes[image]))
            labels = torch.where(
                expected >= 0, gt_labels[image][expected.clamp(min=0)], torch.where(expected == -1, 0, -1)
            )
            assert torch.equal(matches[image], labels)
            assert torch.equal(matches.matched_idxs[image], expected.clamp(min=0))
            assert torch.equal(matches.matched_boxes[image], gt_boxes[image][expected.clamp(min=0)])


@pytest.mark.parametrize("precise", [True, False])
def test_iou_is_computed_once_in_each_stage(build, targets, train_step, monkeypatch, precise):
    """By torchvision's function for types that autocast narrows boxes to."""
    model = apply_libra(build("fasterrcnn"), rpn=True)
    calls = []

    def count(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))

    count(matching, "_box_iou")
    count(torchvision.ops.boxes, "_box_inter_union")  # box_iou calls it, under whatever name box_iou was imported
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        train_step(model, targets)
    of_a_stage = ["_box_iou"] if precise else ["_box_iou", "_box_inter_union"]
    assert calls == 2 * of_a_stage  # for all images together, which are small


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float64,) * 2, (torch.float32, torch.float64)])
def test_ious_are_torchvisions_to_the_last_bit(dtypes, device):
    """Also of boxes that are empty, inside out, huge, equal, infinite or NaN."""
    odd = [[3, 3, 3, 9], [9, 9, 2, 2], [-1e30, -1e30, 1e30, 1e30], [1, 2, math.inf, 4], [0, math.nan, 5, 5]]
    boxes = [torch.cat([random_boxes(60), torch.tensor(odd)]).to(device, dtype) for dtype in dtypes]
    boxes[1][0] = boxes[0][0]
    pairs = [(gt[None, :n], of[None]) for gt, of in itertools.permutations(boxes) for n in (0, 1, 65)]
    pairs.append((torch.stack([boxes[0], boxes[0].flip(0)]), torch.stack([boxes[1].flip(0), boxes[1]])))
    for pair in pairs:
        expected = torchvision.ops.box_iou(*pair)
        torch.testing.assert_close(matching._box_iou(*pair), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_boxes_of_low_precision_are_matched_as_torchvision_does(dtype):
    """Their areas would overflow or be rounded."""
    boxes, gt_boxes = [random_boxes(300).to(dtype) * 10 for _ in range(2)], [random_boxes(4).to(dtype) * 10] * 2
    boxes = [torch.cat([image, of]) for image, of in zip(boxes, gt_boxes, strict=True)]
    labels = [torch.arange(1, 5)] * 2
    found = match(torchvision.ops.box_iou, roi_heads().proposal_matcher, boxes, gt_boxes, labels)
    expected_idxs, expected_labels = roi_heads(RoIHeads).assign_targets_to_proposals(boxes, gt_boxes, labels)
    assert all(map(torch.equal, found, expected_labels))
    assert all(map(torch.equal, found.matched_idxs, expected_idxs))
    assert all((image > 0).sum() >= 4 for image in found)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_roi_box_loss_is_its_sum_over_all_boxes_sampled(reduction):
    deltas = torch.full((6, 3, 4), 100.0)  # of 6 boxes for 3 classes
    deltas[[0, 2], 2] = PREDICTION  # UPPER, and the ground truth itself, which comes last in its image
    heads = roi_heads(outputs=(torch.zeros(6, 3), deltas.flatten(1)))
    heads.fg_bg_sampler, heads.box_loss = IoUBalancedSampler(64), nn.L1Loss(reduction=reduction)
    proposals = [torch.tensor([UPPER, AWAY]), torch.tensor([UPPER, AWAY, FAR_AWAY])]
    _, losses = heads({}, proposals, [(50, 50)] * 2, [ground_truth(OBJECT, label=2), ground_truth()])
    assert losses["loss_box_reg"].item() == pytest.approx((UPPER_LOSS_ROI + OBJECT_LOSS) / 6, rel=1e-6)
    assert losses["loss_classifier"].item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rpn_box_loss_is_its_sum_over_all_anchors_sampled(reduction):
    network = rpn()
    network.fg_bg_sampler, network.box_loss = IoUBalancedSampler(64, max_iou=0.3), nn.L1Loss(reduction=reduction)
    anchors = [torch.tensor([UPPER, HALF, AWAY]), torch.tensor([UPPER, AWAY, FAR_AWAY])]
    matches, matched_boxes = network.assign_targets_to_anchors(anchors, [ground_truth(OBJECT), ground_truth()])
    deltas = torch.full((6, 4), 100.0)
    deltas[0] = PREDICTION
    regression_targets = network.box_coder.encode(matched_boxes, anchors)
    objectness, box_loss = network.compute_loss(torch.zeros(6, 1), deltas, matches, regression_targets)
    assert box_loss.item() == pytest.approx(UPPER_LOSS / 5, rel=1e-6)  # HALF is ignored
    assert objectness.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_retinanet_box_loss_is_averaged_over_positives_then_images(reduction):
    head = LibraRetinaNetRegressionHead(8, 1)
    head.box_loss = nn.L1Loss(reduction=reduction)
    anchors = [torch.tensor([UPPER, AWAY, OBJECT]), torch.tensor([UPPER, AWAY, FAR_AWAY])]
    matched_idxs = [torch.tensor([0, -1, 0]), torch.tensor([-1, -2, -1])]
    deltas = torch.full((2, 3, 4), 100.0)
    deltas[0, [0, 2]] = PREDICTION
    loss = head.compute_loss([ground_truth(OBJECT), ground_truth()], {"bbox_regression": deltas}, anchors, matched_idxs)
    assert loss.item() == pytest.approx((UPPER_LOSS + OBJECT_LOSS) / 2 / 2, rel=1e-6)
