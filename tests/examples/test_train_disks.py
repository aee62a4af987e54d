"""A run whose disk is full, read-only or gone while it writes a file: nothing good is lost, and one line says so."""

import json
import shutil

import pytest
import torch
from PIL import Image

from examples import train_torchvision_libra
from tests.training.disks import NO_FILE, NO_ROOM, filled, read_only, removed, while_written
from tests.training.small import SMALL
from tests.training.toy import rows


def train(*options: object) -> None:
    train_torchvision_libra.main([str(option) for option in options])


def state(path):
    content = torch.load(path, weights_only=True)
    return content["epoch"], content["step"], {name: value.tolist() for name, value in content["model"].items()}


@pytest.fixture
def flags(coco_root):
    return ["--data-path", coco_root, *SMALL, "--checkpoint-steps", 1]


@pytest.fixture
def undisturbed(flags, tmp_path_factory):
    """The folder of a run like the others, without trouble."""
    folder = tmp_path_factory.getbasetemp() / "undisturbed"
    if not folder.exists():
        train(*flags, "--output-dir", folder)
    return folder


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


TROUBLES = {"full": (filled, NO_ROOM), "read-only": (read_only, "Read-only file system"), "removed": (removed, NO_FILE)}


@pytest.mark.parametrize(
    ("name", "number", "trouble"),
    [
        slow("args.json", 1, "full"),
        ("metrics.jsonl", 1, "full"),
        slow("checkpoint.pth", 1, "full"),
        ("checkpoint.pth", 2, "full"),
        slow("checkpoint.pth", 2, "read-only"),
        slow("checkpoint_best.pth", 1, "full"),
        ("checkpoint_best.pth", 1, "removed"),
    ],
)
def test_a_run_that_cannot_write_ends_in_one_line_and_goes_on(
    disk, flags, undisturbed, monkeypatch, name, number, trouble
):
    make, reason = TROUBLES[trouble]
    out = disk / "out"
    while_written(monkeypatch, name, lambda: make(out), number)
    with pytest.raises(SystemExit) as caught:
        train(*flags, "--output-dir", out)
    assert str(caught.value) == f"error: {out}/{name}: cannot be written ({reason})"
    assert not list(out.glob("*.unfinished"))
    for file in out.glob("*.pth"):
        torch.load(file, weights_only=True)
    train(*flags, "--output-dir", out, "--resume", "auto")
    assert rows(out) == rows(undisturbed)
    for file in ("checkpoint.pth", "checkpoint_best.pth"):
        assert state(out / file) == state(undisturbed / file)


@pytest.mark.parametrize(
    ("name", "trouble"),
    [
        slow("evaluation_00.json", "full"),
        ("evaluation_00.png", "full"),
        slow("evaluation_00.png", "removed"),
        slow("curves.png", "full"),
        ("curves.png", "read-only"),
    ],
)
def test_a_run_goes_on_without_a_picture(disk, flags, undisturbed, monkeypatch, name, trouble, capsys):
    make, reason = TROUBLES[trouble]
    out = disk / "out"
    while_written(monkeypatch, name, lambda: make(out))
    train(*flags, "--output-dir", out)
    assert capsys.readouterr().err == f"warning: {out}/{name}: cannot be written ({reason})\n"
    assert rows(out) == rows(undisturbed)
    assert {file.name for file in out.iterdir()} == {file.name for file in undisturbed.iterdir()} - {name}


@pytest.mark.slow
def test_a_run_survives_a_power_cut_at_any_moment(large_cut_disk, flags, undisturbed, monkeypatch, tmp_path):
    cut, moments, runs = large_cut_disk, 0, []

    def look(moment):
        nonlocal moments
        moments += 1
        with cut.after_cut() as folder:
            out = folder / "out"
            for file in out.glob("*.pth"):
                torch.load(file, weights_only=True)
            for file in out.glob("*.json"):
                json.loads(file.read_text())
            for file in out.glob("*.png"):
                Image.open(file).verify()
            if (out / "metrics.jsonl").exists():
                assert rows(out) in ([], rows(undisturbed))
            if moments % 12 == 0:
                runs.append(shutil.copytree(out, tmp_path / f"run{moments}"))

    with monkeypatch.context() as patch:
        cut.at_each_moment(patch, look)
        train(*flags, "--output-dir", cut.folder / "out")
    assert moments > 50
    assert len(runs) >= 4
    for out in runs:
        train(*flags, "--output-dir", out, "--resume", "auto")
        assert rows(out) == rows(undisturbed)
        for file in ("checkpoint.pth", "checkpoint_best.pth"):
            assert state(out / file) == state(undisturbed / file)
