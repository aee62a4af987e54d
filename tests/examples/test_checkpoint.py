from argparse import Namespace

import pytest
import torch

from checkpoint import read, save
from errors import UserError

CONTENT = {"model": {}, "optimizer": {}, "scheduler": {}, "epoch": 3, "is_for": {"backbone": "small"}}


def test_what_is_saved_is_read(tmp_path):
    save(tmp_path / "checkpoint.pth", CONTENT)
    assert read(tmp_path / "checkpoint.pth", {"backbone": "small"}) == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save(tmp_path / "checkpoint.pth", CONTENT)

    def fail(content, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "checkpoint.pth", {**CONTENT, "epoch": 4})
    assert read(tmp_path / "checkpoint.pth", {})["epoch"] == 3


def test_a_checkpoint_of_another_model_says_what_differs(tmp_path):
    save(tmp_path / "checkpoint.pth", CONTENT)
    with pytest.raises(UserError, match=r"checkpoint\.pth: .*another model: backbone is small there and resnet50 here"):
        read(tmp_path / "checkpoint.pth", {"backbone": "resnet50"})


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 broken zip"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth: not a checkpoint"):
        read(tmp_path / "x.pth", {})


def test_weights_alone_are_no_checkpoint(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="not a checkpoint of this script"):
        read(tmp_path / "weights.pth", {})


def test_foreign_objects_are_refused(tmp_path):
    torch.save({**CONTENT, "args": Namespace(lr=1)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"foreign\.pth: not a checkpoint"):
        read(tmp_path / "foreign.pth", {})
