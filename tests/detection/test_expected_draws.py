import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning import IoUBalancedSampler
from balanced_learning.detection.imbalance.expected_draws import (
    changed_share,
    count_in_bins,
    expected_of_balanced,
    expected_of_random,
    negatives_wanted,
)

DRAWS = 500
IOUS = torch.tensor([0.01] * 150 + [0.12] * 30 + [0.24] * 15 + [0.31] * 9 + [0.44] * 6 + [0.9] * 12 + [0.6] * 3)
LABELS = torch.tensor([0] * 210 + [1] * 12 + [-1] * 3)


@pytest.mark.parametrize(
    "sampler",
    [
        IoUBalancedSampler(80, 0.0),
        IoUBalancedSampler(80, 0.25),  # 12 positives of 20 wanted
        IoUBalancedSampler(41, 0.1, num_bins=5),  # 4 positives, and 37 do not divide by 5
        IoUBalancedSampler(80, 0.25, floor_iou=0.1, floor_fraction=0.31),
        IoUBalancedSampler(80, 0.25, floor_iou=0.1),  # from below the floor only what is short
        IoUBalancedSampler(80, 0.25, max_iou=None, num_bins=4),
        IoUBalancedSampler(80, 0.1, max_negatives_per_positive=3.4),
        IoUBalancedSampler(300, 0.25),  # all
        IoUBalancedSampler(8, 1.0),  # none
    ],
)
def test_expectations_are_means_of_draws(sampler):
    stock = BalancedPositiveNegativeSampler(sampler.batch_size_per_image, sampler.positive_fraction)
    candidates = count_in_bins(sampler, IOUS, LABELS == 0)
    assert candidates.sum() == 210
    drawn = {
        sampler: sampler([LABELS] * DRAWS, [IOUS] * DRAWS, [torch.zeros_like(LABELS)] * DRAWS)[1],
        stock: stock([LABELS] * DRAWS)[1],
    }
    expected = {
        sampler: expected_of_balanced(sampler, candidates, negatives_wanted(sampler, 12)),
        stock: expected_of_random(candidates, negatives_wanted(stock, 12)),
    }
    for each, masks in drawn.items():
        counts = torch.stack([count_in_bins(sampler, IOUS, mask.bool()) for mask in masks]).double()
        error = counts.std(dim=0) / DRAWS**0.5
        assert ((counts.mean(dim=0) - expected[each]).abs() <= 4 * error + 1e-9).all()


def test_an_image_without_candidates_has_none_in_any_bin():
    sampler = IoUBalancedSampler(max_iou=None)
    candidates = count_in_bins(sampler, torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert candidates.tolist() == [0, 0, 0, 0]
    both = expected_of_random(candidates, 50), expected_of_balanced(sampler, candidates, 50)
    assert [counts.tolist() for counts in both] == [[0, 0, 0, 0]] * 2
    assert changed_share(*both) == 0
