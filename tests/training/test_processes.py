"""One, two and three processes on gloo: the same gradients, the same evaluation, the same faults, the same order."""

import os
import re

import pytest
import torch

from balanced_learning.training import distributed
from balanced_learning.training.data.batching import share_of
from balanced_learning.training.step import Stepper
from tests.training.test_step import batch_of, make_run
from tests.training.toy import (
    assert_same,
    at_steps,
    rows,
    run_processes,
    spoil_image,
    start,
    state_of,
    toy_options,
)


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Two epochs of two steps of four images."""
    return toy_options(tmp_path, monkeypatch.setattr, "--ema", 0.5, "--output-dir", tmp_path / "run", train=8)


def learn(file):
    """Two steps of a detector on the process's share of five images."""
    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    distributed.start("cpu", f"file://{file}.store?rank={rank}&world_size={world_size}")  # the port is for what follows
    run = make_run(batch_size=1, accumulation_steps=5)
    stepper = Stepper(run, pytest.fail)
    whole = batch_of(5)
    share = share_of(list(range(5)), distributed.rank(), distributed.world_size())
    stepper(whole._replace(images=[whole.images[i] for i in share], targets=[whole.targets[i] for i in share]))
    gradient = torch.cat([parameter.grad.flatten() for parameter in run.model.parameters()])
    stepper(whole._replace(images=[whole.images[i] for i in share], targets=[whole.targets[i] for i in share]))
    stepper.finish()
    means = run.means()
    if distributed.is_main():
        torch.save((gradient, means), file)
    distributed.stop()


def learn_and_evaluate(file, options):
    learn(file)
    start(options)


def test_all_numbers_of_processes_learn_and_evaluate_the_same(options, tmp_path):
    start([*options, "-b", 4])
    found = []
    for world_size in (1, 2, 3):
        out = tmp_path / str(world_size)
        tests = [*options, "--test-only", "--resume", tmp_path / "run/checkpoint.pth", "--output-dir", out]
        outcomes = run_processes(world_size, out, learn_and_evaluate, out / "learned", tests)
        assert [(outcome.code, outcome.err.count("Error")) for outcome in outcomes] == [(0, 0)] * world_size
        found.append((torch.load(out / "learned"), (out / "evaluation_test.json").read_bytes()))
    ((gradient, means), evaluation), *others = found
    for (other_gradient, other_means), other_evaluation in others:
        assert (other_gradient - gradient).norm() < 1e-6 * gradient.norm()
        assert other_means == pytest.approx(means, rel=1e-6)
        assert other_evaluation == evaluation


def spoil_one(options):
    start(options, at_steps(0, 2, do=spoil_image) if os.environ["RANK"] == "1" else None)


def skip(options):
    take, calls = Stepper.__call__, iter(range(100))

    def chosen(self, batch):
        if next(calls) not in (0, 2):
            return take(self, batch)
        self.run.scheduler.step()
        self.run.step += 1
        return None

    Stepper.__call__ = chosen
    start(options)


def test_numbers_that_go_wrong_on_one_process_are_left_out_on_all(options, tmp_path):
    options = [*options, "-b", 2]
    main, other = run_processes(2, tmp_path / "0", spoil_one, options)
    assert (main.code, other.code) == (0, 0)
    told = re.findall(r"warning: step (\d) of epoch (\d) is left out: loss_width is nan on process 1, images", main.err)
    assert told == [("0", "0"), ("0", "1")]
    assert other.err == ""
    state = state_of(tmp_path / "run/checkpoint.pth")
    assert [row.pop("skipped_steps") for row in state["history"]] == [1, 1]
    run_processes(2, tmp_path / "1", skip, [*options, "--output-dir", tmp_path / "without"])
    assert_same(state, state_of(tmp_path / "without/checkpoint.pth"))

    limited = [*options, "--max-skipped-steps", 0, "--output-dir", tmp_path / "limited"]
    main, other = run_processes(2, tmp_path / "2", spoil_one, limited)
    assert (main.code, other.code) == (1, 1)
    assert "error: training diverged: more than --max-skipped-steps 0 of epoch 0 are left out" in main.err
    assert other.err == ""
    assert (tmp_path / "limited/skipped_00.pth").exists()


def record(options, folder):
    seen = []

    def before(_, images, targets):
        seen.append([(target["image_id"], image.sum().item()) for image, target in zip(images, targets, strict=True)])

    start(options, before)
    torch.save(seen, folder / os.environ["RANK"])


def images_of(world_size, folder, options):
    """The images of each step, as the processes together saw them."""
    assert {outcome.code for outcome in run_processes(world_size, folder, record, options, folder)} == {0}
    shares = [torch.load(folder / str(rank)) for rank in range(world_size)]
    return [[image for part in parts for image in part] for parts in zip(*shares, strict=True)]


def test_a_run_goes_on_with_another_number_of_processes(options, tmp_path, capsys):
    whole = images_of(1, tmp_path / "0", [*options, "-b", 4, "--output-dir", tmp_path / "whole"])
    assert len(whole) == 4
    for first, then in ((2, 1), (1, 2)):
        folder = tmp_path / f"run{first}"
        at = ["--output-dir", folder, "--resume", "auto"]
        begun = images_of(first, tmp_path / f"{first}a", [*options, *at, "-b", 4 // first, "--epochs", 1])
        with pytest.raises(SystemExit) as caught:
            start([*options, *at, "-b", 3])
        refused = str(caught.value)
        assert "made with 4 images a step; here -b 3 of one process make 3: pass -b 2 --accumulation-steps 2" in refused
        rest = images_of(then, tmp_path / f"{first}b", [*options, *at, "-b", 4 // then])
        assert begun + rest == whole
        assert [row["epoch"] for row in rows(folder)] == [0, 1]


def test_an_image_that_cannot_be_read_is_told_of_and_counted_once(options, tmp_path):
    """Both processes meet it, in two epochs; with ``--strict-data`` the first that does ends both."""
    file = tmp_path / "data" / "train2017" / "3.png"
    content = file.read_bytes()
    file.write_bytes(content[:60] + content[-12:])  # header and end are whole, so the check before training passes
    options = [*options, "-b", 2, "--epochs", 4]
    main, other = run_processes(2, tmp_path / "0", start, [*options, "--max-unreadable", 1])
    assert (main.code, other.code) == (0, 0)
    assert re.match(f"warning: {file} is unreadable [^\n]*\n$", main.err)
    assert other.err == ""
    outcomes = run_processes(2, tmp_path / "1", start, [*options, "--strict-data", "--output-dir", tmp_path / "strict"])
    assert [outcome.code for outcome in outcomes] == [1, 1]
    first, second = sorted((outcome.err for outcome in outcomes), key=lambda text: "is unreadable" not in text)
    assert re.match(f"error: {file} is unreadable [^\n]*\n$", first)
    assert re.match(r"error: process \d has lost another one[^\n]*\n$", second)
