import numpy as np
import torch

from balanced_learning.training import randomness
from balanced_learning.training.data.augmentation import augmentation
from balanced_learning.training.data.batching import AspectRatioBatchSampler
from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.dataset import DetectionDataset

RATIOS = np.ones(40)


def test_every_argument_counts():
    keys = [
        (seed, purpose, *position)
        for seed in (0, 1, 2**40)
        for purpose in ("order", "step")
        for position in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (11,), (1, 1))
    ]
    seeds = {randomness.derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_streams_are_the_same_on_every_machine():
    """Of blake2b over the printed arguments, so that runs that others published can be repeated."""
    assert randomness.derive_seed(0, "order", 0) == 4819849257279361181


def test_two_seeds_share_no_order_and_no_draw_in_any_epoch():
    orders, draws = set(), set()
    for seed in (0, 1):
        sampler = AspectRatioBatchSampler(RATIOS, 4, group_factor=3, seed=seed)
        for epoch in range(30):
            sampler.epoch = epoch
            orders.add(tuple(tuple(share.indices) for share in sampler))
            for rank in range(2):
                for step in range(len(sampler)):
                    randomness.seed_all(seed, "step", epoch, step, rank)
                    draws.add(tuple(torch.randperm(1000)[:8].tolist()))
    assert len(orders) == 2 * 30
    assert len(draws) == 2 * 30 * 2 * 10


def test_the_augmentation_of_an_image_follows_from_seed_epoch_and_id(coco_root):
    split = read_split(coco_root, "train2017")
    policy = augmentation("ssd")

    def image(seed, epoch, index=0):
        dataset = DetectionDataset(split, {90: 1, 3: 2}, transforms=policy, seed=seed)
        dataset.epoch = epoch
        return dataset[index][0]

    first = image(0, 1)
    torch.manual_seed(99)
    assert torch.equal(image(0, 1), first)
    for other in (image(1, 0), image(0, 0), image(1, 1), image(0, 1, index=1)):
        assert not torch.equal(other, first)


def test_what_is_seeded_leaves_other_draws_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with randomness.seeded(0, "augmentation", 1):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(inside, torch.rand(4, generator=randomness.generator(0, "augmentation", 1)))
