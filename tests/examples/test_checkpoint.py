from argparse import Namespace

import pytest
import torch
from torch import nn

from checkpoint import load, save
from errors import UserError

MADE_FOR = {"backbone": "small"}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint after epoch 3, and the model it is of."""
    model = nn.Linear(2, 3)
    save(tmp_path / "checkpoint.pth", {"model": model}, 3, MADE_FOR)
    return tmp_path / "checkpoint.pth", model


def test_what_is_saved_is_loaded(saved):
    path, model = saved
    other = nn.Linear(2, 3)
    assert load(path, {"model": other}, MADE_FOR) == 3
    assert torch.equal(other.weight, model.weight)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pth"]


def test_a_failed_save_leaves_the_last_checkpoint(saved, monkeypatch):
    path, model = saved

    def fail(content, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"checkpoint\.pth: cannot be written \(disk full\)"):
        save(path, {"model": model}, 4, MADE_FOR)
    assert load(path, {"model": model}, MADE_FOR) == 3
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pth"]


def test_a_checkpoint_of_another_model_says_what_differs(saved):
    path, model = saved
    with pytest.raises(UserError, match=r"checkpoint\.pth: .*another run: backbone is small there and resnet50 here"):
        load(path, {"model": model}, {"backbone": "resnet50"})


def test_a_part_that_a_checkpoint_does_not_know_must_be_off(saved):
    path, model = saved
    assert load(path, {"model": model}, MADE_FOR | {"path_aggregation": False}) == 3
    with pytest.raises(UserError, match="path_aggregation is False there and True here"):
        load(path, {"model": model}, MADE_FOR | {"path_aggregation": True})


def test_weights_that_do_not_fit_are_refused_in_one_line(saved):
    with pytest.raises(UserError, match=r"checkpoint\.pth: does not fit the model .* size mismatch") as caught:
        load(saved[0], {"model": nn.Linear(2, 4)}, MADE_FOR)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 broken zip"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth: not a checkpoint"):
        load(tmp_path / "x.pth", {}, {})


def test_weights_alone_are_no_checkpoint(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="not a checkpoint of this script"):
        load(tmp_path / "weights.pth", {}, {})


def test_foreign_objects_are_refused(tmp_path):
    torch.save({"epoch": 3, "made_for": {}, "args": Namespace(lr=1)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"foreign\.pth: not a checkpoint"):
        load(tmp_path / "foreign.pth", {}, {})
