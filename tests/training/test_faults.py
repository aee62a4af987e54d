"""Steps whose numbers go wrong: left out on the device, told a step later, and as if they had never been."""

import json
import math
import re

import pytest
import torch

from balanced_learning.training import optimization
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.run import Run
from balanced_learning.training.step import Stepper
from tests.training.toy import (
    assert_same,
    at_steps,
    rows,
    spoil_gradient,
    spoil_image,
    spoil_loss,
    spoil_target,
    start,
    state_of,
    stumble,
    toy_options,
)


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Two epochs of three steps."""
    return toy_options(tmp_path, monkeypatch.setattr, "-b", 2, "--ema", 0.5, "--output-dir", tmp_path / "run")


@pytest.fixture
def error(capsys):
    """Runs the program, which must end with an error, and returns its one line."""

    def run(*given):
        with pytest.raises(SystemExit) as caught:
            start(*given)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


def without(*numbers):
    """In place of ``Stepper.__call__``: does nothing in these steps of the run, counted from 0."""
    take, calls = Stepper.__call__, iter(range(10**6))

    def chosen(self, batch):
        if next(calls) not in numbers:
            return take(self, batch)
        self.run.scheduler.step()
        self.run.step += 1
        return None

    return chosen


def counted(state):
    """The state, and the numbers of steps that were left out, taken out of it."""
    numbers = [row.pop("skipped_steps", 0) for row in state["history"]]
    return state | {"skipped_steps": 0}, numbers


@pytest.mark.parametrize(
    ("spoil", "steps", "more"),
    [
        (spoil_image, [0], []),
        (spoil_target, [1], []),
        (stumble, [2], []),  # the last of the epoch
        (spoil_gradient, [5], []),  # and of all
        (spoil_loss, [0, 4], []),
        (spoil_image, [0, 1], []),
        (spoil_image, [0, 1, 2], []),
        (stumble, [2, 3], []),
        (spoil_gradient, [0, 3], ["--opt", "adamw"]),
        (spoil_image, [1], ["--opt", "sgd_nesterov", "--accumulation-steps", 2, "-b", 1]),
        (spoil_target, [0, 4], ["--amp", "bf16", "--momentum", 0]),
    ],
)
def test_a_step_that_goes_wrong_is_as_if_it_had_never_been(options, tmp_path, monkeypatch, capsys, spoil, steps, more):
    parts = 2 if "-b" in more else 1
    start([*options, *more], at_steps(*(parts * step for step in steps), do=spoil))
    warned = capsys.readouterr().err
    monkeypatch.setattr(Stepper, "__call__", without(*steps))
    start([*options, *more, "--output-dir", tmp_path / "without"])
    found, numbers = counted(state_of(tmp_path / "run/checkpoint.pth"))
    assert numbers == [sum(step // 3 == epoch for step in steps) for epoch in (0, 1)]
    assert_same(found, state_of(tmp_path / "without/checkpoint.pth"))
    assert [row.get("skipped_steps", 0) for row in rows(tmp_path / "run")] == numbers
    told = re.findall(r"^warning: step (\d) of epoch (\d) is left out: (.*)$", warned, re.MULTILINE)
    assert [3 * int(epoch) + int(step) for step, epoch, _ in told] == steps
    cause = {
        spoil_image: "loss_width is nan on process 0, images ",
        spoil_loss: "loss_width is nan on process 0, images ",
        spoil_target: "loss_width is inf on process 0, images ",
        stumble: "ious[0] has a NaN at index 3 is nan on process 0, images ",
        spoil_gradient: "the gradient of head.bias is not finite over all processes, images ",
    }[spoil]
    for *_, text in told:
        assert text.startswith(cause)
        images = re.findall(r"(\d) \((\d)\.png\)", text)
        assert len(images) == 2
        assert all(image_id == file for image_id, file in images)
        assert f" in {tmp_path}/data/train2017" in text


def test_images_that_lie_elsewhere_are_named_whole(options, tmp_path, capsys):
    """As the absolute names of exporters have them."""
    json_file = tmp_path / "data/annotations/instances_train2017.json"
    content = json.loads(json_file.read_text())
    (tmp_path / "data/train2017").rename(tmp_path / "elsewhere")
    (tmp_path / "data/train2017").mkdir()
    for image in content["images"]:
        image["file_name"] = f"{tmp_path}/elsewhere/{image['file_name']}"
    json_file.write_text(json.dumps(content))
    start(options, at_steps(1, do=spoil_image))
    assert re.search(rf"images (\d) \({tmp_path}/elsewhere/\1\.png\), ", capsys.readouterr().err)
    assert rows(tmp_path / "run")[0]["skipped_steps"] == 1


def test_steps_of_three_epochs_are_kept(options, tmp_path, capsys):
    start([*options, "--epochs", 5], at_steps(0, 3, 6, 9, 10, 12, do=spoil_image))
    assert sorted(file.name for file in (tmp_path / "run").glob("skipped_*")) == [f"skipped_0{n}.pth" for n in range(3)]
    told = capsys.readouterr().err.splitlines()
    assert ["--replay" in line for line in told] == [True] * 3 + [False] * 3


def test_the_limit_ends_the_run_and_keeps_the_last_checkpoint(options, tmp_path, error, capsys):
    start([*options, "--epochs", 1])
    before = (tmp_path / "run/checkpoint.pth").read_bytes()
    line = error([*options, "--resume", "auto", "--max-skipped-steps", 1], at_steps(0, 1, do=spoil_image))
    assert line.startswith("error: training diverged: more than --max-skipped-steps 1 of epoch 1 are left out; ")
    assert (tmp_path / "run/checkpoint.pth").read_bytes() == before
    start([*options, "--resume", "auto", "--max-skipped-steps", 2], at_steps(0, 1, do=spoil_image))
    assert rows(tmp_path / "run")[1]["skipped_steps"] == 2


def test_weights_are_finite_in_every_checkpoint(options, tmp_path):
    start(options, at_steps(0, 2, 5, do=spoil_image))
    for file in (tmp_path / "run").glob("*.pth"):
        content = torch.load(file)
        values = [*content["model"].values(), *content["ema"].values()]
        values += [tensor for state in content["optimizer"]["state"].values() for tensor in state.values()]
        assert all(value.isfinite().all() for value in values), file


def test_no_good_checkpoint_makes_room_for_weights_after_which_a_step_went_wrong(options, tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(Run, "save", lambda run: places.append((run.epoch, run.step)))
    start([*options, "--checkpoint-steps", 1], at_steps(1, 3, do=spoil_image))
    assert places == [(0, 1), (0, 3), (1, 0), (1, 2), (1, 3), (2, 0)]


def test_what_is_kept_of_a_step_is_no_checkpoint_to_go_on_from(options, tmp_path, error):
    start([*options, "--epochs", 1], at_steps(1, do=spoil_image))
    kept = tmp_path / "run" / "skipped_00.pth"
    assert error(["--resume", kept]) == f"error: --resume {kept}: kept of a step that was left out; --replay repeats it"


def test_what_is_replayed_goes_wrong_again(options, tmp_path, capsys):
    for spoil, told in (
        (spoil_image, "the first output that is not finite is that of backbone.0"),
        (spoil_target, "loss_width inf"),
    ):
        folder = tmp_path / spoil.__name__
        start([*options, "--epochs", 1, "--output-dir", folder], at_steps(1, 2, do=spoil))
        kept = folder / "skipped_00.pth"
        assert capsys.readouterr().err.count(f"--replay {kept} repeats it") == 1
        start(["--replay", kept, "--device", "cpu"])
        said = capsys.readouterr().out
        assert "step 1 of epoch 0, process 0; in the run, loss_width is" in said
        assert told in said
        assert f"images {Checkpoint.load(kept).fault['targets'][0]['image_id']}" not in said  # a list of both
        assert sorted(file.name for file in folder.glob("skipped*")) == ["skipped_00.pth"]


def test_what_is_no_step_to_replay_is_told_in_a_line(options, tmp_path, error):
    start([*options, "--epochs", 1], at_steps(1, do=spoil_image))
    kept, usual = (tmp_path / "run" / name for name in ("skipped_00.pth", "checkpoint.pth"))
    assert error(["--replay", usual]) == f"error: --replay {usual}: a checkpoint, but not of a step that was left out"
    kept.write_bytes(kept.read_bytes()[:-100])
    assert error(["--replay", kept]).startswith(f"error: {kept}: ")
    assert error(["--replay", tmp_path / "none"]) == f"error: --replay {tmp_path}/none: no such file"
    assert error(["--replay", tmp_path]).startswith(f"error: {tmp_path}: cannot be read")


@pytest.fixture
def scaled(monkeypatch):
    """Lets float16 begin with another scale of the loss."""

    def begin(scale):
        class Scaler(torch.amp.GradScaler):
            def __init__(self, device, enabled):
                super().__init__(device, init_scale=scale, enabled=enabled)

        monkeypatch.setattr(optimization.torch.amp, "GradScaler", Scaler)

    return begin


def test_what_float16_scales_too_much_is_no_fault(options, tmp_path, scaled, capsys):
    scaled(2.0**60)
    start([*options, "--amp", "fp16"])
    assert capsys.readouterr().err == ""
    assert "skipped_steps" not in rows(tmp_path / "run")[0]
    assert torch.load(tmp_path / "run/checkpoint.pth")["scaler"]["scale"] == 2.0**54


def test_what_float16_cannot_scale_is_one(options, error, scaled):
    scaled(4.0)
    line = error([*options, "--amp", "fp16", "--max-skipped-steps", 2], at_steps(*range(9), do=spoil_gradient))
    assert "more than --max-skipped-steps 2 of epoch 1 are left out" in line


def test_torch_leaves_chance_in_the_momentum_of_a_first_step_that_is_left_out():
    """Why the optimizer's states are made beforehand; if this fails, they need not be."""
    seen = []
    for _ in range(50):
        weight = torch.nn.Parameter(torch.ones(1000))
        weight.grad = torch.full((1000,), math.inf)
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
        optimizer.found_inf = torch.ones(())
        dirt = torch.full((1000,), 7.0)
        del dirt
        optimizer.step()
        seen.append(optimizer.state[weight]["momentum_buffer"])
    assert any(buffer.ne(0).any() for buffer in seen)
