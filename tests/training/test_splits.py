"""Checks of both halves of the data together."""

import json

import pytest
from PIL import Image

from balanced_learning.training.data import splits
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.errors import UserError
from tests.training.small import SMALL, config_of


def make_strip(root, split, image_id, size=(20000, 50)):
    Image.new("RGB", size).save(root / split / f"{image_id}.png")
    file = root / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    image = next(image for image in content["images"] if image["id"] == image_id)
    image.update(width=size[0], height=size[1])
    for annotation in content["annotations"]:
        if annotation["image_id"] == image_id:
            annotation["bbox"] = [0, 0, *size]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(("split", "image_id"), [("train2017", 12), ("val2017", 21)])
def test_an_image_that_shrinks_to_nothing_is_named_before_training(coco_root, split, image_id):
    make_strip(coco_root, split, image_id)
    with pytest.raises(
        UserError, match=rf"{split}\.json: image {image_id}: .*{image_id}\.png of 20000 x 50 shrinks"
    ) as e:
        read_splits(config_of("--data-path", coco_root, *SMALL, "--keep-empty"))
    assert "--min-size 64 --max-size 96" in str(e.value)
    read_splits(config_of("--data-path", coco_root, "--min-size", 64, "--max-size", 400))


def test_a_policy_shrinks_images_to_train_on_alone(coco_root):
    flags = ["--data-path", coco_root, "--data-augmentation", "multiscale", "--max-size", "2000"]
    make_strip(coco_root, "val2017", 21, (8000, 5))
    read_splits(config_of(*flags))
    make_strip(coco_root, "train2017", 11, (8000, 5))
    with pytest.raises(UserError, match=r"image 11: .*--data-augmentation multiscale"):
        read_splits(config_of(*flags))


def test_images_that_are_not_trained_on_may_be_of_any_shape(coco_root, edit):
    make_strip(coco_root, "train2017", 12)
    edit(lambda content: content["annotations"].pop(1))
    read_splits(config_of("--data-path", coco_root, *SMALL))
    with pytest.raises(UserError, match="image 12"):
        read_splits(config_of("--data-path", coco_root, *SMALL, "--keep-empty"))


def test_no_process_waits_for_shapes_that_the_main_one_cannot_draw(monkeypatch):
    def fail():
        raise UserError("no space")

    arrived = []
    monkeypatch.setattr(splits, "shapes_dataset", fail)
    monkeypatch.setattr(splits.distributed, "barrier", lambda: arrived.append(True))
    with pytest.raises(UserError, match="no space"):
        read_splits(config_of(*SMALL))
    assert arrived == [True]
