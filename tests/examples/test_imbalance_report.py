import json
import math
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image
from torch import nn

from balanced_learning.training.signals import EXIT_CODE
from examples import imbalance_report
from tests.training.coco_data import add_images
from tests.training.small import SMALL, name_as_untrained, save_untrained
from tests.training.test_proposals import write

KEYS = {"detector", "data", "has_learned", "sample", "feature", "objective", "advice", "versions", "commit", "device"}


def report(folder, *options):
    """Runs the program, and returns what it wrote as JSON."""
    imbalance_report.main([*map(str, options), "--output-dir", str(folder)])
    return read(folder)


def read(folder):
    def refuse(word):
        raise AssertionError(f"{word} is no number")

    return json.loads((folder / "imbalance.json").read_text(), parse_constant=refuse)


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the picture out."""
    monkeypatch.setattr(imbalance_report, "save_imbalance", lambda *_: None)


def test_the_plain_detector_is_warmed_up_and_measured(coco_root, tmp_path, capsys):
    add_images(coco_root, "train", 3)
    add_images(coco_root, "val", 7)
    options = ["--data-path", coco_root, *SMALL, "--warm-up-steps", 2, "--batches", 2]
    content = report(tmp_path / "out", *options)
    assert content.keys() == KEYS
    assert [content["detector"][part] for part in ("sampler", "pyramid", "box_loss")] == [False] * 3
    assert content["data"] | {"data_path": ""} == {
        "data_path": "",
        "images": 4,
        "evaluated_images": 4,
        "categories": ["car", "toothbrush"],
    }
    assert content["has_learned"] is False
    assert content["sample"]["images"] == 4
    assert content["sample"]["bins"] == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    for shares in content["sample"]["shares"].values():
        assert sum(shares) == pytest.approx(1)
    assert math.fsum(content["feature"]["boxes"]) == pytest.approx(1)
    assert content["feature"]["body_maps"] == ["C2", "C3", "C4"]
    assert content["objective"]["positives"] > 0
    assert {"AP50", "AP75", "difference", "localisation"} <= content["objective"].keys()
    assert [advice["level"] for advice in content["advice"]] == ["sample", "feature", "objective"]
    printed = capsys.readouterr().out
    assert "warm-up [2/2]" in printed
    assert "data: a detector after a warm-up of 2 steps, 4 images; 4 training images, 4 evaluated" in printed
    for advice in content["advice"]:
        assert f"{advice['level']} level: {advice['verdict']} (strength {advice['strength']:.2f})" in printed
        assert advice["sentence"] in printed
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["imbalance.json", "imbalance.png"]
    with Image.open(tmp_path / "out" / "imbalance.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 100


def test_a_checkpoint_is_measured_as_it_is(coco_root, edit, tmp_path, capsys, undrawn):
    name_as_untrained(edit)
    checkpoint = save_untrained(tmp_path / "run" / "checkpoint.pth")
    content = report(tmp_path / "run", "--data-path", coco_root, "--resume", checkpoint)
    assert [content["detector"][part] for part in ("sampler", "pyramid", "box_loss")] == [True] * 3
    assert content["detector"]["origin"] == f"weights of {checkpoint}, after 1 of 1 epochs"
    assert all(", which is on" in advice["sentence"] or "Nothing" in advice["sentence"] for advice in content["advice"])
    assert "warm-up [" not in capsys.readouterr().out
    assert read(tmp_path / "run") == report(tmp_path / "run", "--data-path", coco_root, "--resume", checkpoint)


def test_a_retinanet_samples_nothing(coco_root, tmp_path, capsys, undrawn):
    options = ["--data-path", coco_root, *SMALL, "--model", "libra_retinanet", "--warm-up-steps", 1]
    content = report(tmp_path, *options)
    assert content["sample"] is None
    assert content["advice"][0]["flag"] is None
    assert "samples none" in capsys.readouterr().out


def test_a_flag_or_a_recipe_switches_parts_on(coco_root, tmp_path, undrawn):
    options = ["--data-path", str(coco_root), *SMALL, "--warm-up-steps", "0", "--output-dir", str(tmp_path)]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[model]\nbox_loss = false\n")
    for more, parts in ((["--pyramid"], [False, True, False]), (["--recipe", str(recipe)], [True, True, False])):
        imbalance_report.main([*options, *more])
        content = read(tmp_path)
        assert [content["detector"][part] for part in ("sampler", "pyramid", "box_loss")] == parts
        assert content["detector"]["origin"] == "an untrained detector, whose errors say little"


def test_several_processes_are_refused(coco_root, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="error: torchrun: the report is of a single process"):
        imbalance_report.main(["--data-path", str(coco_root), *SMALL, "--output-dir", str(tmp_path)])


def test_nothing_is_compiled_for_so_little(coco_root, tmp_path, monkeypatch, undrawn):
    def fail(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(nn.Module, "compile", fail)
    report(tmp_path, "--data-path", coco_root, *SMALL, "--warm-up-steps", 1, "--batches", 1, "--compile")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "libra_rpn"], "--model libra_rpn: an RPN alone has no second stage"),
        (["--resume", "missing.pth"], "--resume missing.pth: no such file"),
        (["--resume", "auto"], "--resume auto: .* holds no checkpoint to measure"),
        (["--replay", "skipped_00.pth"], "--replay skipped_00.pth: repeats a step of training"),
        (["--weights", "missing.pth"], "missing.pth"),
        (["--data-path", "missing"], "missing"),
    ],
)
def test_what_cannot_be_measured_is_named(coco_root, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        imbalance_report.main(["--data-path", str(coco_root), *SMALL, "--output-dir", str(tmp_path / "out"), *options])


def test_a_fast_rcnn_is_refused(coco_root, tmp_path):
    file = write(tmp_path / "proposals.npy", {(0, 11): [[5, 5, 34, 24]], (0, 12): [[5, 5, 34, 24]]})
    options = ["--data-path", str(coco_root), *SMALL, "--model", "libra_fastrcnn", "--proposals", str(file)]
    with pytest.raises(SystemExit, match="error: --model libra_fastrcnn: it has no RPN"):
        imbalance_report.main([*options, "--output-dir", str(tmp_path)])


@pytest.mark.slow
def test_without_data_it_measures_drawn_shapes(tmp_path):
    command = [sys.executable, imbalance_report.__file__, "--warm-up-steps", "3", "--batches", "1", "-b", "2"]
    result = subprocess.run(
        [*command, "--device", "cpu", "--output-dir", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert read(tmp_path)["detector"]["small"] is True
    assert (tmp_path / "imbalance.png").exists()


def test_a_signal_ends_it_in_one_line(coco_root, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(imbalance_report, "gather", interrupt)
    options = ["--data-path", str(coco_root), *SMALL, "--warm-up-steps", "0", "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ending:
        imbalance_report.main(options)
    assert ending.value.code == EXIT_CODE
    assert capsys.readouterr().err == f"stopped by SIGINT; start it again (exit code {EXIT_CODE})\n"
    assert list(tmp_path.glob("imbalance*")) == []
