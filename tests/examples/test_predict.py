import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

from balanced_learning.training import inference, load_detector
from balanced_learning.training.data.image_files import find_images, picture_files
from balanced_learning.training.errors import UserError
from examples import predict
from tests.training.disks import NO_ROOM, filled, while_written
from tests.training.small import save_untrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("run") / "checkpoint.pth")


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """Runs the program in a folder of its own and returns the predictions, what it prints, and its warnings."""
    monkeypatch.chdir(tmp_path)

    def call(*options: object) -> tuple[list, str, str]:
        predict.main([str(checkpoint), "--output-dir", "out", "--device", "cpu", *map(str, options)])
        return (json.loads(Path("out/predictions.json").read_text()), *capsys.readouterr())

    return call


@pytest.fixture
def error(run):
    """Runs the program, which must end with an error, and returns its one line."""

    def call(*options: object) -> str:
        with pytest.raises(SystemExit) as caught:
            run(*options)
        return str(caught.value)

    return call


def draw(path: str, size: tuple[int, int] = (60, 40)) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    height, width = size[1], size[0]
    save_image(torch.rand(3, height, width, generator=torch.Generator().manual_seed(len(path))), "noise.png")
    with Image.open("noise.png") as image:
        image.save(file)
    Path("noise.png").unlink()
    return file


def outputs() -> list[str]:
    return sorted(path.relative_to("out").as_posix() for path in Path("out").rglob("*") if path.is_file())


