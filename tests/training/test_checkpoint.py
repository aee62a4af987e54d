import math
import os
import threading
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from balanced_learning.training.checkpoint import Checkpoint, Position, save, save_newest
from balanced_learning.training.config import Config, TrainingConfig
from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError
from balanced_learning.training.optimization import make_optimizer

LABELS = Labels({1: "car", 2: "toothbrush"}, {1: 3, 2: 90}, 3)
CONFIG = Config.of(
    {"min_size": 64, "lr_steps": (3, 5), "data_path": Path("data"), "output_dir": Path("out"), "start_epoch": 3}
)
POSITION = Position(4, 5, 7, 16, [{"loss": 0.5, "images": 40.0}, {}], [{"epoch": 3, "AP": None, "loss": 0.7}], 1, 7.5)
STATE = {"config": CONFIG, "labels": LABELS, "position": POSITION}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in epoch 4, and the model it is of."""
    model = nn.Linear(2, 3)
    save(tmp_path / "checkpoint.pth", {"model": model}, **STATE)
    return tmp_path / "checkpoint.pth", model


@pytest.fixture
def edit(saved):
    """Writes another content into the checkpoint, in a whole file."""

    def change(**entries):
        torch.save(torch.load(saved[0]) | entries, saved[0])
        return saved[0]

    return change


def refused(path, message):
    with pytest.raises(UserError, match=rf"^{path}: {message}") as caught:
        Checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_what_is_saved_is_loaded(saved):
    path, model = saved
    checkpoint = Checkpoint.load(path)
    other = nn.Linear(2, 3)
    checkpoint.restore({"model": other})
    assert torch.equal(other.weight, model.weight)
    assert (checkpoint.config, checkpoint.labels, checkpoint.position) == (CONFIG, LABELS, POSITION)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pth"]
    assert not checkpoint.states  # which would be held twice


def test_it_explains_itself_to_torch_alone(saved):
    content = torch.load(saved[0], weights_only=True)
    assert content["model"].keys() == {"weight", "bias"}
    assert content["categories"] == {1: "car", 2: "toothbrush"}
    assert (content["config"]["min_size"], content["config"]["max_size"]) == (64, 1333)
    assert (content["epoch"], content["step"], content["images_per_step"]) == (4, 5, 16)
    assert content["versions"]["torch"] == torch.__version__


def test_a_failed_save_leaves_both_generations(saved, monkeypatch):
    path, model = saved
    save_newest(path, {"model": model}, **STATE | {"position": replace(POSITION, step=6)})

    def fail(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"checkpoint\.pth: cannot be written \(disk full\)"):
        save_newest(path, {"model": model}, **STATE)
    assert Checkpoint.load(path).position.step == 6
    assert Checkpoint.load(path.with_name("checkpoint_previous.pth")).position == POSITION
    assert len(list(path.parent.iterdir())) == 2


def flip(path, place=-200):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_every_flipped_byte_of_tensors_is_found(saved):
    path, _ = saved
    with zipfile.ZipFile(path) as archive:
        names = [entry.filename for entry in archive.infolist() if "/data/" in entry.filename]
        tensor = archive.read(names[0])
    place = path.read_bytes().index(tensor)
    for byte in range(place, place + len(tensor)):
        flip(path, byte)
        refused(path, rf"damaged: {names[0]} \(Bad CRC-32")
        flip(path, byte)
    Checkpoint.load(path)


def test_an_entry_that_is_marked_as_a_folder_is_found(saved):
    """torch.load reads nothing of it, whatever is there."""
    path, model = saved
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
        name = next(entry.filename for entry in archive.infolist() if "/data/" in entry.filename)
    flip(path, path.read_bytes().index(name.encode(), start) - 8)  # bit 0 of the attributes: read-only
    Checkpoint.load(path)
    data = bytearray(path.read_bytes())
    data[bytes(data).index(name.encode(), start) - 8] = 0x10
    path.write_bytes(data)
    assert not all(map(torch.equal, torch.load(path)["model"].values(), model.state_dict().values()))
    refused(path, rf"damaged: {name} \(not as torch\.save writes it\)")


def test_the_one_before_is_taken_with_a_word_if_the_newest_is_damaged(saved, capsys):
    path, model = saved
    later = STATE | {"position": replace(POSITION, step=6)}
    save_newest(path, {"model": model}, **later)
    assert Checkpoint.newest(path.parent).position.step == 6
    assert capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[:-100])
    for read, where in ((Checkpoint.newest, path.parent), (Checkpoint.to_continue, path)):
        checkpoint = read(where)
        assert (checkpoint.position.step, checkpoint.path.name) == (5, "checkpoint_previous.pth")
        assert "checkpoint_previous.pth, the one before it\n" in capsys.readouterr().err
    with pytest.raises(UserError):
        Checkpoint.load(path)
    path.unlink()
    assert Checkpoint.newest(path.parent).position.step == 5
    path.touch()
    path.with_name("checkpoint_previous.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"checkpoint\.pth: .*; nor .* before it: .*checkpoint_previous\.pth: [^\n]*$"):
        Checkpoint.newest(path.parent)


def test_a_folder_without_a_run_has_none(tmp_path):
    assert Checkpoint.newest(tmp_path) is None
    assert Checkpoint.newest(tmp_path / "missing") is None


def test_the_best_has_none_before_it(saved):
    best = saved[0].with_name("checkpoint_best.pth")
    save_newest(saved[0], {"model": saved[1]}, **STATE)
    best.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"checkpoint_best\.pth"):
        Checkpoint.to_continue(best)


@pytest.mark.parametrize("content", [b"", b"\x80", b"no checkpoint", b"PK\x03\x04 broken zip"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", "not a checkpoint")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "zero")
    done = threading.Event()

    def read():
        for name in ("pipe", "zero"):
            refused(tmp_path / name, r"cannot be read \(not a file but a folder, pipe or device\)")
        refused(tmp_path, r"cannot be read \((not a file but|Is a directory)")
        refused(tmp_path / "missing", r"cannot be read \(No such file or directory\)")
        done.set()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert done.wait(20)


def test_weights_alone_are_no_checkpoint(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", "not a checkpoint of these programs")


def test_foreign_objects_are_refused(tmp_path):
    torch.save({"epoch": 3, "args": Namespace(lr=1)}, tmp_path / "foreign.pth")
    refused(tmp_path / "foreign.pth", "not a checkpoint")


def test_a_setting_of_a_later_version_is_named(edit, saved):
    refused(edit(config=CONFIG.plain() | {"antigravity": True}), "made by a version .* a setting 'antigravity'")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("categories", ["car"]),
        ("categories", {1: "car"}),
        ("categories", {0: "background", 1: "car"}),
        ("categories", {1: "car", 2: 5}),
        ("category_ids", None),
        ("category_ids", {1: 3, 2: 3}),
        ("category_ids", {1: 3, 2: "90"}),
        ("num_classes", "3"),
        ("num_classes", 4),
        ("num_classes", 10**9),
        ("epoch", 1.5),
        ("epoch", True),
        ("epoch", -5),
        ("step", 8),
        ("iterations", 0),
        ("images_per_step", 1),
        ("sums", [{"loss": 1}]),
        ("sums", []),
        ("sums", [{"loss": 1.0}]),
        ("sums", [{"images": math.nan}]),
        ("skipped_steps", 0.5),
        ("skipped_steps", 8),
        ("seconds", -1.0),
        ("sums", {"loss": 0.1}),
        ("history", [3]),
        ("history", [{"epoch": 2}]),
        ("history", []),
        ("history", [{"epoch": 2}, {"epoch": 3}]),
        ("history", [{"epoch": 3, "AP": "0.5"}]),
        ("norm_eps", None),
        ("norm_eps", math.nan),
        ("versions", 3),
        ("model", None),
        ("model", {"weight": 3}),
        ("model", {3: torch.zeros(3)}),
        ("model", {"weight": torch.zeros(1).expand(10**12)}),
    ],
)
def test_an_entry_that_no_run_can_have_is_named(edit, name, value):
    entry = {"images_per_step": "sums", "model": ".*", "categories": "categor"}.get(name, name)
    refused(edit(**{name: value}), rf"cannot be read: its {entry}")


def test_a_position_beyond_the_last_epoch_is_named(edit):
    Checkpoint.load(edit(config=CONFIG.plain() | {"epochs": 5}))
    refused(edit(config=CONFIG.plain() | {"epochs": 4}), "cannot be read: its epoch must be one of the 4, got 4")
    Checkpoint.load(edit(step=0, sums=[], skipped_steps=0))


@pytest.mark.parametrize("name", ["history", "categories", "epoch", "model", "config", "num_classes"])
def test_what_cannot_even_be_written_is_refused(edit, name):
    nested: list = []
    for _ in range(400):
        nested = [nested]
    refused(edit(**{name: nested}), "")
    refused(edit(**{name: 10**5000}), "")


@pytest.mark.parametrize("config", [None, [], 5, {"data_path": 5}, {5: 3}])
def test_settings_of_another_type_are_no_settings(edit, config):
    refused(edit(config=config), "(its settings cannot be read|made by a version)")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", "x", "batch_size must be a whole number, got 'x'"),
        ("min_size", -3, "min_size must be at least 1, got -3"),
        ("epochs", 2.0, "epochs must be a whole number"),
        ("seed", True, "seed must be a whole number"),
        ("lr", math.inf, "lr must be at least 0, got inf"),
        ("lr", 10**400, "lr must be at least 0"),
        ("small", 1, "small must be true or false, got 1"),
        ("model", "yolo", "model must be one of libra_fasterrcnn, .*, libra_rpn, got 'yolo'"),
        ("model", None, "model must be a text, got None"),
        ("lr_steps", [3], "lr_steps must be a list"),
        ("lr_steps", (3, -1), "lr_steps must be at least 0, got -1"),
        ("weights", "a\0b", "weights must not have a zero byte"),
        ("trainable_backbone_layers", 7, "trainable_backbone_layers must be one of 0, 1"),
    ],
)
def test_a_setting_that_no_flag_makes_is_named(edit, name, value, message):
    refused(edit(config=CONFIG.plain() | {name: value}), f"its settings cannot be read: {message}")


def test_a_whole_number_is_a_number(edit):
    assert Checkpoint.load(edit(config=CONFIG.plain() | {"lr": 1})).config.training.lr == 1


def test_other_data_and_other_batches_are_refused_with_what_would_fit(saved, monkeypatch):
    checkpoint = Checkpoint.load(saved[0])
    split = Split(Path("train.json"), Path(), {3: "car", 90: "toothbrush"}, {}, {})

    def check(batch_size, accumulation_steps, processes, iterations=7, **more):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        values = {"batch_size": batch_size, "accumulation_steps": accumulation_steps, **more}
        checkpoint.check_data(split, Config.of(values), iterations)

    check(2, 2, 4)
    check(3, 1, 1, test_only=True)
    checkpoint.check_data(split)
    with pytest.raises(UserError, match=r"checkpoint\.pth: an epoch had 7 iterations, not 8"):
        check(16, 1, 1, iterations=8)
    for batching, message in (
        ((2, 1, 4), "4 processes of -b 2 make 8: pass --accumulation-steps 2"),
        ((6, 1, 1), "-b 6 of one process make 6: pass -b 4 --accumulation-steps 4"),
        ((5, 4, 4), "4 processes of -b 5 --accumulation-steps 4 make 80: pass -b 4 --accumulation-steps 1"),
        ((16, 1, 3), "3 processes of -b 16 make 48: the number of processes must divide 16"),
    ):
        with pytest.raises(UserError, match=f"made with 16 images a step; here {message}"):
            check(*batching)
    split.categories[90] = "comb"
    with pytest.raises(UserError, match=r"other categories than train\.json has, such as \(90, 'comb'\)"):
        check(16, 1, 1)


FAULT = {
    "cause": "loss is nan",
    "rank": 0,
    "images": [torch.rand(3, 4, 5)],
    "targets": [{"boxes": torch.zeros(1, 4), "labels": torch.tensor([2]), "image_id": 3}],
}


def test_a_step_that_was_left_out_is_kept(saved):
    path, model = saved
    assert Checkpoint.load(path).fault is None
    save(path, {"model": model}, **STATE, fault=FAULT)
    kept = Checkpoint.load(path)
    assert torch.equal(kept.fault["images"][0], FAULT["images"][0])
    assert kept.states.keys() == {"model"}


@pytest.mark.parametrize(
    "fault",
    [
        None,
        {**FAULT, "rank": "0"},
        {**FAULT, "images": []},
        {**FAULT, "images": [torch.rand(4, 5)]},
        {**FAULT, "images": [None]},
        {**FAULT, "targets": [3]},
        *({**FAULT, "targets": [FAULT["targets"][0] | {name: torch.zeros(2)}]} for name in FAULT["targets"][0]),
        {**FAULT, "targets": [FAULT["targets"][0] | {"labels": torch.tensor([3])}]},
        *({**FAULT, "targets": [FAULT["targets"][0] | {"proposals": bad}]} for bad in (None, torch.zeros(2))),
    ],
    ids=range(12),
)
def test_a_step_that_cannot_be_repeated_is_refused(edit, fault):
    refused(edit(fault=fault), "cannot be read: its fault ")


def make_parts(opt, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, TrainingConfig(opt=opt, lr=0.1, norm_weight_decay=0.0))
    return {"model": model, "optimizer": optimizer, "scaler": torch.amp.GradScaler("cpu")}


def step(parts):
    parts["optimizer"].zero_grad()
    generator = torch.Generator().manual_seed(3)
    loss = parts["model"](torch.rand(2, 3, 4, 4, generator=generator)).square().sum()
    parts["scaler"].scale(loss).backward()
    parts["scaler"].step(parts["optimizer"])
    parts["scaler"].update()


@pytest.mark.parametrize("opt", ["sgd", "sgd_nesterov", "adamw"])
@pytest.mark.parametrize("steps", [0, 4])
def test_a_restored_run_goes_on_bit_by_bit(tmp_path, opt, steps):
    parts, others = make_parts(opt), make_parts(opt, seed=1)
    for _ in range(steps):
        step(parts)
    save(tmp_path / "x.pth", parts, **STATE)
    Checkpoint.load(tmp_path / "x.pth").restore(others)
    for _ in range(3):
        step(parts)
        step(others)
    assert repr([part.state_dict() for part in parts.values()]) == repr([p.state_dict() for p in others.values()])
    for mine, other in zip(parts["model"].parameters(), others["model"].parameters(), strict=True):
        assert torch.equal(mine, other)


def test_the_way_of_computing_a_step_is_that_of_this_machine(tmp_path):
    parts, others = make_parts("sgd"), make_parts("sgd")
    for group in parts["optimizer"].param_groups:
        group["fused"] = False
    save(tmp_path / "x.pth", parts, **STATE)
    Checkpoint.load(tmp_path / "x.pth").restore(others)
    assert [group["fused"] for group in others["optimizer"].param_groups] == [True, True]


def in_group(**values):
    return lambda content: content["optimizer"]["param_groups"][0].update(values)


def in_state(index=0, **values):
    return lambda content: content["optimizer"]["state"][index].update(values)


SPOILED = {
    "momentum of another shape": (in_state(exp_avg=torch.zeros(2)), r"state\[0\].exp_avg has the shape \[2\], not"),
    "of another type": (in_state(exp_avg=torch.zeros(3, 3, 1, 1).double()), "exp_avg has the type torch.float64"),
    "no tensor": (in_state(exp_avg=3), "exp_avg is no tensor of plain numbers, but a int"),
    "not finite": (in_state(exp_avg=torch.full((3, 3, 1, 1), math.nan)), "exp_avg has values that are not finite"),
    "spread": (in_state(exp_avg=torch.zeros(1).expand(3, 3, 1, 1)), "exp_avg is no tensor of plain numbers"),
    "a step back": (in_state(step=torch.tensor(-1.0)), "step is -1.0"),
    "another entry": (in_state(extra=torch.zeros(1)), "an entry 'extra' that has no place"),
    "a missing entry": (lambda c: c["optimizer"]["state"][0].pop("step"), r"state\[0\] has no step"),
    "another parameter": (lambda c: c["optimizer"]["state"].update({7: {}}), "an entry 7, and there are 4 parameters"),
    "betas a text": (in_group(betas="ab"), r"param_groups\[0\].betas is 'ab', not a tuple of 2"),
    "other betas": (in_group(betas=(0.5, 0.999)), r"betas\[0\] is 0.5, not 0.9"),
    "lr not finite": (in_group(lr=math.inf), "lr is inf"),
    "lr a tensor": (in_group(lr=torch.tensor(0.1)), "lr is tensor"),
    "lr negative": (in_group(lr=-0.1), "lr is -0.1"),
    "other parameters": (in_group(params=[0]), "params is .0., not a list of 2"),
    "fewer groups": (lambda c: c["optimizer"]["param_groups"].pop(), "param_groups is .* not a list of 2"),
    "no groups": (lambda c: c["optimizer"].pop("param_groups"), "has no param_groups"),
    "no dict": (lambda c: c.update(optimizer=[]), "it is .., not a dict"),
    "none": (lambda c: c.pop("optimizer"), "holds no optimizer"),
    "another start": (in_group(initial_lr=0.2), "initial_lr is 0.2, not 0.1"),
    "scale 0": (lambda c: c["scaler"].update(scale=0.0), "scale is 0.0"),
    "scale beyond float32": (lambda c: c["scaler"].update(scale=1e39), r"scale is 1e\+39"),
    "tracker beyond int32": (lambda c: c["scaler"].update(_growth_tracker=2**31), "_growth_tracker is 2147483648"),
    "no scale": (lambda c: c["scaler"].pop("scale"), "has no scale"),
    "weights not finite": (lambda c: c["model"]["1.bias"].fill_(math.inf), "1.bias has values that are not finite"),
    "weights of another shape": (
        lambda c: c["model"].update({"1.bias": torch.zeros(6)}),
        r"the shape \[6\], not \[3\]",
    ),
    "weights missing": (lambda c: c["model"].pop("1.bias"), "has no 1.bias"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_states_that_do_not_fit_are_refused_in_one_line(tmp_path, name):
    parts = make_parts("adamw")
    step(parts)
    path = tmp_path / "x.pth"
    save(path, parts, **STATE)
    content = torch.load(path)
    spoil, message = SPOILED[name]
    spoil(content)
    torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint.load(path).restore(make_parts("adamw"))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
