import json
import shutil

import pytest
from PIL import Image

from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.report import decode_all, describe
from balanced_learning.training.errors import UserError
from examples.train_torchvision_libra import main
from tests.training.small import SMALL

CHECK = [*SMALL, "--check-data"]


def rows(report):
    """The lines of the table by category."""
    return {
        line.split()[0]: [int(cell) for cell in line.split()[-6:]] for line in report.split("\n\n")[1].splitlines()[1:]
    }


def test_the_report_counts_what_is_there(coco_root, edit):
    def add(c):
        box = {"image_id": 12, "category_id": 3, "bbox": [0, 0, 70, 48], "area": 40 * 40, "iscrowd": 0}
        c["annotations"] += [
            box,
            dict(box),
            {**box, "area": 100 * 100},
            {**box, "iscrowd": 1},
            {**box, "bbox": [0, 0, 0, 1]},
        ]
        c["images"][0].pop("width")
        c["annotations"] = [a for a in c["annotations"] if a["image_id"] == 12]

    edit(add)
    report = describe(read_split(coco_root, "train2017"))
    assert "train2017: 2 images, 6 boxes, 2 categories" in report
    assert "sizes: 64 x 48 (2 images)" in report
    assert "images without a box to train on: 1" in report
    assert "boxes left out of training: 1 of a crowd, 1 without area" in report
    assert "boxes that reach beyond their image, and are clipped: 3" in report
    assert "boxes that are there twice: 3" in report  # whatever their area is, and the crowd
    assert rows(report) == {"car": [1, 3, 0, 2, 1, 2], "toothbrush": [1, 1, 1, 0, 0, 0]}


def test_files_that_are_there_twice_are_found_across_the_splits(coco_root):
    splits = [read_split(coco_root, name) for name in ("train2017", "val2017")]
    told = decode_all(splits)
    assert "1 are there more than once, 1 of them in both splits, such as train2017/11.png and train2017/12.png" in told
    for i, name in enumerate(("train2017/11", "train2017/12", "val2017/21")):
        Image.new("RGB", (64, 48), (i, 0, 0)).save(coco_root / f"{name}.png")
    assert decode_all(splits) == "all images can be decoded, and none is there twice"


def test_every_image_that_cannot_be_decoded_has_its_line(coco_root):
    split = read_split(coco_root, "train2017")
    for name in ("11.png", "12.png"):
        file = coco_root / "train2017" / name
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError) as caught:
        decode_all([split])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "image 11" in lines[0]
    assert "image 12" in lines[1]


def test_the_program_reports_and_trains_nothing(coco_root, tmp_path, capsys):
    main([*CHECK, "--data-path", str(coco_root), "--output-dir", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert said.index("train2017: 2 images") < said.index("val2017: 1 images") < said.index("all images can be decoded")
    assert not (tmp_path / "run").exists()


def test_the_faults_of_both_splits_are_told_at_once(coco_root, capsys):
    for name in ("train2017", "val2017"):
        file = coco_root / "annotations" / f"instances_{name}.json"
        content = json.loads(file.read_text())
        content["annotations"][0]["area"] = -1
        file.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as caught:
        main([*CHECK, "--data-path", str(coco_root)])
    message = str(caught.value)
    assert len(message.splitlines()) == 2
    assert "instances_train2017.json: annotations[0]" in message
    assert "instances_val2017.json: annotations[0]" in message


def strip(root):
    Image.new("RGB", (20000, 50)).save(root / "val2017" / "21.png")
    return lambda c: c["images"][0].update(width=20000, height=50)


CASES = {
    "as it is": ("train2017", lambda root: lambda c: None),
    "no boxes": ("train2017", lambda root: lambda c: c.update(annotations=[])),
    "crowds alone": ("train2017", lambda root: lambda c: [a.update(iscrowd=1) for a in c["annotations"]]),
    "shares": ("train2017", lambda root: lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c["annotations"]]),
    "shares in val": (
        "val2017",
        lambda root: lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c["annotations"]],
    ),
    "other categories": ("val2017", lambda root: lambda c: c["categories"][0].update(name="comb")),
    "a strip": ("val2017", strip),
    "no image": ("val2017", lambda root: lambda c: (root / "val2017" / "21.png").unlink()),
    "no folder": ("val2017", lambda root: lambda c: shutil.rmtree(root / "val2017")),
    "nothing to evaluate": ("val2017", lambda root: lambda c: c.update(annotations=[])),
    "empty boxes in val": ("val2017", lambda root: lambda c: c["annotations"][0].update(bbox=[1, 1, 0, 0])),
}


@pytest.mark.parametrize("case", CASES)
def test_the_check_and_training_agree(coco_root, tmp_path, case):
    name, spoil = CASES[case]
    file = coco_root / "annotations" / f"instances_{name}.json"
    content = json.loads(file.read_text())
    spoil(coco_root)(content)
    file.write_text(json.dumps(content))
    outcomes = []
    for flags in (CHECK, SMALL):
        try:
            main([*flags, "--data-path", str(coco_root), "--output-dir", str(tmp_path / "run")])
            outcomes.append("")
        except SystemExit as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert (outcomes[1] == "") == (tmp_path / "run" / "checkpoint.pth").exists()
