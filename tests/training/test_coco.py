from pathlib import Path

import pytest
from PIL import Image

from balanced_learning.training.data.coco import read_split
from balanced_learning.training.errors import UserError


def test_reads_images_annotations_and_sparse_categories(coco_root):
    split = read_split(coco_root, "train2017")
    assert [image["id"] for image in split.images] == [11, 12]
    assert split.categories == {90: "toothbrush", 3: "car"}
    assert [a["bbox"] for a in split.boxes(split.images[0])] == [[4, 4, 30, 20]]


def test_area_crowd_and_image_size_may_be_left_out(coco_root, edit):
    def strip(content):
        for annotation in content["annotations"]:
            del annotation["area"], annotation["iscrowd"]
        for image in content["images"]:
            del image["width"], image["height"]

    edit(strip)
    split = read_split(coco_root, "train2017")
    assert (split.images[0]["width"], split.images[0]["height"]) == (64, 48)
    assert split.boxes(split.images[0])[0]["area"] == 600


def test_null_is_taken_for_left_out(coco_root, edit):
    edit(lambda content: content["annotations"][0].update(area=None, iscrowd=None))
    split = read_split(coco_root, "train2017")
    assert split.annotations[11][0].items() >= {"area": 600, "iscrowd": 0}.items()


def test_images_of_more_than_8_bits_are_refused(coco_root):
    Image.new("I;16", (64, 48), 30000).save(coco_root / "train2017" / "11.png")
    with pytest.raises(UserError, match=r"11\.png has more than 8 bits"):
        read_split(coco_root, "train2017")


def test_crowds_are_for_evaluation_alone(coco_root, edit):
    edit(lambda content: content["annotations"][0].update(iscrowd=1))
    split = read_split(coco_root, "train2017")
    assert split.boxes(split.images[0]) == []
    assert len(split.annotations[11]) == 1


def test_limit_takes_the_first_images_and_their_annotations(coco_root):
    split = read_split(coco_root, "train2017", limit=1)
    assert [image["id"] for image in split.images] == list(split.annotations) == [11]


@pytest.mark.parametrize("box", [[4, 4, 0, 20], [4, 4, 30, -1], [64, 0, 10, 10], [-20, 0, 20, 20]])
def test_a_box_without_area_is_told_of_and_not_trained_on(coco_root, edit, capsys, box):
    file = edit(lambda content: content["annotations"][0].update(bbox=box))
    split = read_split(coco_root, "train2017")
    assert split.boxes(split.images[0]) == []
    warning = capsys.readouterr().err
    assert str(file) in warning
    assert "annotation 110" in warning
    assert str(box) in warning


SPOILS = {
    "image_id 99 is not among": lambda c: c["annotations"][0].update(image_id=99),
    "category_id 1 is not among": lambda c: c["annotations"][0].update(category_id=1),
    "four finite numbers": lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
    r"four finite numbers.*nan": lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]),
    r"annotations\[0\]: 'bbox' must be a list": lambda c: c["annotations"][0].update(bbox="1 2 3 4"),
    r"annotations\[1\]: 'image_id' must be a int": lambda c: c["annotations"][1].pop("image_id"),
    r"images\[0\]: 'file_name'": lambda c: c["images"][0].pop("file_name"),
    "image 11: the id is used twice": lambda c: c["images"][1].update(id=11),
    "category 3: the id is used twice": lambda c: c["categories"][0].update(id=3),
    "area must be a number, got 'big'": lambda c: c["annotations"][0].update(area="big"),
    "no list 'categories'": lambda c: c.pop("categories"),
    "no list 'images'": lambda c: c.update(images={}),
    "'images' is empty": lambda c: c.update(images=[], annotations=[]),
    "'categories' is empty": lambda c: c.update(categories=[], annotations=[]),
    "no.png is missing": lambda c: c["images"][0].update(file_name="no.png"),
    "64 x 48, not 48 x 64": lambda c: c["images"][0].update(width=48, height=64),
}


@pytest.mark.parametrize("message", SPOILS)
def test_faults_of_the_json_are_named_with_file_and_entry(coco_root, edit, message):
    file = edit(SPOILS[message])
    with pytest.raises(UserError, match=message) as caught:
        read_split(coco_root, "train2017")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_faulty_image_is_counted(coco_root):
    for file in (coco_root / "train2017").iterdir():
        file.write_text("not an image")
    with pytest.raises(UserError, match=r"image 11: .*11\.png is unreadable .*1 more"):
        read_split(coco_root, "train2017")


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"images": 3}', "\xff"])
def test_a_file_that_is_not_coco_is_named(coco_root, content):
    file = coco_root / "annotations" / "instances_train2017.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"{file}: not"):
        read_split(coco_root, "train2017")


@pytest.mark.parametrize("missing", ["", "annotations", "train2017"])
def test_a_missing_folder_is_named(coco_root, missing):
    folder = coco_root / missing
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(UserError, match=f"{folder}: no such folder"):
        read_split(coco_root, "train2017")


def test_a_missing_json_is_named(coco_root):
    file = coco_root / "annotations" / "instances_val2017.json"
    file.unlink()
    with pytest.raises(UserError, match=f"{file}: cannot be read"):
        read_split(coco_root, "val2017")


@pytest.mark.parametrize(
    ("name", "images", "boxes", "crowds"),
    [("coco_tiny", 80, 705, 6), ("bccd", 292, 3941, 0), ("deeppcb", 1000, 6873, 0)],
)
def test_real_data_reads_whole(real_data, name, images, boxes, crowds):
    split = read_split(real_data(name), "train2017")
    assert len(split.images) == images
    annotations = [a for image in split.images for a in split.annotations[image["id"]]]
    assert len(annotations) == boxes
    assert sum(a["iscrowd"] for a in annotations) == crowds
    assert sum(len(split.boxes(image)) for image in split.images) == boxes - crowds
    assert all(Path(split.image_dir, image["file_name"]).exists() for image in split.images)