def test_predictions_are_those_of_the_detector(run, checkpoint):
    detector = load_detector(checkpoint)
    files = [draw("a.png"), draw("b.png", (90, 70))]
    with torch.no_grad():
        outputs_of = [detector([to_tensor(Image.open(file).convert("RGB"))])[0] for file in files]
    score = outputs_of[0]["scores"].median().item() + 1e-6
    predictions, printed, warnings = run(*files, "--score", score)
    assert [each["file"] for each in predictions] == ["a.png", "b.png"]
    for each, found in zip(predictions, outputs_of, strict=True):
        assert each.keys() == {"file", "boxes", "scores", "labels"}
        sure = found["scores"] >= score
        assert 0 < sure.sum() < len(sure)
        torch.testing.assert_close(torch.tensor(each["boxes"]), found["boxes"][sure], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(torch.tensor(each["scores"]), found["scores"][sure], rtol=1e-4, atol=1e-4)
        assert each["labels"] == [detector.categories[label] for label in found["labels"][sure].tolist()]
    assert outputs() == ["a.png", "b.png", "predictions.json"]
    assert f"images: 2; objects: {sum(len(each['boxes']) for each in predictions)} with a score of " in printed
    assert not warnings


def test_a_photo_on_its_side_is_predicted_and_drawn_upright(run):
    """Of all eight orientations of EXIF."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    with Image.open(draw("photos/1.png")) as upright:
        for orientation, transpose in back.items():
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            upright.transpose(transpose).save(f"photos/{orientation}.png", exif=exif)
    first, *others = run("photos", "--score", 0.1)[0]
    assert len(first["boxes"]) > 0
    assert len(others) == 7
    for each in others:
        assert {**each, "file": "photos/1.png"} == first
        with Image.open("out/1.png") as expected, Image.open(Path("out", Path(each["file"]).name)) as picture:
            assert picture.size == expected.size
            assert np.array_equal(np.asarray(picture), np.asarray(expected))
            assert picture.getexif().get(ExifTags.Base.Orientation, 1) == 1


def test_folders_patterns_and_odd_names_are_found(run):
    for name in ("in/b.png", "in/a.png", "in/deep/down/c.JPG", "in/.hidden/x.png", "in/.y.png", "a[1].png", "a1.png"):
        draw(name)
    draw("кошка 猫 %s.png")
    Path("in/notes.txt").write_text("no image")
    predictions, _, warnings = run("a[1].png", "in", "./in/a.png", "a[0-9].png", "кошка*")
    names = ["a[1].png", "in/a.png", "in/b.png", "in/deep/down/c.JPG", "a1.png", "кошка 猫 %s.png"]
    assert [each["file"] for each in predictions] == names
    assert warnings == "warning: in: 1 of 4 files are no images and left out, such as in/notes.txt\n"
    assert outputs() == sorted([*names, "predictions.json"])


def test_a_pattern_may_lie_in_a_folder_with_brackets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data [v2]/x/1.png", "data [v2]/2.png"):
        draw(name)
    assert find_images(["data [v2]/**/*.png"], Path("out")) == [Path("data [v2]/2.png"), Path("data [v2]/x/1.png")]
    assert find_images(["data [v2]/**"], Path("out")) == [Path("data [v2]/2.png"), Path("data [v2]/x/1.png")]
    assert find_images(["data [v2]/?"], Path("out")) == [Path("data [v2]/x/1.png")]


def test_links_to_folders_are_followed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw("in/1.png")
    draw("disk/2.png")
    Path("in/disk").symlink_to(tmp_path / "disk")
    Path("disk/back").symlink_to(tmp_path / "in")
    assert find_images(["in"], Path("out")) == [Path("in/1.png"), Path("in/disk/2.png")]


def test_names_that_no_terminal_takes_are_taken(run):
    names = ["a\nb.png", os.fsdecode(b"\xff.png"), "c\x1b[31m.png"]
    for name in names:
        draw(f"in/{name}")
    Path("in/d\n.png").write_bytes(b"junk")
    predictions, _, warnings = run("in")
    assert {each["file"] for each in predictions} == {f"in/{name}" for name in names}
    assert warnings == "warning: in/d\\n.png is unreadable (Pillow knows no such format)\n"
    assert len(outputs()) == 4


def test_images_of_one_name_have_a_picture_each(run):
    for name in ("in/a/1.png", "in/b/1.png", "in/1.bmp", "in/1.bmp.png", "in/1.gif"):
        draw(name)
    assert len(run("in/a", "in/b/*", "in/1.bmp", "in/1.bmp.png", "in/1.gif")[0]) == 5
    assert outputs() == ["1.bmp.png", "1.bmp.png.png", "1.gif.png", "a/1.png", "b/1.png", "predictions.json"]


def test_the_same_run_twice_gives_the_same_and_its_pictures_are_no_input(run):
    draw("1.png")
    draw("sub/2.png")
    first, _, _ = run(".", "--score", 0.1)
    files = outputs()
    assert run(".", "--score", 0.1)[0] == run("**/*.png", "--score", 0.1)[0] == first
    assert outputs() == files == ["1.png", "predictions.json", "sub/2.png"]


def test_what_cannot_be_read_is_named_and_the_rest_is_done(run):
    draw("in/1.png")
    draw("in/3.png")
    Path("in/2.png").write_bytes(b"junk")
    Path("in/4.png").write_bytes(Path("in/3.png").read_bytes()[:200])
    Path("in/5.png").touch()
    os.mkfifo("in/6.png")
    draw("in/7.png", (1, 4000))
    draw("in/8.png", (1, 1))
    predictions, printed, warnings = run("in")
    assert [each["file"] for each in predictions] == ["in/1.png", "in/3.png", "in/8.png"]
    assert [line.split()[1].rstrip(":") for line in warnings.splitlines()] == [f"in/{i}.png" for i in (2, 4, 5, 6, 7)]
    assert "1 x 4000 pixels" in warnings
    assert "left out: 5 of 8 images" in printed


def test_nothing_readable_is_an_error(error):
    Path("a.png").write_bytes(b"junk")
    assert error("a.png") == "error: no image could be read, of 1"
    assert json.loads(Path("out/predictions.json").read_text()) == []


def test_images_without_a_detection_are_listed_and_drawn(run):
    draw("a.jpg")
    predictions, printed, _ = run("a.jpg", "--score", 1)
    assert predictions == [{"file": "a.jpg", "boxes": [], "scores": [], "labels": []}]
    assert "--score takes a lower one" in printed
    assert outputs() == ["a.jpg", "predictions.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing.png"], "missing.png: no such file or folder"),
        (["a.png", "missing*.png"], "missing*.png: no such file, and as a pattern it matches none"),
        (["empty"], "empty: no image among its 0 files"),
        (["empt?"], "empt?: no image among its 0 files"),
        (["a.png", "--score", 1.5], "--score 1.5: must be from 0 to 1"),
        (["a.png", "--score", "nan"], "--score nan: must be from 0 to 1"),
        (["a.png", "--device", "nonsense"], "--device nonsense: "),
        (["a.png", "--output-dir", "file"], "--output-dir file: cannot be written"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_done(error, options, message):
    draw("a.png")
    Path("empty").mkdir()
    Path("file").touch()
    assert error(*options).startswith(f"error: {message}")
    assert not Path("out/predictions.json").exists()


def test_no_image_is_replaced_by_its_picture(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = draw("a.png").read_bytes()
    for folder in (".", "../" + tmp_path.name):
        with pytest.raises(SystemExit, match="a picture would replace the image"):
            predict.main([str(checkpoint), "a.png", "--output-dir", folder])
    assert Path("a.png").read_bytes() == before
    with pytest.raises(UserError, match="a picture would replace the image"):
        picture_files([Path("x/a.png"), Path("x/b.png")], Path("x"))


def test_no_checkpoint_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw("a.png")
    with pytest.raises(SystemExit, match=r"error: missing\.pth: cannot be read"):
        predict.main(["missing.pth", "a.png"])


def test_what_is_done_when_the_user_stops_it_is_kept(run, error, monkeypatch):
    for i in range(3):
        draw(f"in/{i}.png")
    whole = run("in")[0]

    def stopped(*args):
        for i, prediction in enumerate(inference.predict_files(*args)):
            if i == 2:
                raise KeyboardInterrupt
            yield prediction

    monkeypatch.setattr(predict, "predict_files", stopped)
    assert error("in") == "stopped after 2 of 3 images"
    assert json.loads(Path("out/predictions.json").read_text()) == whole[:2]
    assert not list(Path("out").glob("*.unfinished"))


@pytest.mark.parametrize("name", ["b.png", "predictions.json"])
def test_a_full_disk_ends_it_in_one_line_and_what_is_done_is_kept(error, small_disk, tmp_path, monkeypatch, name):
    (tmp_path / "out").symlink_to(small_disk)
    monkeypatch.chdir(tmp_path)
    for image in ("in/a.png", "in/b.png"):
        draw(image)
    (small_disk / "predictions.json").write_text("old")
    while_written(monkeypatch, name, lambda: filled(small_disk))
    assert error("in", "--score", 0) == f"error: out/{name}: cannot be written ({NO_ROOM})"
    done = (small_disk / "predictions.json").read_text()
    if name == "b.png":
        assert [record["file"] for record in json.loads(done)] == ["in/a.png"]
    else:
        assert done == "old"


def test_pictures_take_the_place_of_links(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw("in/a.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("precious")
    for name in ("a.jpg", "predictions.json"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "precious")
    run("in")
    assert (tmp_path / "precious").read_text() == "precious"
    with Image.open("out/a.jpg") as picture:
        assert picture.format == "JPEG"


def test_by_default_predictions_lie_beside_the_checkpoint(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path(shutil.copytree(checkpoint.parent, "run")) / "checkpoint.pth"
    draw("a.png")
    predict.main([str(own), "a.png"])
    assert sorted(path.name for path in Path("run/predictions").iterdir()) == ["a.png", "predictions.json"]


def test_real_photos(real_data, run):
    predictions, _, _ = run(real_data("coco_tiny") / "val2017" / "*[01].jpg", "--score", 0.2)
    assert len(predictions) > 5
    assert len(outputs()) == len(predictions) + 1
