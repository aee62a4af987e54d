import json
import os
from pathlib import Path

import pytest
from PIL import Image

from balanced_learning.training.data import coco_json
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


LEFT_OUT = {
    "2 without area": [[4, 4, 0, 20], [4, 4, 30, -1]],
    "2 outside their image": [[64, 0, 10, 10], [-20, 0, 20, 20]],
    "2 narrower than a pixel": [[4, 4, 0.9, 20], [63.5, 4, 10, 10]],
}


@pytest.mark.parametrize("cause", LEFT_OUT)
def test_boxes_that_cannot_be_learned_are_left_out_and_counted_by_cause(coco_root, edit, capsys, cause):
    def spoil(content):
        for annotation, box in zip(content["annotations"], LEFT_OUT[cause], strict=True):
            annotation.update(bbox=box)

    file = edit(spoil)
    split = read_split(coco_root, "train2017")
    assert [split.boxes(image) for image in split.images] == [[], []]
    assert not split.has_boxes().any()
    warning = capsys.readouterr().err
    assert f"warning: {file}: 2 of 2 boxes are left out of training: {cause}" in warning
    assert "annotations[0]" in warning
    assert str(LEFT_OUT[cause][0][0]) in warning


def test_what_resizing_makes_smaller_than_a_pixel_is_left_out(coco_root, edit, capsys):
    edit(lambda content: content["annotations"][0].update(bbox=[4, 4, 3, 20]))
    assert read_split(coco_root, "train2017", resized=(24, 100)).has_boxes().tolist() == [True, True]
    assert capsys.readouterr().err == ""
    assert read_split(coco_root, "train2017", resized=(15, 100)).has_boxes().tolist() == [False, True]
    assert read_split(coco_root, "train2017", resized=(100, 20)).has_boxes().tolist() == [False, True]
    assert "1 narrower than a pixel" in capsys.readouterr().err


def test_crowds_are_counted_among_what_is_left_out(coco_root, edit, capsys):
    edit(lambda content: content["annotations"][1].update(iscrowd=1))
    read_split(coco_root, "train2017")
    assert "1 of 2 boxes are left out of training: 1 of a crowd; the first is annotations[1]" in capsys.readouterr().err


def test_what_counts_in_evaluation_but_cannot_be_found_is_told(coco_root, edit, capsys):
    file = coco_root / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"] += [{**content["annotations"][0], "bbox": [4, 4, 0, 0]}]
    content["annotations"] += [{**content["annotations"][0], "iscrowd": 1}]
    file.write_text(json.dumps(content))
    read_split(coco_root, "val2017")
    warning = capsys.readouterr().err
    assert "1 of 3 boxes are in AP all the same, as missed" in warning
    assert "1 without area; the first is annotations[1]" in warning


def test_boxes_beyond_their_image_are_told_of_for_they_may_be_corners(coco_root, edit, capsys):
    def spoil(content):
        content["annotations"][0].update(bbox=[30, 20, 60, 44])  # x1, y1, x2, y2
        content["annotations"][1].update(bbox=[34, 4, 31, 20])

    edit(spoil)
    split = read_split(coco_root, "train2017")
    assert split.has_boxes().all()
    warning = capsys.readouterr().err
    assert (
        "1 boxes reach more than a pixel beyond their image and are clipped; bbox is [x, y, width, height]" in warning
    )
    assert "annotations[0], bbox [30, 20, 60, 44]" in warning


def test_a_box_of_negative_width_has_no_area(coco_root, edit):
    edit(lambda content: content["annotations"][0].update(bbox=[34, 4, -30, 20], area=None))
    assert read_split(coco_root, "train2017").annotations[11][0]["area"] == 0


def test_a_file_of_several_images_is_told_of(coco_root, edit, capsys):
    edit(lambda content: content["images"][1].update(file_name="./11.png"))
    read_split(coco_root, "train2017")
    assert "1 files belong to several images, such as 11.png" in capsys.readouterr().err


def test_boxes_in_shares_of_the_image_are_refused(coco_root, edit):
    def spoil(content):
        for annotation in content["annotations"]:
            annotation.update(bbox=[0.1, 0.2, 0.5, 0.8], area=0.4)

    file = edit(spoil)
    with pytest.raises(UserError, match=rf"{file}: all coordinates are from 0 to 1, such as \[0.1, 0.2, 0.5, 0.8\]"):
        read_split(coco_root, "train2017")


@pytest.mark.parametrize(
    "boxes", [[[0, 0, 1, 1], [0, 0, 1.5, 1]], [[0, 0, 0, 0], [0, 0, 0, 0]], [[-1, 0, 1, 1], [0, 0, 1, 1]]]
)
def test_small_boxes_in_pixels_are_not_taken_for_shares(coco_root, edit, boxes):
    edit(lambda content: [a.update(bbox=box) for a, box in zip(content["annotations"], boxes, strict=True)])
    read_split(coco_root, "train2017")


