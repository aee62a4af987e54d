from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from balanced_learning.training.checkpoint import Checkpoint, prepare_folder, save
from balanced_learning.training.config import Config
from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError

LABELS = Labels({1: "car", 2: "toothbrush"}, {1: 3, 2: 90}, 3)
CONFIG = Config.of({"min_size": 64, "lr_steps": (3, 5), "data_path": Path("data"), "output_dir": Path("out")})
STATE = {"config": CONFIG, "labels": LABELS, "epoch": 3, "iterations": 7}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint after epoch 3, and the model it is of."""
    model = nn.Linear(2, 3)
    save(tmp_path / "checkpoint.pth", {"model": model}, **STATE)
    return tmp_path / "checkpoint.pth", model


def test_what_is_saved_is_loaded(saved):
    path, model = saved
    checkpoint = Checkpoint.load(path)
    other = nn.Linear(2, 3)
    checkpoint.restore({"model": other})
    assert torch.equal(other.weight, model.weight)
    assert checkpoint.config == CONFIG
    assert (checkpoint.labels, checkpoint.epoch, checkpoint.iterations) == (LABELS, 3, 7)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pth"]


def test_it_explains_itself_to_torch_alone(saved):
    content = torch.load(saved[0], weights_only=True)
    assert content["model"].keys() == {"weight", "bias"}
    assert content["categories"] == {1: "car", 2: "toothbrush"}
    assert (content["config"]["min_size"], content["config"]["max_size"]) == (64, 1333)
    assert content["versions"]["torch"] == torch.__version__


def test_a_failed_save_leaves_the_last_checkpoint(saved, monkeypatch):
    path, model = saved

    def fail(content, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"checkpoint\.pth: cannot be written \(disk full\)"):
        save(path, {"model": model}, **STATE | {"epoch": 4})
    assert Checkpoint.load(path).epoch == 3
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": nn.Linear(2, 4)}, "does not fit the model .*size mismatch"),
        ({"optimizer": nn.Linear(2, 3)}, "does not fit the optimizer .*'optimizer'"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(saved, parts, message):
    with pytest.raises(UserError, match=rf"checkpoint\.pth: {message}") as caught:
        Checkpoint.load(saved[0]).restore(parts)
    assert "\n" not in str(caught.value)


def test_other_data_is_refused(saved):
    checkpoint = Checkpoint.load(saved[0])
    split = Split(Path("train.json"), Path(), {3: "car", 90: "toothbrush"}, {}, {})
    checkpoint.check_data(split, 7)
    checkpoint.check_data(split, None)
    with pytest.raises(UserError, match=r"checkpoint\.pth: an epoch had 7 iterations, not 8"):
        checkpoint.check_data(split, 8)
    split.categories[90] = "comb"
    with pytest.raises(UserError, match=r"other categories than train\.json has, such as \(90, 'comb'\)"):
        checkpoint.check_data(split, 7)


@pytest.mark.parametrize("content", [b"", b"\x80", b"no checkpoint", b"PK\x03\x04 broken zip"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth: not a checkpoint"):
        Checkpoint.load(tmp_path / "x.pth")


def test_weights_alone_are_no_checkpoint(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="not a checkpoint of these programs"):
        Checkpoint.load(tmp_path / "weights.pth")


def test_foreign_objects_are_refused(tmp_path):
    torch.save({"epoch": 3, "args": Namespace(lr=1)}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"foreign\.pth: not a checkpoint"):
        Checkpoint.load(tmp_path / "foreign.pth")


def test_a_setting_of_a_later_version_is_named(saved):
    content = torch.load(saved[0], weights_only=True)
    content["config"]["antigravity"] = True
    torch.save(content, saved[0])
    with pytest.raises(UserError, match="a setting 'antigravity', which this one has not"):
        Checkpoint.load(saved[0])


def test_a_folder_with_another_run_is_refused_until_it_goes_on(saved, tmp_path):
    path, model = saved
    config = Config.of({"output_dir": tmp_path})
    with pytest.raises(UserError, match=r"holds checkpoint\.pth; --resume"):
        prepare_folder(config, None)
    prepare_folder(config, Checkpoint.load(path))
    prepare_folder(Config.of({"output_dir": tmp_path, "test_only": True}), None)
    best = tmp_path / "checkpoint_best.pth"
    save(best, {"model": model}, **STATE)
    prepare_folder(config, Checkpoint.load(best))
    save(best, {"model": model}, **STATE | {"epoch": 1})
    with pytest.raises(UserError, match=r"checkpoint\.pth is of a later epoch; name another --output-dir"):
        prepare_folder(config, Checkpoint.load(best))


@pytest.mark.parametrize(
    ("name", "value"),
    [("categories", ["car"]), ("category_ids", None), ("num_classes", "3"), ("epoch", 1.5), ("norm_eps", None)],
)
def test_an_entry_of_another_type_is_named(saved, name, value):
    torch.save(torch.load(saved[0]) | {name: value}, saved[0])
    with pytest.raises(UserError, match=rf"checkpoint\.pth: its {name} cannot be read: "):
        Checkpoint.load(saved[0])


@pytest.mark.parametrize("config", [None, [], 5, {"data_path": 5}])
def test_settings_of_another_type_are_no_settings(saved, config):
    torch.save(torch.load(saved[0]) | {"config": config}, saved[0])
    with pytest.raises(UserError, match=r"checkpoint\.pth: its settings cannot be read"):
        Checkpoint.load(saved[0])
