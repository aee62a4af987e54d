import os
import pickle
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balanced_learning.training.data.augmentation import augmentation
from balanced_learning.training.data.batching import DetectionLoader, OneByOne
from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.dataset import DetectionDataset, Share
from balanced_learning.training.data.proposals import ProposalFile, row_type
from balanced_learning.training.errors import UserError

POLICIES = ["none", "hflip", "multiscale", "lsj", "ssd", "ssdlite"]
TRUTH = [4, 4, 34, 24]  # the box of each image of coco_root


def write(path: Path, boxes: dict[tuple[int, int], list], limit: int = 5) -> Path:
    """A file of these boxes by split and image id; with ``None`` it is not finished."""
    rows = np.zeros(len(boxes), row_type(limit))
    for row, ((split, image_id), found) in zip(rows, sorted(boxes.items()), strict=True):
        row["split"], row["image_id"], row["count"] = split, image_id, -1 if found is None else len(found)
        row["boxes"][: len(found or [])] = np.reshape(found or [], (-1, 4))
        row["scores"][: len(found or [])] = np.linspace(1, 0.5, len(found or []))
    np.save(path, rows)
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    """Proposals for coco_root; the first of image 11 is its object, the last is nothing."""
    found = [TRUTH, [0, 0, 64, 48], [50.5, 3.25, 64.00001, 9], [10, 10, 20, 30], [7, 7, 7, 9]]
    return write(tmp_path / "p.npy", {(0, 11): found, (0, 12): [], (1, 21): [TRUTH, [1, 2, 3, 4]]})


def test_the_best_boxes_of_an_image_are_a_view_of_the_map(file):
    proposals = ProposalFile.open(file)
    boxes = proposals.boxes("train2017", 11, 3)
    assert boxes.tolist() == [TRUTH, [0, 0, 64, 48], [50.5, 3.25, np.float32(64.00001), 9]]
    assert np.shares_memory(boxes, proposals.rows)
    assert boxes.flags.aligned
    assert not boxes.flags.writeable
    assert proposals.boxes("train2017", 12).shape == (0, 4)
    assert proposals.boxes("val2017", 21, 1).tolist() == [TRUTH]
    assert proposals.limit == 5


@pytest.mark.parametrize(("split", "image_id"), [("train2017", 21), ("val2017", 11), ("val2017", 99), ("train2017", 1)])
def test_an_image_without_proposals_is_named(file, split, image_id):
    with pytest.raises(UserError, match=rf"p\.npy: has no proposals for image {image_id} of {split}"):
        ProposalFile.open(file).boxes(split, image_id)


def test_a_file_is_sent_as_its_path(file):
    proposals = ProposalFile.open(file)
    sent = pickle.dumps(proposals)
    assert len(sent) < 500
    again = pickle.loads(sent)  # noqa: S301
    assert not np.shares_memory(again.rows, proposals.rows)
    assert again.rows.tobytes() == proposals.rows.tobytes()


def test_the_documented_size_is_that_of_a_file_of_coco():
    """123,287 images x 2,000 proposals: 4.9 GB."""
    assert round(123_287 * row_type(2000).itemsize / 1e9, 1) == 4.9
    assert row_type(2000).itemsize == 16 + 2000 * 5 * 4


def spoil_count(path):
    rows = np.load(path)
    rows["count"][1] = 6
    np.save(path, rows)


def spoil_order(path):
    np.save(path, np.load(path)[::-1])


def repeat(path):
    np.save(path, np.load(path)[[0, 0, 1, 2]])


def put_pickle(path):
    np.save(path, np.array([{}], object), allow_pickle=True)


def put_pipe(path):
    path.unlink()
    os.mkfifo(path)