HARMLESS = {
    "ids as whole floats": lambda c: c["annotations"][0].update(image_id=11.0, category_id=90.0),
    "ids as digits": lambda c: c["annotations"][0].update(image_id="11", category_id=" 90 "),
    "ids as digits elsewhere": lambda c: (c["images"][0].update(id="11"), c["categories"][0].update(id="90")),
    "sizes as digits": lambda c: c["images"][0].update(width="64", height=48.0),
    "sizes null": lambda c: c["images"][0].update(width=None, height=None),
    "one size": lambda c: c["images"][0].pop("width"),
    "area as digits": lambda c: c["annotations"][0].update(area="600"),
    "area null": lambda c: c["annotations"][0].update(area=None),
    "crowd null": lambda c: c["annotations"][0].update(iscrowd=None),
    "crowd as text": lambda c: c["annotations"][0].update(iscrowd="0"),
    "crowd as word": lambda c: c["annotations"][0].update(iscrowd="False"),
    "crowd as float": lambda c: c["annotations"][0].update(iscrowd=0.0),
    "crowd as bool": lambda c: c["annotations"][0].update(iscrowd=False),
    "fields of other tools": lambda c: c["annotations"][0].update(attributes=[{"a": {}}], segmentation={"counts": "x"}),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_harmless_forms_are_taken_for_what_they_mean(coco_root, edit, change):
    before = read_split(coco_root, "train2017")
    edit(HARMLESS[change])
    after = read_split(coco_root, "train2017")
    for image in before.images:
        assert after.annotations[image["id"]] == before.annotations[image["id"]]
    assert list(after.images) == list(before.images)
    assert after.categories == before.categories


@pytest.mark.parametrize("form", [1, True, 1.0, "1", "true", "True"])
def test_every_form_of_a_crowd_is_one(coco_root, edit, form):
    edit(lambda content: content["annotations"][0].update(iscrowd=form))
    assert [a["iscrowd"] for a in read_split(coco_root, "train2017").annotations[11]] == [1]


def test_ids_of_64_bits_are_kept_to_the_last(coco_root, edit):
    def enlarge(content):
        for entry in (*content["images"], *content["annotations"]):
            key = "image_id" if "image_id" in entry else "id"
            entry[key] += 2**60

    edit(enlarge)
    split = read_split(coco_root, "train2017")
    assert [image["id"] for image in split.images] == [2**60 + 11, 2**60 + 12]
    assert [len(split.annotations[image["id"]]) for image in split.images] == [1, 1]


def test_a_byte_order_mark_and_utf_16_are_read(coco_root):
    file = coco_root / "annotations" / "instances_train2017.json"
    text = file.read_text()
    for content in (b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")):
        file.write_bytes(content)
        assert len(read_split(coco_root, "train2017").images) == 2


def test_annotations_in_any_order_come_to_their_image_in_that_of_the_file(coco_root, edit):
    def shuffle(content):
        first, second = content["annotations"]
        content["annotations"] = [second, {**first, "area": 1}, {**second, "area": 2}, {**first, "area": 3}]
        content["images"].reverse()

    edit(shuffle)
    split = read_split(coco_root, "train2017")
    assert [image["id"] for image in split.images] == [12, 11]
    assert [a["area"] for a in split.annotations[12]] == [600, 2]
    assert [a["area"] for a in split.annotations[11]] == [1, 3]


def test_a_fault_in_a_later_piece_has_its_own_place(coco_root, edit, monkeypatch):
    monkeypatch.setattr(coco_json, "PIECE", 3)

    def spoil(content):
        content["annotations"] = [dict(content["annotations"][0]) for _ in range(10)]
        content["annotations"][2]["iscrowd"] = "0"  # a piece that takes the slow way
        content["annotations"][7]["area"] = -1

    edit(spoil)
    with pytest.raises(UserError, match=r"annotations\[7\].*'area' must be a finite number.*, got -1"):
        read_split(coco_root, "train2017")


SPOILS = {
    "image_id 99 is not among": lambda c: c["annotations"][0].update(image_id=99),
    "category_id 1 is not among": lambda c: c["annotations"][0].update(category_id=1),
    "four finite numbers": lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
    r"annotations\[0\].*four finite numbers.*nan": lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]),
    r"four finite numbers.*, got '1 2 3 4'": lambda c: c["annotations"][0].update(bbox="1 2 3 4"),
    r"four finite numbers.*True": lambda c: c["annotations"][0].update(bbox=[1, 2, 3, True]),
    r"four finite numbers.*'4'": lambda c: c["annotations"][0].update(bbox=[1, 2, 3, "4"]),
    r"four finite numbers.*\d\.\.\.": lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 10**400]),
    r"annotations\[1\].*'image_id' must be a whole number": lambda c: c["annotations"][1].pop("image_id"),
    r"'image_id' must be a whole number of 64 bits, got True": lambda c: c["annotations"][1].update(image_id=True),
    r"'image_id' must be a whole number of 64 bits, got 11.5": lambda c: c["annotations"][1].update(image_id=11.5),
    r"'category_id' must be a whole.*, got 9223372036854775808": lambda c: c["annotations"][0].update(
        category_id=2**63
    ),
    r"'image_id' must be a whole number of 64 bits, got 1e\+17": lambda c: c["annotations"][0].update(image_id=1e17),
    r"annotations\[1\]: must be an object, got \[\]": lambda c: c["annotations"].__setitem__(1, []),
    r"annotations\[0\] \(id 110\): 'iscrowd' must be 0 or 1, got 2": lambda c: c["annotations"][0].update(iscrowd=2),
    r"'iscrowd' must be 0 or 1, got 'yes'": lambda c: c["annotations"][0].update(iscrowd="yes"),
    r"'area' must be a finite number.*, got nan": lambda c: c["annotations"][0].update(area=float("nan")),
    r"'area' must be a finite number.*, got inf": lambda c: c["annotations"][0].update(area=float("inf")),
    r"'area' must be a finite number.*, got -720": lambda c: c["annotations"][0].update(area=-720),
    r"'area' must be a finite number.*, got '1_000'": lambda c: c["annotations"][0].update(area="1_000"),
    r"'area' must be .* at most 1e\+10, got 1000000000000": lambda c: c["annotations"][0].update(area=10**12),
    r"'category_id' must be a whole.*'9_0'": lambda c: c["annotations"][0].update(category_id="9_0"),
    r"four finite numbers.*-1e\+39": lambda c: c["annotations"][0].update(bbox=[-1e39, 4, 2e39, 20]),
    r"'area' must be a finite number.*, got 'big'": lambda c: c["annotations"][0].update(area="big"),
    r"'area' must be a finite number.*, got True": lambda c: c["annotations"][0].update(area=True),
    r"images\[0\].*'file_name' must be a text": lambda c: c["images"][0].pop("file_name"),
    r"images\[0\].*'file_name' must be a text that is not empty, got ''": lambda c: c["images"][0].update(file_name=""),
    r"images\[1\].*'width' must be a whole number of pixels, got 0": lambda c: c["images"][1].update(width=0),
    r"images\[1\].*'height' must be a whole number of pixels, got '4.5'": lambda c: c["images"][1].update(height="4.5"),
    r"categories\[0\].*'name' must be a text": lambda c: c["categories"][0].update(name=None),
    "image 11: the id is used twice": lambda c: c["images"][1].update(id=11),
    "image 11: the id is used twice ": lambda c: c["images"][1].update(id="11"),
    "category 3: the id is used twice": lambda c: c["categories"][0].update(id=3),
    "no list 'categories'": lambda c: c.pop("categories"),
    "no list 'images'": lambda c: c.update(images={}),
    "'images' is empty": lambda c: c.update(images=[], annotations=[]),
    "'categories' is empty": lambda c: c.update(categories=[], annotations=[]),
    "no.png is missing": lambda c: c["images"][0].update(file_name="no.png"),
    "64 x 48, not 48 x 64": lambda c: c["images"][0].update(width=48, height=64),
    "64 x 48, not 63 x any": lambda c: c["images"][0].update(width=63, height=None),
}


@pytest.mark.parametrize("message", SPOILS)
def test_faults_of_the_json_are_named_with_file_and_entry(coco_root, edit, message):
    file = edit(SPOILS[message])
    with pytest.raises(UserError, match=message.strip()) as caught:
        read_split(coco_root, "train2017")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_faulty_image_is_counted(coco_root):
    for file in (coco_root / "train2017").iterdir():
        file.write_text("not an image")
    with pytest.raises(UserError, match=r"image 11: .*11\.png is unreadable .*1 more"):
        read_split(coco_root, "train2017")


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"images": 3}', "\xff", "[" * 10**5, '{"info": ' + "[" * 10**5])
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
    with pytest.raises(UserError, match=f"{file}: no such file"):
        read_split(coco_root, "val2017")


def test_a_pipe_in_place_of_the_json_is_refused_not_waited_for(coco_root):
    file = coco_root / "annotations" / "instances_val2017.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=f"{file}: not a file"):
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
