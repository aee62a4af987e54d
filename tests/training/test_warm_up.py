import math

import pytest
import torch

from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.data.batching import make_loaders
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.errors import UserError
from balanced_learning.training.imbalance.warm_up import STEPS, steps_to_warm_up, warm_up
from balanced_learning.training.optimization import Precision
from examples import train_torchvision_libra
from tests.training.small import SMALL, config_of, save_untrained
from tests.training.toy import TOY, Toy, at_steps, make_toy, put_toy_in, write_noise

CPU = torch.device("cpu")


def warmed_up(options, steps):
    """A toy after these steps, and its loader."""
    config = config_of(*options)
    train, val = read_splits(config)
    labels = Labels.of(train)
    toy = make_toy(config, labels, None)
    loader, _ = make_loaders(config, CPU, train, val, labels)
    warm_up(config, labels, toy, Precision(None, CPU), loader, steps)
    return toy, loader


def test_a_warm_up_does_what_as_many_steps_of_a_run_do(tmp_path, monkeypatch, capsys):
    put_toy_in(monkeypatch.setattr)
    options = ["--data-path", write_noise(tmp_path / "data", train=6), *TOY, "--epochs", 2]  # of 3 steps
    train_torchvision_libra.main([*map(str, options), "--output-dir", str(tmp_path / "run")])
    trained = Checkpoint.load(tmp_path / "run" / "checkpoint.pth").states["model"]
    capsys.readouterr()
    toy, _ = warmed_up([*options, "--output-dir", tmp_path / "none", "--print-freq", 2], steps=6)
    assert all(torch.equal(value, trained[name]) for name, value in toy.state_dict().items())
    assert not toy.training
    assert not (tmp_path / "none").exists()
    assert [line.split("]")[0] for line in capsys.readouterr().out.splitlines()] == [
        "warm-up [2/6",
        "warm-up [4/6",
        "warm-up [6/6",
    ]


def test_a_warm_up_may_end_within_an_epoch(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Toy, "before", at_steps(*range(9), do=lambda *_: seen.append(1)))
    warmed_up(["--data-path", write_noise(tmp_path / "data", train=6), *TOY], steps=4)
    assert len(seen) == 4


def test_the_learning_rate_does_not_rise_again_behind_the_epochs(tmp_path, monkeypatch, capsys):
    put_toy_in(monkeypatch.setattr)
    options = [*TOY, "--epochs", 1, "--lr-scheduler", "cosineannealinglr", "--print-freq", 1]
    warmed_up(["--data-path", write_noise(tmp_path / "data", train=6), *options], steps=6)  # two epochs of 3
    rates = [float(line.split("  lr ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)], rel=1e-3)


def spoil(toy, *_):
    toy.offset = float("nan")


def test_a_step_that_goes_wrong_is_left_out_and_many_end_it(tmp_path, monkeypatch, capsys):
    options = ["--data-path", write_noise(tmp_path / "data", train=6), *TOY, "--max-skipped-steps", 1]
    monkeypatch.setattr(Toy, "before", at_steps(1, do=spoil))
    toy, _ = warmed_up(options, steps=3)
    assert all(value.isfinite().all() for value in toy.state_dict().values())
    assert "warning: step 1 of epoch 0 is left out" in capsys.readouterr().err
    monkeypatch.setattr(Toy, "before", at_steps(*range(9), do=spoil))
    with pytest.raises(UserError, match="the warm-up diverged: lower --lr"):
        warmed_up(options, steps=9)


def test_weights_that_know_the_data_need_no_warm_up(coco_root, tmp_path):
    labels = Labels({1: "cat", 2: "dog [old]"}, {1: 1, 2: 2}, num_classes=3)
    others = Labels({1: "cat", 2: "bird"}, {1: 1, 2: 2}, num_classes=3)
    file = save_untrained(tmp_path / "checkpoint.pth")
    options = ["--data-path", coco_root, *SMALL, "--output-dir", tmp_path]
    checkpoint = Checkpoint.load(file)
    for weights, given, asked, steps in (
        ([], labels, None, STEPS),
        ([], labels, 7, 7),
        ([], labels, 0, 0),
        (["--weights", file], labels, None, 0),
        (["--weights", file], labels, 7, 7),
        (["--weights", file], others, None, STEPS),
    ):
        assert steps_to_warm_up(config_of(*options, *weights), None, given, asked) == steps
    config = config_of(*options)
    assert steps_to_warm_up(config, checkpoint, labels, None) == steps_to_warm_up(config, checkpoint, labels, 0) == 0
    with pytest.raises(UserError, match=r"--warm-up-steps 7: the detector of .*checkpoint\.pth is measured as it is"):
        steps_to_warm_up(config, checkpoint, labels, 7)