def put_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "damaged, it has 541 bytes in place of 540"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(pickle.dumps({})), "damaged"),
        (lambda path: np.save(path, np.zeros((3, 4))), "an array of something else"),
        (lambda path: np.save(path, np.zeros((0,), row_type(5))), "something else"),
        (lambda path: np.save(path, np.zeros((3, 1), row_type(5))), "an array of something else"),
        (lambda path: np.save(path, np.zeros(3, [("boxes", "f4")])), "an array of something else"),
        (lambda path: np.save(path, np.zeros(3, [("boxes", "f4", (0, 4))])), "an array of something else"),
        (put_pickle, "damaged"),
        (put_pipe, "cannot be read .not a file but a folder, pipe or device"),
        (put_folder, "cannot be read .not a file but a folder, pipe or device"),
        (Path.unlink, "cannot be read .No such file"),
        (spoil_count, "row 1 cannot be split 0, image 12 with 6 of 5 proposals"),
        (spoil_order, "row 1 cannot be split 0, image 12"),
        (repeat, "row 1 cannot be split 0, image 11"),
        (lambda path: write(path, {(0, 1): [], (0, 2): None, (1, 3): None}), "not finished, 2 of 3 images"),
        (lambda path: write(path, {(0, 1): [], (2, 2): []}), "row 1 cannot be split 2"),
    ],
)
def test_what_is_no_finished_file_is_an_error_in_one_line(file, spoil, said):
    spoil(file)
    with pytest.raises(UserError, match=said) as error:
        ProposalFile.open(file)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


@given(st.data())
def test_a_file_that_is_damaged_anywhere_raises_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    content = bytearray(write(path, {(0, 1): [TRUTH], (1, 2): [TRUTH] * 5}).read_bytes())
    for place in data.draw(st.lists(st.integers(0, 250), max_size=3)):
        content[place % len(content)] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    with warnings.catch_warnings(), suppress(UserError):
        warnings.simplefilter("ignore")  # of Python, about the header's text
        boxes = ProposalFile.open(path).boxes("train2017", 1)
        assert boxes.shape == (min(len(boxes), 5), 4)


@pytest.mark.parametrize("bad", [[4, 4, 3, 9], [1, 5, 2, 4], [1, 2, np.nan, 4], [-np.inf, 0, 1, 1]])
def test_what_is_no_box_is_an_error_when_it_is_read(coco_root, file, bad):
    write(file, {(0, 11): [TRUTH, bad], (0, 12): [TRUTH]})
    proposals = ProposalFile.open(file)
    with pytest.raises(UserError, match=r"p\.npy: image 11 of train2017: proposal 1 is no box: \["):
        proposals.boxes("train2017", 11)
    assert len(proposals.boxes("train2017", 11, 1)) == 1
    images = DetectionDataset(
        read_split(coco_root, "train2017"), {90: 1, 3: 2}, unreadable="replace", proposals=proposals
    )
    error = images.__getitems__(Share([0], 1, 0))  # which no other image takes the place of
    assert isinstance(error, UserError)


@pytest.mark.parametrize("beyond", [[0, 0, 65.5, 4], [0, 0, 4, 49.5], [-1.5, 0, 4, 4]])
def test_proposals_of_other_images_are_found_by_their_size(coco_root, file, beyond):
    write(file, {(0, 11): [TRUTH, beyond], (0, 12): [[-0.5, 0, 64.5, 48.5]]})
    images = dataset_of(coco_root, file)
    with pytest.raises(UserError, match="image 11 of train2017: proposals reach beyond it, which has 64 x 48 pixels"):
        images[0]
    assert images[1][1]["proposals"].tolist() == [[0, 0, 64, 48]]
    assert len(dataset_of(coco_root, file, max_proposals=1)[0][1]["proposals"]) == 1


def test_a_split_needs_proposals_for_the_images_that_are_used(coco_root, file):
    split = read_split(coco_root, "train2017")
    proposals = ProposalFile.open(write(file, {(0, 12): [], (1, 11): []}))
    with pytest.raises(UserError, match=r"for 1 of 2 images of .*instances_train2017.json, the first is image 11;"):
        DetectionDataset(split, {}, proposals=proposals)
    DetectionDataset(split, {}, [1], proposals=proposals)


