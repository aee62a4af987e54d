"""How many negatives of each bin of IoU samplers take on average, exactly.

Negatives of one bin are alike to both samplers: each is drawn with the same probability. So the bins say all.
"""

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from ...samplers import IoUBalancedSampler, iou_bins


def count_in_bins(sampler: IoUBalancedSampler, ious: Tensor, negative: Tensor) -> Tensor:
    """The number of an image's negatives below the floor of a sampler, and in each of its bins. int64 [K + 1]

    Args:
        ious: of all candidates of the image. [M]
        negative: which of them are negatives. [M]

    Example:
        >>> count_in_bins(IoUBalancedSampler(), torch.tensor([0.0, 0.1, 0.4, 0.9]), torch.tensor([True] * 3 + [False]))
        tensor([0, 2, 0, 1])
    """
    ceiling = sampler.max_iou
    if ceiling is None:
        ceiling = ious.max().item() if len(ious) else 1.0
    bins = iou_bins(ious, sampler.floor_iou, ceiling, sampler.num_bins)
    return (bins[negative] + 1).bincount(minlength=sampler.num_bins + 1)


def negatives_wanted(sampler: IoUBalancedSampler | BalancedPositiveNegativeSampler, num_positives: int) -> int:
    """The number of negatives that a sampler takes of an image with so many positives, if it has that many.

    Example:
        >>> negatives_wanted(IoUBalancedSampler(512, 0.25, max_negatives_per_positive=5), num_positives=40)
        200
    """
    sampled = min(num_positives, int(sampler.batch_size_per_image * sampler.positive_fraction))
    wanted = sampler.batch_size_per_image - sampled
    limit = getattr(sampler, "max_negatives_per_positive", None)
    return wanted if limit is None else int(min(wanted, limit * max(1, sampled)))


def expected_of_random(candidates: Tensor, wanted: int) -> Tensor:
    """Of uniform sampling: :math:`n m_k / m` of the :math:`m_k` candidates of bin k, m in all. float64 [K + 1]

    Example:
        >>> expected_of_random(torch.tensor([0, 900, 90, 10]), wanted=100)
        tensor([ 0., 90.,  9.,  1.], dtype=torch.float64)
    """
    return candidates.double() * min(1, wanted / max(1, int(candidates.sum())))


def expected_of_balanced(sampler: IoUBalancedSampler, candidates: Tensor, wanted: int) -> Tensor:
    """Of IoU-balanced sampling: the quota of each bin, as far as it goes, and its part of what fills up. [K + 1]

    Example:
        >>> expected_of_balanced(IoUBalancedSampler(), torch.tensor([0, 70, 20, 10]), wanted=60)
        tensor([ 0., 30., 20., 10.], dtype=torch.float64)
    """
    floor_fraction = sampler.floor_fraction if sampler.floor_iou > 0 else 0.0
    below = round(wanted * floor_fraction)
    quota = torch.tensor([below] + [(wanted - below) // sampler.num_bins] * sampler.num_bins)
    taken = torch.minimum(candidates, quota)
    return taken + expected_of_random(candidates - taken, wanted - int(taken.sum()))


def changed_share(random: Tensor, balanced: Tensor) -> float:
    """The share of the sampled negatives that are of another bin: the total variation distance. 0 where there are none.

    Example:
        >>> changed_share(torch.tensor([90.0, 9.0, 1.0]), torch.tensor([40.0, 9.0, 51.0]))
        0.5
    """
    parts = [counts.double() / counts.sum().clamp(min=1) for counts in (random, balanced)]
    return 0.5 * (parts[0] - parts[1]).abs().sum().item()
