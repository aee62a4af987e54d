"""What a long run can be asked for: averages, an early end, saving in between, going on, trying things out."""

import json
import os
import re
import signal

import pytest
import torch
from PIL import Image

from balanced_learning.training import checkpoint, dry_run, optimization, step
from balanced_learning.training.errors import UserError
from balanced_learning.training.reporting import reports
from examples import train_torchvision_libra
from tests.training.small import scripted
from tests.training.toy import (
    Toy,
    assert_same,
    at_steps,
    rows,
    run_processes,
    start,
    state_of,
    stumble,
    toy_options,
)


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Two epochs of three steps."""
    return toy_options(tmp_path, monkeypatch.setattr, "-b", 2, "--output-dir", tmp_path / "run")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_the_average_is_saved_evaluated_and_gone_on_with(options, folder, tmp_path, monkeypatch):
    weights = []

    def update(model, *given):
        norm = optimization.update(model, *given)
        weights.append({name: p.detach().double() for name, p in model.named_parameters()})
        return norm

    monkeypatch.setattr(step, "update", update)
    start([*options, "--ema", 0.8])
    expected = weights[0]
    for after in weights[1:]:
        expected = {name: 0.8 * value + 0.2 * after[name] for name, value in expected.items()}
    state = state_of(folder / "checkpoint.pth")
    for name, value in expected.items():
        torch.testing.assert_close(state["ema"][f"module.{name}"].double(), value, rtol=1e-5, atol=1e-6)
    assert state["ema"]["n_averaged"] == 6
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(state["ema"][f"module.backbone.1.{name}"], state["model"][f"backbone.1.{name}"])

    start([*options, "--test-only", "--resume", folder / "checkpoint.pth", "--output-dir", tmp_path / "test"])
    tested = json.loads((tmp_path / "test/evaluation_test.json").read_text())
    assert rows(folder)[-1]["AP"] == tested["AP"]
    content = torch.load(folder / "checkpoint.pth")
    content.pop("ema")
    torch.save(content, tmp_path / "weights.pth")
    start([*options, "--test-only", "--resume", tmp_path / "weights.pth", "--output-dir", tmp_path / "test"])
    assert json.loads((tmp_path / "test/evaluation_test.json").read_text())["AP"] != tested["AP"]

    parts = [*options, "--ema", 0.8, "--output-dir", tmp_path / "parts"]
    start([*parts, "--epochs", 1])
    start([*parts, "--resume", "auto"])
    assert_same(state_of(tmp_path / "parts/checkpoint.pth"), state)


def test_patience_ends_the_run_also_when_it_is_resumed(options, folder, monkeypatch, capsys):
    monkeypatch.setattr(train_torchvision_libra, "evaluate_detections", scripted(0.4, 0.5, 0.5, 0.3, 0.1, 0.2))
    options = [*options, "--patience", 2, "--epochs", 9]
    start(options)
    assert [row["AP"] for row in rows(folder)] == [0.4, 0.5, 0.5, 0.3]
    saved = (folder / "checkpoint.pth").read_bytes()
    for epochs in (9, 12):
        capsys.readouterr()
        start([*options, "--resume", "auto", "--epochs", epochs])
        said = f"{folder}/checkpoint.pth: over, for AP has not grown in 2 evaluations, and --patience allows no more\n"
        assert said in capsys.readouterr().out
        assert (folder / "checkpoint.pth").read_bytes() == saved
    start([*options, "--resume", "auto", "--patience", 4])
    assert [row["AP"] for row in rows(folder)] == [0.4, 0.5, 0.5, 0.3, 0.1, 0.2]


@pytest.mark.parametrize("aps", [(0.5, 0.4, 0.3), (0.4, 0.5, 0.3)])
def test_epochs_that_are_not_evaluated_have_no_metrics_and_are_not_the_best(
    aps, options, folder, tmp_path, monkeypatch
):
    start([*options, "--epochs", 5])
    everything = state_of(folder / "checkpoint.pth")
    monkeypatch.setattr(train_torchvision_libra, "evaluate_detections", scripted(*aps))
    few = [*options, "--eval-interval", 2, "--output-dir", tmp_path / "few", "--patience", 2]
    with pytest.raises(SystemExit):  # in the epoch behind the first evaluation
        start([*few, "--epochs", 5], at_steps(8, do=lambda *_: os.kill(os.getpid(), signal.SIGTERM)))
    start([*few, "--epochs", 5, "--resume", "auto"])
    assert [row.get("AP") for row in rows(tmp_path / "few")] == [None, aps[0], None, aps[1], aps[2]]
    assert [path.name for path in sorted((tmp_path / "few").glob("evaluation_*.json"))] == [
        f"evaluation_{epoch:02}.json" for epoch in (1, 3, 4)
    ]
    best = torch.load(tmp_path / "few" / "checkpoint_best.pth", weights_only=True)
    assert best["epoch"] == 2 * aps.index(0.5) + 2
    assert_same(state_of(tmp_path / "few" / "checkpoint.pth")["model"], everything["model"])


def test_auto_starts_goes_on_and_ends(options, folder, capsys):
    auto = [*options, "--resume", "auto"]
    start([*auto, "--epochs", 1])
    assert "goes on" not in capsys.readouterr().out
    start(auto)
    assert f"{folder}/checkpoint.pth: goes on in epoch 1 after 0 of 3 steps, to 2 epochs\n" in capsys.readouterr().out
    saved = (folder / "checkpoint.pth").read_bytes()
    start(auto)
    assert f"{folder}/checkpoint.pth: all 2 epochs are trained\n" in capsys.readouterr().out
    assert (folder / "checkpoint.pth").read_bytes() == saved
    assert [row["epoch"] for row in rows(folder)] == [0, 1]
    with pytest.raises(SystemExit, match="error: --resume auto: pass the folder that it is to look in, --output-dir"):
        start([*options[:-2], "--resume", "auto"])


@pytest.mark.parametrize("content", [None, "", "half a ro", '{"epoch": 0}\n{"epoch": 1}\n{"epoch": 7}\n'])
def test_metrics_are_repaired_before_anything_is_trained(options, folder, content):
    start([*options, "--epochs", 1])
    whole = (folder / "metrics.jsonl").read_text()
    if content is None:
        (folder / "metrics.jsonl").unlink()
    else:
        (folder / "metrics.jsonl").write_text(content)
    seen = []
    start(
        [*options, "--resume", "auto"], at_steps(0, do=lambda *_: seen.append((folder / "metrics.jsonl").read_text()))
    )
    assert seen == [whole]
    assert [row["epoch"] for row in rows(folder)] == [0, 1]


@pytest.mark.parametrize(
    ("flags", "between"),
    [
        ([], []),
        (["--checkpoint-steps", 2], [(0, 2), (1, 1)]),
        (["--checkpoint-steps", 1], [(0, 1), (0, 2), (1, 1), (1, 2)]),
        (["--checkpoint-minutes", 0], [(0, 1), (0, 2), (1, 1), (1, 2)]),
        (["--checkpoint-minutes", 60], []),
    ],
)
def test_checkpoints_are_written_when_they_are_due(options, folder, monkeypatch, flags, between):
    saved, save = [], checkpoint.torch.save

    def record(content, file):
        saved.append((content["epoch"], content["step"]))
        save(content, file)

    monkeypatch.setattr(checkpoint.torch, "save", record)
    monkeypatch.setattr(train_torchvision_libra, "evaluate_detections", scripted(0.2, 0.1))
    start([*options, *flags])
    best = [(1, 0)]
    assert sorted(saved) == sorted([*between, (0, 3), (1, 0), (1, 3), (2, 0), *best])
    assert torch.load(folder / "checkpoint_previous.pth")["step"] == 3


def test_a_run_goes_on_from_any_step(options, folder, tmp_path):
    """Also with the channels last, with accumulation, and with what else keeps a state."""
    options = [*options, "--channels-last", "--accumulation-steps", 2, "-b", 1, "--opt", "adamw", "--ema", 0.5]
    start(options)
    whole = state_of(folder / "checkpoint.pth")
    parts = [*options, "--output-dir", tmp_path / "parts", "--checkpoint-steps", 1, "--resume", "auto"]
    for number in (2, 3, 4):  # parts of steps, each in the second step of the process
        with pytest.raises(RuntimeError, match="killed"):
            start(parts, at_steps(number, do=kill))
        assert state_of(tmp_path / "parts/checkpoint.pth")["step"] > 0
    start(parts)
    assert_same(state_of(tmp_path / "parts/checkpoint.pth"), whole)
    weight = torch.load(folder / "checkpoint.pth")["model"]["backbone.0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)


def kill(*_):
    raise RuntimeError("killed")


def test_a_later_start_epoch_advances_the_schedule(options, folder):
    start([*options, "--epochs", 3, "--lr-steps", 1, 2])
    assert [row["lr"] for row in rows(folder)] == pytest.approx([0.05, 0.005, 0.0005])
    later = [*options, "--epochs", 3, "--lr-steps", 1, 2, "--start-epoch", 1, "--output-dir", folder.parent / "later"]
    start(later)
    assert [(row["epoch"], row["lr"]) for row in rows(folder.parent / "later")] == [
        (1, pytest.approx(0.005)),
        (2, pytest.approx(0.0005)),
    ]


def test_batches_can_be_limited(options, folder, monkeypatch):
    evaluated = []

    def evaluate(split, detections, *_, **__):
        evaluated.append(([image["id"] for image in split.images], sorted(detections)))
        return scripted(0.5)()

    monkeypatch.setattr(train_torchvision_libra, "evaluate_detections", evaluate)
    start([*options, "--limit-batches", 2])
    assert evaluated == [([7, 8], [7, 8])] * 2
    assert torch.load(folder / "checkpoint.pth")["iterations"] == 2


def test_the_log_tells_the_speed_and_what_is_waited_for(options, capsys):
    start([*options, "--print-freq", 1])
    said = capsys.readouterr().out
    line = (
        r"epoch 0 \[3/3\]  eta 0:00:00  lr 0.05\d*  loss_width [\d.e-]+  loss_chance [\d.e-]+  loss [\d.e-]+  "
        r"[\d.e+]+ images/s  \d+ % waiting for data\n"
    )
    assert re.search(line, said)
    assert re.search(r"evaluation \[3/3\].* images/s  \d+ % waiting for data\n", said)
    assert re.search(r"epoch 0 \[1/3\]  eta 0:00:\d\d  lr 0.05  loss_width", said)


def test_all_steps_of_an_epoch_may_be_left_out(options, folder):
    start([*options, "--epochs", 1], at_steps(0, 1, 2, do=stumble))
    (row,) = rows(folder)
    assert row["skipped_steps"] == 3
    assert "loss" not in row


def test_tensorboard_gets_pictures_and_each_row_once(options, folder, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(
        train_torchvision_libra, "save_evaluation", lambda file, *_: Image.new("RGB", (8, 6), "red").save(file)
    )
    options = [*options, "--tensorboard", "--checkpoint-steps", 1]
    with pytest.raises(RuntimeError, match="killed"):
        start([*options, "--epochs", 3], at_steps(4, do=kill))
    with pytest.raises(RuntimeError, match="killed"):
        start([*options, "--epochs", 3, "--resume", "auto"], at_steps(2, do=kill))
    start([*options, "--epochs", 3, "--resume", "auto"])
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("AP")] == [0, 1, 2]
    assert [event.step for event in events.Images("evaluation")] == [0, 1, 2]
    assert [event.value for event in events.Scalars("AP")] == pytest.approx([row["AP"] for row in rows(folder)])


@pytest.fixture
def _elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.mark.usefixtures("_elsewhere")
def test_a_dry_run_leaves_nothing(options, folder, capsys):
    start([*options, "--dry-run", "--resume", "auto"])
    said = capsys.readouterr().out
    assert said.endswith("dry run: all of it works; nothing is kept\n")
    assert os.listdir() == []
    assert not folder.exists()


@pytest.mark.usefixtures("_elsewhere")
def test_a_dry_run_that_fails_leaves_nothing(options, monkeypatch):
    for patched, do in ((Toy, None), (dry_run, "predict_files"), (reports, "write_rows")):
        with monkeypatch.context() as patch:
            if do:
                patch.setattr(patched, do, fail)
            with pytest.raises(SystemExit, match="error: out of luck"):
                start([*options, "--dry-run"], None if do else fail)
        assert os.listdir() == []


def fail(*_, **__):
    raise UserError("out of luck")


@pytest.mark.usefixtures("_elsewhere")
def test_two_processes_run_dry(options, tmp_path):
    outcomes = run_processes(2, tmp_path / "0", start, [*options, "--dry-run"])
    assert [(outcome.code, outcome.err) for outcome in outcomes] == [(0, "")] * 2
    assert "nothing is kept" in outcomes[0].out
    assert os.listdir() == []