def dataset_of(coco_root, file, policy=None, **options) -> DetectionDataset:
    transforms = policy and augmentation(policy)
    split = read_split(coco_root, "train2017")
    return DetectionDataset(split, {90: 1, 3: 2}, None, transforms, proposals=ProposalFile.open(file), **options)


def test_proposals_lie_within_the_image_and_the_empty_ones_are_left_out(coco_root, file):
    _, target = dataset_of(coco_root, file)[0]
    assert target["proposals"].tolist() == [TRUTH, [0, 0, 64, 48], [50.5, 3.25, 64, 9], [10, 10, 20, 30]]
    assert type(target["proposals"]) is torch.Tensor
    assert dataset_of(coco_root, file, max_proposals=2)[0][1]["proposals"].tolist() == [TRUTH, [0, 0, 64, 48]]
    assert dataset_of(coco_root, file)[1][1]["proposals"].shape == (0, 4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [5, 7, 15])
def test_proposals_that_are_the_objects_are_them_after_augmentation(coco_root, edit, tmp_path, policy, count):
    """Fewer than the seven objects, as many, and more; and image and objects are as they are without proposals."""
    draw = np.random.default_rng(0)
    corner, size = draw.uniform(1, 25, (8, 2)), draw.uniform(2, 20, (8, 2))
    size[3] = 0.03  # which is too little for an object, not for a proposal
    objects = np.concatenate([corner, size], 1).astype(np.float32)
    entry = {"image_id": 11, "area": 9, "iscrowd": 0}
    annotations = [
        entry | {"id": i, "bbox": box, "category_id": (90, 3)[i % 2]} for i, box in enumerate(objects.tolist())
    ]
    edit(lambda content: content.update(annotations=annotations))
    corners = np.concatenate([objects[:, :2], objects[:, :2] + objects[:, 2:]], 1)
    found = [*corners, *[[5, 5, 5, 9]] * 7][:count][::-1]  # in another order than the objects
    plain = DetectionDataset(read_split(coco_root, "train2017"), {90: 1, 3: 2}, None, augmentation(policy))
    images = dataset_of(coco_root, write(tmp_path / "p.npy", {(0, 11): found, (0, 12): []}, 20), policy)
    fewest, smallest = 8, 99.0
    for plain.epoch in range(12):
        images.epoch = plain.epoch
        (expected_image, expected), (image, target) = plain[0], images[0]
        assert torch.equal(image, expected_image)
        assert torch.equal(target["boxes"], expected["boxes"])
        assert torch.equal(target["labels"], expected["labels"])
        proposals = target["proposals"]
        sides = proposals[:, 2:] - proposals[:, :2]
        large = proposals[(sides >= 1).all(1)].flip(0)
        assert torch.equal(large, target["boxes"][: len(large)])
        assert count < 8 or len(large) == len(target["boxes"])
        assert (proposals >= 0).all()
        assert (proposals[:, 2:] <= torch.tensor(image.shape[:0:-1])).all()
        assert (sides > 0).all()
        fewest, smallest = min(fewest, len(target["boxes"])), min(smallest, sides.min().item() if len(sides) else 99)
    assert (fewest < 7) == (policy in ("lsj", "ssd", "ssdlite"))
    assert smallest < 1


def test_processes_that_load_see_the_same_map(coco_root, file):
    images = dataset_of(coco_root, file)
    alone, loaded = (list(DetectionLoader(images, OneByOne(2), workers, torch.device("cpu"))) for workers in (0, 2))
    for one, other in zip(alone, loaded, strict=True):
        assert torch.equal(one.targets[0]["proposals"], other.targets[0]["proposals"])
    moved = alone[0].to(torch.device("meta"))
    assert moved.targets[0]["proposals"].is_meta


def test_targets_do_not_write_into_the_map(coco_root, file):
    images = dataset_of(coco_root, file)
    images[0][1]["proposals"].zero_()
    assert images[0][1]["proposals"][0].tolist() == TRUTH
