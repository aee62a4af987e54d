import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning import IoUBalancedSampler
from balanced_learning.detection.imbalance.sample_level import (
    MatchedProposals,
    bin_edges,
    chosen_ious,
    interval_edges,
    interval_shares,
)
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
