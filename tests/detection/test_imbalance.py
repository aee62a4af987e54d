import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning import BalancedL1Loss, IoUBalancedSampler
from balanced_learning.detection import apply_libra
from balanced_learning.detection.imbalance import (
    MatchedProposals,
    bin_edges,
    box_errors,
    chosen_ious,
    gradient_shares,
    gradients,
    interval_edges,
    interval_shares,
)
from balanced_learning.detection.proposals import second_stage
from balanced_learning.samplers import iou_bins


def proposals(ious: Tensor) -> MatchedProposals:
    """Negatives alone; the last are the hardest."""
    size = len(ious)
    nothing = torch.zeros(size, dtype=torch.int64)
    hardness = torch.arange(size).float()
    return MatchedProposals(
        torch.rand(3, 32, 32), torch.rand(1, 4), torch.rand(size, 4), nothing, ious, nothing, hardness
    )


def test_shares_are_those_of_whom_each_chooses():
    ious = torch.cat([torch.full((900,), 0.01), torch.full((60,), 0.21), torch.full((40,), 0.46)])
    balanced, random = IoUBalancedSampler(90, 0.0), BalancedPositiveNegativeSampler(90, 0.0)
    edges = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    chosen = chosen_ious(proposals(ious), balanced, random, draws=50)
    assert {name: len(each) for name, each in chosen.items()} == {
        "all": 1000, "hard": 250, "random": 50 * 90, "IoU-balanced": 50 * 90
    }  # fmt: skip
    shares = {name: interval_shares(each, edges) for name, each in chosen.items()}
    assert shares["all"].tolist() == pytest.approx([0.9, 0, 0.06, 0.04])
    assert shares["hard"].tolist() == pytest.approx([0.6, 0, 0.24, 0.16])
    assert shares["random"].tolist() == pytest.approx([0.9, 0, 0.06, 0.04], abs=0.02)
    assert shares["IoU-balanced"].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


def test_positives_and_ignored_boxes_are_no_negatives():
    each = proposals(torch.tensor([0.1, 0.2, 0.3, 0.9]))
    each = each._replace(labels=torch.tensor([0, -1, 0, 2]))
    both = IoUBalancedSampler(90, 0.25), BalancedPositiveNegativeSampler(90, 0.25)
    chosen = chosen_ious(each, *both, draws=2)
    wanted = {"all": [0.1, 0.3], "hard": [0.3], "random": [0.1, 0.3] * 2, "IoU-balanced": [0.1, 0.3] * 2}
    assert {name: ious.tolist() for name, ious in chosen.items()} == {k: pytest.approx(v) for k, v in wanted.items()}


def test_of_no_negatives_nothing_is_chosen():
    both = IoUBalancedSampler(90, 0.25), BalancedPositiveNegativeSampler(90, 0.25)
    for ious in chosen_ious(proposals(torch.zeros(0)), *both, draws=2).values():
        assert interval_shares(ious, torch.tensor([0.0, 0.2, 0.4])).tolist() == [0, 0]


def test_intervals_are_closed_below_and_the_outermost_open():
    ious = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
    assert interval_shares(ious, torch.tensor([0.1, 0.25, 0.5, 0.75])).tolist() == pytest.approx([2 / 6, 1 / 6, 3 / 6])


@pytest.mark.parametrize(
    "sampler",
    [
        IoUBalancedSampler(),
        IoUBalancedSampler(num_bins=1),
        IoUBalancedSampler(num_bins=7, max_iou=0.6, floor_iou=0.1),
        IoUBalancedSampler(num_bins=20, max_iou=None),
    ],
)
def test_intervals_are_parts_of_the_bins_that_the_sampler_draws_from(sampler):
    edges = interval_edges(sampler, at_least=10)
    assert edges.diff().min() > 0
    num_intervals = int((edges[:-1] >= sampler.floor_iou).sum())
    assert num_intervals >= 10
    assert num_intervals % sampler.num_bins == 0
    assert (edges[0], edges[-1]) == (0, bin_edges(sampler)[-1])
    ceiling = sampler.max_iou or 1.0
    just_inside = torch.cat([edges[:-1] + 1e-5, edges[1:] - 1e-5])
    bins = iou_bins(just_inside, sampler.floor_iou, ceiling, sampler.num_bins)
    first, last = bins.chunk(2)
    assert torch.equal(first, last)  # no interval is in two bins
    counts = first[first >= 0].bincount()
    assert counts.tolist() == [num_intervals // sampler.num_bins] * sampler.num_bins
    steps = torch.tensor(bin_edges(sampler)[1:-1])
    assert torch.equal(
        iou_bins(steps - 1e-5, sampler.floor_iou, ceiling, sampler.num_bins) + 1, torch.arange(len(steps)) + 1
    )
    assert torch.equal(
        iou_bins(steps + 1e-5, sampler.floor_iou, ceiling, sampler.num_bins), torch.arange(len(steps)) + 1
    )


def encoded(box: list[float], truth: list[float], weights: tuple[float, ...]) -> list[float]:
    """What is to be predicted for a box, coordinate by coordinate."""
    (x1, y1, x2, y2), (left, top, right, bottom) = box, truth
    width, height = x2 - x1, y2 - y1
    shifts = (left + right - x1 - x2) / 2 / width, (top + bottom - y1 - y2) / 2 / height
    scales = math.log((right - left) / width), math.log((bottom - top) / height)
    return [weight * value for weight, value in zip(weights, (*shifts, *scales), strict=True)]


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("parts", [None, {}, {"sampler": False}, {"box_loss": False}, "given proposals"])
def test_box_errors_are_those_of_a_loop_over_the_sampled_boxes(build, images, targets, parts):
    model = build("fasterrcnn").eval()
    if parts == "given proposals":
        second_stage(apply_libra(model)).eval()
        targets = [{**target, "proposals": target["boxes"] + torch.tensor([2.0, 3, 4, 5])} for target in targets]
    elif parts is not None:
        apply_libra(model, **parts)
    seen = {}
    model.roi_heads.box_roi_pool.register_forward_hook(lambda _, args, output: seen.update(boxes=args[1]))
    model.roi_heads.box_predictor.register_forward_hook(lambda _, args, output: seen.update(deltas=output[1].tolist()))
    errors = box_errors(model, images, targets)
    rows, wanted = iter(seen["deltas"]), []
    for boxes, target in zip(seen["boxes"], targets, strict=True):
        truths = list(zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True))
        for box, deltas in zip(boxes.tolist(), rows, strict=False):
            best, label = max(truths, key=lambda truth: iou(truth[0], box), default=(box, 0))
            if label and iou(best, box) >= 0.5:
                own = deltas[4 * label : 4 * label + 4]
                wanted.append([p - t for p, t in zip(own, encoded(box, best, (10, 10, 5, 5)), strict=True)])
    assert len(wanted) >= (10 if parts == "given proposals" else 5)  # the ground truths themselves
    torch.testing.assert_close(errors, torch.tensor(wanted), rtol=1e-3, atol=1e-4)
    assert not model.training
    assert not model.rpn.training


