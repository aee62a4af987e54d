"""The order of an epoch, its shares, and what is loaded of them."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balanced_learning.training import distributed
from balanced_learning.training.data import batching, dataset
from balanced_learning.training.data.batching import AspectRatioBatchSampler, DetectionLoader, OneByOne, make_loaders
from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.dataset import DetectionDataset, Share
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.errors import UserError
from tests.training.coco_data import add_images
from tests.training.small import SMALL, config_of

RATIOS = [0.4, 0.75, 1.0, 1.33, 1.78, 2.5] * 9
CPU = torch.device("cpu")


def sampler(ratios, images_per_step, **options):
    return AspectRatioBatchSampler(np.array(ratios), images_per_step, **{"group_factor": 3, "seed": 0, **options})


def batches_of(*args, **options):
    return [share.indices for share in sampler(*args, **options)]


def steps_of(ratios, images_per_step, world_size, **options):
    """The steps of an epoch, each with the share of every process."""
    options["world_size"] = world_size
    processes = [list(sampler(ratios, images_per_step, rank=rank, **options)) for rank in range(world_size)]
    return list(zip(*processes, strict=True))


def counted(shares):
    """The images of a step without fillers, in the order of the processes."""
    return [index for share in shares if not share.is_filler for index in share.indices]


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


@pytest.mark.parametrize(("images", "per_process"), [(1, 1), (100, 2), (511, 1), (513, 1), (2000, 2), (3001, 2)])
def test_512_processes_share_every_image_once_and_none_is_behind(images, per_process):
    ratios = np.resize(RATIOS, images)
    steps = steps_of(ratios, 512 * per_process, 512)
    assert sorted(index for shares in steps for index in counted(shares)) == list(range(images))
    assert len(steps) == -(-images // (512 * per_process))
    done = np.cumsum([[0 if share.is_filler else len(share.indices) for share in shares] for shares in steps], axis=0)
    assert (done.max(axis=1) - done.min(axis=1) <= 1).all()
    assert all(len(share.indices) >= 1 for shares in steps for share in shares)
    assert all(share.images == len(counted(shares)) for shares in steps for share in shares)


@given(
    images=st.integers(1, 60),
    images_per_step=st.integers(1, 20),
    world_size=st.integers(1, 20),
    group_factor=st.integers(-1, 3),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_processes_share_the_batches_of_one(images, images_per_step, world_size, group_factor, epoch):
    ratios = np.resize(RATIOS, images)
    options = {"group_factor": group_factor, "seed": epoch}
    steps = steps_of(ratios, images_per_step, world_size, **options)
    batches = batches_of(ratios, images_per_step, **options)
    assert [counted(shares) for shares in steps] == batches
    for step, (shares, batch) in enumerate(zip(steps, batches, strict=True)):
        split = [part.tolist() for part in np.array_split(batch, world_size)]
        assert [share.indices for share in shares] == [part or batch[:1] for part in split]
        assert [share.is_filler for share in shares] == [not part for part in split]
        assert {(share.step, share.images) for share in shares} == {(step, len(batch))}


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
def test_another_number_of_processes_takes_the_same_batches(world_size):
    ratios = np.resize(RATIOS, 115)
    assert [counted(shares) for shares in steps_of(ratios, 12, world_size)] == batches_of(ratios, 12)


def test_an_epoch_can_begin_at_any_step_and_end_before_its_last():
    whole = list(sampler(RATIOS, 4, rank=1, world_size=2))
    for start in range(len(whole) + 1):
        part = sampler(RATIOS, 4, rank=1, world_size=2)
        part.start = start
        assert list(part) == whole[start:]
        assert len(part) == len(whole)
    for limit in (1, 3, len(whole), len(whole) + 5):
        part = sampler(RATIOS, 4, rank=1, world_size=2, limit=limit)
        assert list(part) == whole[:limit]
        assert len(part) == min(limit, len(whole))
        part.start = 2
        assert list(part) == whole[2:limit]


@pytest.mark.parametrize(("count", "world_size"), [(7, 1), (7, 3), (2, 4)])
def test_an_evaluation_takes_every_image_once(count, world_size):
    processes = [OneByOne(count, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [share for process in processes for share in process]
    assert sorted(share.indices for share in shares) == [[i] for i in range(count)]
    assert sum(map(len, processes)) == count
    assert not any(share.is_filler for share in shares)


@pytest.fixture
def split(coco_root):
    """Ten images to train on."""
    add_images(coco_root, "train", 8)
    return read_split(coco_root, "train2017")


def spoil(split, *indices):
    """Cuts the files of these images off, or removes them."""
    for index in indices:
        file = split.image_dir / split.images[index]["file_name"]
        if index % 2:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:60])


def load(split, *, world_size=1, workers=0, images_per_step=4, unreadable="replace", epoch=0, start=0):
    """The batches of every process, by step."""
    processes = []
    for rank in range(world_size):
        images = DetectionDataset(split, {90: 1, 3: 2}, unreadable=unreadable)
        shares = sampler(np.ones(len(images)), images_per_step, rank=rank, world_size=world_size)
        loader = DetectionLoader(images, shares, workers, CPU)
        loader.set_epoch(epoch, start)
        processes.append(list(loader))
    return list(zip(*processes, strict=True))


def ids(batch):
    return [target["image_id"] for target in batch.targets]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_unreadable_images_are_replaced_alike_by_any_number_of_processes_and_loaders(split, world_size, workers):
    spoil(split, 2, 3, 9)
    stands_in = {2: 4, 3: 4, 9: 0}
    tried = {2: [2, 3], 3: [3], 9: [9]}
    steps = load(split, world_size=world_size, workers=workers, epoch=1)
    shares = sampler(np.ones(10), 4)
    shares.epoch = 1
    for batches, share in zip(steps, shares, strict=True):
        own = [batch for batch in batches if not batch.is_filler]
        expected = [split.images[stands_in.get(index, index)]["id"] for index in share.indices]
        assert [image_id for batch in own for image_id in ids(batch)] == expected
        files = [split.images[i]["file_name"] for index in share.indices for i in tried.get(index, [])]
        lines = [line for batch in batches for line in batch.unreadable]
        assert [re.search(r"(\d+\.png) is (unreadable|missing)", line)[1] for line in lines] == files
        assert all(batch.of == len(share.indices) for batch in batches)


def test_a_filler_is_loaded_and_weighs_and_tells_nothing(split):
    steps = load(split, world_size=4, epoch=0)
    short = next(batches for batches in steps if batches[0].of == 2)
    assert [batch.is_filler for batch in short] == [False, False, True, True]
    assert ids(short[2]) == ids(short[3]) == ids(short[0])
    spoil(split, next(i for i, image in enumerate(split.images) if image["id"] == ids(short[0])[0]))
    short = load(split, world_size=4, epoch=0)[short[0].step]
    assert [len(batch.unreadable) for batch in short] == [1, 0, 0, 0]
    assert ids(short[2]) == ids(short[3]) == ids(short[0])


def test_an_image_in_the_place_of_another_is_augmented_by_its_own_id(split):
    images = DetectionDataset(split, {90: 1, 3: 2}, transforms=batching.augmentation("ssd"), unreadable="replace")
    expected = images[3][0]
    spoil(split, 2)
    batch = images.__getitems__(Share([2, 3], 2, 0)).to(CPU)
    assert torch.equal(batch.images[0], expected)
    assert torch.equal(batch.images[1], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_with_strict_data_the_first_unreadable_image_ends_the_loading(split, workers):
    spoil(split, 3)
    with pytest.raises(UserError, match=r"3[0-9]\.png is missing"):
        load(split, workers=workers, unreadable="raise")


def test_an_evaluation_leaves_unreadable_images_out(split):
    spoil(split, 0, 3)
    images = DetectionDataset(split, {90: 1, 3: 2}, unreadable="leave out")
    batches = list(DetectionLoader(images, OneByOne(10), 0, CPU))
    assert [len(batch.images) for batch in batches] == [0, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    assert [len(batch.unreadable) for batch in batches] == [1, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert [batch.of for batch in batches] == [1] * 10


@pytest.mark.parametrize(("tries", "said"), [(100, 10), (4, 4)])
def test_where_no_image_can_be_read_loading_ends(split, monkeypatch, tries, said):
    spoil(split, *range(10))
    monkeypatch.setattr(dataset, "TRIES", tries)
    first = split.images[batches_of(np.ones(10), 4)[0][0]]["file_name"]
    with pytest.raises(UserError, match=rf"none of {said} images in a row can be read: .*/{first} is"):
        load(split)


@pytest.mark.parametrize("error", [RuntimeError("size\nand more"), ValueError("size"), ZeroDivisionError("size")])
def test_an_image_that_a_transform_fails_on_is_replaced(split, error):
    images = failing_on(31, error, split)
    batch = images.__getitems__(Share([2, 1], 2, 0))
    assert ids(batch) == [32, 12]
    assert batch.unreadable == [f"{split.image_dir / '31.png'} cannot be augmented (size)"]


def test_a_fault_of_the_program_is_not_the_images(split):
    with pytest.raises(TypeError):
        failing_on(31, TypeError("size"), split).__getitems__(Share([2], 1, 0))


def failing_on(image_id, error, split):
    def transform(image, target):
        if target["image_id"] == image_id:
            raise error
        return image, target

    return DetectionDataset(split, {90: 1, 3: 2}, transforms=transform, unreadable="replace")


def test_loading_goes_on_in_the_middle_of_an_epoch_without_what_was_before(split):
    whole = load(split, epoch=2)
    spoil(split, *(i for (batch,) in whole[:1] for i, image in enumerate(split.images) if image["id"] in ids(batch)))
    rest = load(split, epoch=2, start=1)
    assert [ids(batch) for (batch,) in rest] == [ids(batch) for (batch,) in whole[1:]]
    assert [batch.step for (batch,) in rest] == [1, 2]
    assert not any(batch.unreadable for (batch,) in rest)


def test_pinning_keeps_a_batch(split, monkeypatch):
    """As torch's thread does it, which runs beside a GPU alone."""
    spoil(split, 2)
    batch = DetectionDataset(split, {90: 1, 3: 2}, unreadable="replace").__getitems__(Share([2, 1], 5, 7))
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    again = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert type(again) is type(batch)
    assert ids(again) == ids(batch)
    assert again[2:] == batch[2:] == (5, False, batch.unreadable, 7)
    assert len(pinned) == 2 * 3  # image, boxes and labels


