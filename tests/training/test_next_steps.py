"""The last words of a run."""

import sys
from pathlib import Path

import pytest

from balanced_learning.training.reporting.next_steps import next_steps
from tests.training.small import config_of

PROGRAMS = Path("/programs")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()


def said(*flags, rows, has_best=True):
    config = config_of("--output-dir", "out", *flags)
    if has_best:
        Path("out/checkpoint_best.pth").touch()
    return next_steps(config, rows, PROGRAMS, Path("my images/val2017")).splitlines()


def test_the_best_epoch_and_commands_that_can_be_typed():
    rows = [
        {"epoch": 0, "AP": 0.1, "AP50": 0.2},
        {"epoch": 1, "AP": 0.3, "AP50": 0.61},
        {"epoch": 2, "AP": 0.2, "AP50": 0.7},
    ]
    first, *commands = said(rows=rows)
    assert first == "done: AP 30.0, AP50 61.0 after epoch 1; look at out/curves.png and evaluation_01.png"
    typed = [command.partition(": ")[2].split(maxsplit=1)[1] for command in commands]
    assert typed == [
        "/programs/predict.py out/checkpoint_best.pth 'my images/val2017'",
        "/programs/imbalance_report.py --resume out/checkpoint_best.pth",
        "/programs/plot_sampling.py --resume out/checkpoint_best.pth",
        "/programs/plot_pyramid.py --resume out/checkpoint_best.pth",
        "/programs/train_torchvision_libra.py --recipe shapes --data-path FOLDER",
    ]


@pytest.mark.parametrize(
    ("flags", "programs"),
    [
        (["--no-pyramid"], {"predict.py", "imbalance_report.py", "plot_sampling.py"}),
        (["--no-sampler"], {"predict.py", "imbalance_report.py", "plot_pyramid.py"}),
        (["--model", "libra_retinanet"], {"predict.py", "imbalance_report.py", "plot_pyramid.py"}),
        (["--model", "libra_rpn"], {"predict.py", "train_torchvision_libra.py", "plot_pyramid.py"}),
        (["--model", "libra_fastrcnn", "--proposals", "p.npy", "--no-sampler", "--no-pyramid"], set()),
        (["--model", "libra_fastrcnn", "--proposals", "p.npy"], {"plot_sampling.py", "plot_pyramid.py"}),
    ],
)
def test_only_what_the_model_has_is_named(flags, programs):
    lines = said("--data-path", "x", *flags, rows=[{"epoch": 0, "AP": 0.1}])
    assert {Path(line.partition(": ")[2].split()[1]).name for line in lines[1:]} == programs


@pytest.mark.parametrize("first", [{"epoch": 0, "AP": None}, {"epoch": 0, "AP": 0.9}])
def test_without_a_best_checkpoint_the_last_one_is_named(first):
    done, detect, *_ = said(rows=[first, {"epoch": 1, "AP": None}], has_best=False)
    assert "not evaluated after epoch 1" in done
    assert "out/checkpoint.pth" in detect


def test_python_is_named_from_the_folder_one_is_in(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    lines = said(rows=[{"epoch": 0, "AP": 0.1}])
    assert ".venv/bin/python /programs/predict.py" in lines[1].split(": ")[1].strip()