@pytest.mark.parametrize("parts", [None, {}])
def test_box_errors_of_a_training_step_give_its_loss(build, images, targets, basic_kind, parts):
    model = build(basic_kind)
    if parts is not None:
        apply_libra(model, **parts)
    stock: nn.Module = nn.L1Loss() if basic_kind == "retinanet" else nn.SmoothL1Loss(beta=1 / 9)
    loss = stock if parts is None else BalancedL1Loss(beta=0.11 if basic_kind == "retinanet" else 1.0)
    loss.reduction = "sum"
    if basic_kind == "retinanet":
        nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.1)  # at first it predicts next to nothing
    model.backbone.register_forward_hook(lambda *_: torch.manual_seed(1) and None)  # behind it, chance samples
    losses = model.train()(images[:1], targets[:1])
    errors = box_errors(model.eval(), images[:1], targets[:1])
    divided_by = len(errors) if basic_kind == "retinanet" else 64  # boxes that are sampled
    name = "bbox_regression" if basic_kind == "retinanet" else "loss_box_reg"
    assert loss(errors, torch.zeros_like(errors)).item() / divided_by == pytest.approx(losses[name].item(), rel=1e-4)


def test_inliers_alone_have_the_whole_gradient():
    shares = gradient_shares(torch.tensor([[0.1, -0.2, 0.3, 0.99]]), nn.SmoothL1Loss())
    assert shares[:3] == (1, 1, 1)
    assert math.isnan(shares.to_outlier)


def test_outliers_alone_leave_none():
    shares = gradient_shares(torch.tensor([[1.0, -2.0, 3.0, 1e6]]), nn.SmoothL1Loss())  # at beta begin the outliers
    assert shares[:3] == (0, 0, 0)
    assert math.isnan(shares.to_outlier)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_count_by_their_magnitude_in_each_box_and_in_all(reduction):
    errors = torch.tensor([[0.2, -0.2, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0], [-0.1, 0.0, 0.0, 0.0], [-9.0, 2.0, -2.0, 0.5]])
    shares = gradient_shares(errors, nn.SmoothL1Loss(reduction=reduction))
    assert shares.inliers == pytest.approx(12 / 16)
    assert shares.of_total == pytest.approx((0.4 + 0.1 + 0.5) / (0.4 + 0.1 + 0.5 + 4))
    assert shares.of_sample == pytest.approx((0.4 / 1.4 + 1 + 0.5 / 3.5) / 3)  # one without gradient has no share
    assert shares.to_outlier == pytest.approx((1 / 12) / 1)


def test_balanced_l1_has_the_paper_s_gradient_at_any_beta():
    b = math.exp(3) - 1
    errors = torch.tensor([[0.05, -0.1, 0.3, -0.5]])
    slopes = [0.5 * math.log(b * x / 0.2 + 1) for x in (0.05, 0.1)]
    loss = BalancedL1Loss(beta=0.2)
    assert gradients(errors, loss)[0].tolist() == pytest.approx([slopes[0], -slopes[1], 1.5, -1.5], rel=1e-5)
    shares = gradient_shares(errors, loss, beta=0.2)
    assert shares.of_total == pytest.approx(sum(slopes) / (sum(slopes) + 3))
    assert shares.to_outlier == pytest.approx(sum(slopes) / 2 / 1.5)


def test_of_no_positives_there_are_no_shares():
    assert all(map(math.isnan, gradient_shares(torch.zeros(0, 4), BalancedL1Loss())))
