import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning import IoUBalancedSampler
from balanced_learning.detection import apply_libra
from balanced_learning.detection.imbalance.sample_level import (
    MatchedProposals,
    SampleMeter,
    bin_edges,
    chosen_ious,
    interval_edges,
    interval_shares,
    match_proposals,
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


BALANCED, RANDOM = IoUBalancedSampler(64, 0.25), BalancedPositiveNegativeSampler(64, 0.25)
GROUPS = {"all", "hard", "random", "IoU-balanced"}


def strips(*ious: float) -> Tensor:
    """Proposals that have these IoUs with :data:`TRUTH`: as wide, and so much of its height."""
    return torch.tensor([[0, 0, 40, 40 * iou] for iou in ious])


TRUTH = strips(1.0)


@pytest.fixture
def fast_rcnn(build):
    """A detector whose proposals are given."""
    return second_stage(build("fasterrcnn"))


def measure(model, *images: tuple[Tensor, Tensor], balanced=BALANCED, random=RANDOM, draws=2):
    """What a meter says of images with these ground truths and proposals, one by one."""
    meter = SampleMeter(model, balanced, random, draws)
    for truth, given in images:
        target = {"boxes": truth, "labels": torch.ones(len(truth), dtype=torch.int64), "proposals": given}
        meter.add([torch.rand(3, 96, 96)], [target])
    return meter.result()


def test_where_all_negatives_have_iou_0_sampling_changes_nothing(fast_rcnn):
    far = torch.tensor([60.0, 60, 90, 90]).expand(300, 4)
    result = measure(fast_rcnn, (TRUTH, far), (TRUTH[:0], far))
    assert (result.images, result.few_candidates, result.changed) == (2, 0, 0)
    assert result.empty_bins == [0, 1, 1]
    assert result.above == dict.fromkeys(GROUPS, 0)
    assert result.shares.keys() == GROUPS
    for shares in result.shares.values():
        assert shares.tolist() == [1] + [0] * (len(result.edges) - 2)
    assert torch.equal(result.edges, interval_edges(BALANCED, at_least=10))


def test_where_all_negatives_are_taken_sampling_changes_nothing(fast_rcnn):
    mixed = strips(*[0.02] * 40, *[0.3] * 15, *[0.45] * 8)
    result = measure(fast_rcnn, (TRUTH, mixed))  # 63 and a positive
    assert (result.few_candidates, result.changed) == (1, 0)
    assert result.empty_bins == [0, 0, 0]
    assert result.above == {  # of 16 hard ones nothing is known
        "all": pytest.approx(23 / 63), "random": pytest.approx(23 / 63), "IoU-balanced": pytest.approx(23 / 63),
        "hard": result.above["hard"],
    }  # fmt: skip
    one_more = measure(fast_rcnn, (TRUTH, torch.cat([mixed, strips(0.02)])))
    assert one_more.few_candidates == 0
    assert one_more.changed > 0


def test_of_no_negatives_and_of_no_images_little_is_known(fast_rcnn):
    result = measure(fast_rcnn, (TRUTH, strips(0.8)))
    assert (result.images, result.few_candidates, result.changed, result.empty_bins) == (1, 1, 0, [1, 1, 1])
    assert all(map(math.isnan, result.above.values()))
    assert all(shares.sum() == 0 for shares in result.shares.values())
    result = measure(fast_rcnn)
    assert result.images == 0
    assert all(map(math.isnan, [result.few_candidates, result.changed, *result.empty_bins, *result.above.values()]))
    nothing = measure(fast_rcnn, (TRUTH[:0], TRUTH[:0]))
    assert (nothing.images, nothing.changed, nothing.few_candidates) == (1, 0, 1)


def test_what_changes_is_worked_out_by_hand(fast_rcnn):
    ious = [0.05] * 900 + [0.21] * 90 + [0.46] * 10
    both = {"balanced": IoUBalancedSampler(90, 0.0), "random": BalancedPositiveNegativeSampler(90, 0.0)}
    result = measure(fast_rcnn, (TRUTH, strips(*ious)), **both, draws=20)
    # random: 81, 8.1, 0.9. Balanced: 30, 30 and 10, and of the 20 missing 20 * 870 / 930 in the first bin.
    first = 30 + 20 * 870 / 930
    assert result.changed == pytest.approx((81 - first) / 90)
    rest = measure(fast_rcnn, (TRUTH, strips(*ious)), (TRUTH, strips(*[0.05] * 900)), **both)
    assert rest.changed == pytest.approx((81 - first) / 90 / 2)
    assert rest.empty_bins == [0, 0.5, 0.5]
    bins = [shares.unflatten(0, (3, -1)).sum(dim=1) for shares in result.shares.values()]  # 12 intervals
    wanted = [[0.9, 0.09, 0.01], None, [0.9, 0.09, 0.01], [first / 90, 1 - (first + 10) / 90, 10 / 90]]
    for found, shares in zip(bins, wanted, strict=True):
        assert shares is None or found.tolist() == pytest.approx(shares, abs=0.02)


def test_what_is_capped_is_compared_by_shares(fast_rcnn):
    """An image with one positive takes 5 negatives where they are capped, and 63 otherwise."""
    capped = IoUBalancedSampler(64, 0.25, max_negatives_per_positive=5)
    result = measure(fast_rcnn, (TRUTH, strips(*[0.1] * 50, *[0.3] * 150)), balanced=capped)
    assert result.few_candidates == 0
    assert result.changed == pytest.approx((1 + 3 * 49 / 198) / 5 - 1 / 4)  # one of each bin, and 3 of the others


@pytest.mark.parametrize(
    ("name", "parts"), [("fasterrcnn", None), ("fasterrcnn", {}), ("fasterrcnn", {"sampler": False}), ("maskrcnn", {})]
)
def test_candidates_are_matched_as_torchvision_does_it_in_training(build, images, targets, name, parts):
    numbers = {"rpn_post_nms_top_n_train": 40, "rpn_post_nms_top_n_test": 10}
    model = build(name, **numbers)
    if parts is not None:
        apply_libra(model, **parts)
    found = match_proposals(model, images, targets)
    stock = build(name, **numbers).roi_heads
    for image, each, target in zip(images, found, targets, strict=True):
        truths, labels = each.gt_boxes, target["labels"]
        assert len(each.boxes) == 40 + len(truths)
        assert each.image.shape == image.shape
        (matched_idxs,), (wanted,) = stock.assign_targets_to_proposals([each.boxes], [truths], [labels])
        assert torch.equal(each.labels, wanted)
        assert torch.equal(each.matched_idxs, matched_idxs)
        best = [max([iou(box, truth) for truth in truths.tolist()], default=0.0) for box in each.boxes.tolist()]
        torch.testing.assert_close(each.ious, torch.tensor(best), rtol=1e-4, atol=1e-5)


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_a_detector_that_samples_nothing_is_refused(build):
    with pytest.raises(TypeError, match=r"model must be a FasterRCNN of torchvision\.models\.detection, got RetinaNet"):
        SampleMeter(build("retinanet"), BALANCED, RANDOM)
