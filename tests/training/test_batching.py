"""The order of an epoch, its shares, and what is loaded of them."""

import numpy as np
import pytest

from balanced_learning.training.data.batching import AspectRatioBatchSampler

RATIOS = [0.4, 0.75, 1.0, 1.33, 1.78, 2.5] * 9


def sampler(ratios, images_per_step, **options):
    return AspectRatioBatchSampler(np.array(ratios), images_per_step, **{"group_factor": 3, "seed": 0, **options})


def batches_of(*args, **options):
    return [share.indices for share in sampler(*args, **options)]


def processes(ratios, images_per_step, world_size, **options):
    """The steps of an epoch, each with the share of every process."""
    shares = [
        list(sampler(ratios, images_per_step, rank=r, world_size=world_size, **options)) for r in range(world_size)
    ]
    return list(zip(*shares, strict=True))


@pytest.mark.parametrize("images_per_step", [1, 4, 5, 100])
def test_every_image_comes_once_an_epoch(images_per_step):
    batches = batches_of(RATIOS, images_per_step)
    assert sorted(index for batch in batches for index in batch) == list(range(len(RATIOS)))
    assert len(batches) == len(sampler(RATIOS, images_per_step))
    assert sum(len(batch) < images_per_step for batch in batches) <= 1


def test_batches_hold_images_of_one_group_as_far_as_they_fill():
    assert all(len({RATIOS[i] for i in batch}) == 1 for batch in batches_of(RATIOS, 3))
    assert any(len({RATIOS[i] for i in batch}) > 1 for batch in batches_of(RATIOS, 3, group_factor=-1))


def test_mixed_batches_run_from_narrow_to_wide():
    rest = [[RATIOS[i] for i in batch] for batch in batches_of(RATIOS, 8) if len({RATIOS[i] for i in batch}) > 1]
    assert rest
    assert all(batch == sorted(batch) for batch in rest)


def test_order_follows_from_seed_and_epoch():
    one, other = sampler(RATIOS, 4), sampler(RATIOS, 4)
    assert list(one) == list(other)
    other.epoch = 1
    assert list(one) != list(other)
    one.epoch = 1
    assert list(one) == list(other)
    assert list(sampler(RATIOS, 4)) != list(sampler(RATIOS, 4, seed=1))