@pytest.mark.parametrize(
    ("flags", "steps", "trained", "evaluated"),
    [((), 2, 8, 4), (("--limit-batches", 1), 1, 4, 2), (("--accumulation-steps", 3), 1, 8, 4)],
)
def test_the_configuration_decides_what_the_loaders_yield(coco_root, monkeypatch, flags, steps, trained, evaluated):
    add_images(coco_root, "train", 6)
    add_images(coco_root, "val", 3)
    config = config_of("--data-path", coco_root, *SMALL, *flags)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    val_ids, train_images = [], []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        train, val = read_splits(config)
        train_loader, val_loader = make_loaders(config, CPU, train, val, Labels.of(train))
        assert len(train_loader) == steps
        train_images += [len(batch.images) for batch in train_loader]
        val_ids += [image_id for batch in val_loader for image_id in ids(batch)]
    assert sum(train_images) == trained
    assert sorted(val_ids) == sorted(image["id"] for image in val.images)
    assert len(val_ids) == evaluated


@pytest.mark.parametrize("strict", [False, True])
def test_strict_data_is_a_setting(coco_root, strict):
    config = config_of("--data-path", coco_root, *SMALL, *(["--strict-data"] if strict else []))
    train, val = read_splits(config)
    for loader in make_loaders(config, CPU, train, val, Labels.of(train)):
        folder = loader.dataset.split.image_dir
        next(iter(folder.iterdir())).unlink()
        if strict:
            with pytest.raises(UserError, match="is missing"):
                list(loader)
        else:
            assert sum(len(batch.unreadable) for batch in loader) == 1
