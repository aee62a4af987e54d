"""Signals to the program: it saves and says so, wherever they come, and goes on as if there had been none."""

import os
import re
import signal
import sys
import threading
import time

import pytest

from balanced_learning.training import checkpoint
from balanced_learning.training.data import dataset, image_check
from balanced_learning.training.signals import EXIT_CODE, Stopped, StopSignals
from examples import train_torchvision_libra
from tests.training.toy import (
    Toy,
    assert_same,
    at_steps,
    rows,
    run_processes,
    start,
    state_of,
    toy_options,
    write_noise,
)

SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"]


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Two epochs of three steps."""
    return toy_options(tmp_path, monkeypatch.setattr, "-b", 2, "--ema", 0.5)


@pytest.fixture(autouse=True)
def terminal():
    """A terminal's handler of SIGHUP, where the tests run under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def whole(options, tmp_path):
    """The folder of a run without a signal."""
    start([*options, "--output-dir", tmp_path / "whole"])
    return tmp_path / "whole"


def send(name):
    return lambda *_: os.kill(os.getpid(), getattr(signal, name))


def calling(function, do, number=0):
    """The function, which calls ``do`` first at this call, counted from 0."""
    calls = iter(range(10**6))

    def called(*given, **more):
        if next(calls) == number:
            do()
        return function(*given, **more)

    return called


WHERE = {
    "the first step": lambda patch, do: patch(Toy, "before", at_steps(0, do=do)),
    "a step": lambda patch, do: patch(Toy, "before", at_steps(1, do=do)),
    "the last step": lambda patch, do: patch(Toy, "before", at_steps(2, do=do)),
    "the first step of the second epoch": lambda patch, do: patch(Toy, "before", at_steps(3, do=do)),
    "the evaluation": lambda patch, do: patch(Toy, "eval", calling(Toy.eval, do, 1)),
    "COCO's evaluation": lambda patch, do: patch(
        train_torchvision_libra,
        "evaluate_detections",
        calling(train_torchvision_libra.evaluate_detections, do),
    ),
    "saving": lambda patch, do: patch(checkpoint.torch, "save", calling(checkpoint.torch.save, do)),
    "loading a batch": lambda patch, do: patch(
        dataset.DetectionDataset, "__getitems__", calling(dataset.DetectionDataset.__getitems__, do, 1)
    ),
}


@pytest.mark.parametrize("where", WHERE)
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(options, whole, tmp_path, capsys, monkeypatch, where):
    name = SIGNALS[len(where) % 4]
    folder = tmp_path / "run"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        WHERE[where](patch.setattr, send(name))
        with pytest.raises(SystemExit) as caught:
            train_torchvision_libra.main([str(word) for word in [*options, "--output-dir", folder]])
    assert caught.value.code == EXIT_CODE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"stopped by {name} in epoch ")
    assert line.endswith(f"; go on with --resume {folder}/checkpoint.pth (exit code 75)")
    start([*options, "--output-dir", folder, "--resume", "auto"])
    assert_same(state_of(folder / "checkpoint.pth"), state_of(whole / "checkpoint.pth"))
    assert_same(rows(folder), rows(whole))


def test_a_signal_before_training_ends_it_in_a_line(options, tmp_path, capsys, monkeypatch):
    """In the check of images, in threads, of which those that have not begun never do."""
    seen = []

    def look(file, size):
        seen.append(file)
        if len(seen) == 3:
            send("SIGTERM")()
        time.sleep(0.01)
        return (32, 24), None

    monkeypatch.setattr(image_check, "check_file", look)
    monkeypatch.setattr(image_check, "_PIECE", 2)
    write_noise(tmp_path / "more", train=200)
    with pytest.raises(SystemExit) as caught:
        start([*options, "--data-path", tmp_path / "more", "--output-dir", tmp_path / "run"])
    assert caught.value.code == EXIT_CODE
    assert capsys.readouterr().err == "stopped by SIGTERM; start it again (exit code 75)\n"
    assert len(seen) < 150
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_are_as_before_when_the_program_ends():
    before = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]
    with StopSignals() as signals, signals.deferred():
        send("SIGUSR1")()
        assert signals.received == "SIGUSR1"
    with pytest.raises(Stopped, match="stopped by SIGTERM"), StopSignals():
        send("SIGTERM")()
    assert [signal.getsignal(getattr(signal, name)) for name in SIGNALS] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
    try:
        with StopSignals():
            send("SIGHUP")()
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    thread = threading.Thread(target=StopSignals().__enter__)  # where no handler can be set
    thread.start()
    thread.join()


def interrupt_twice(options):
    def interrupt(*_):
        send("SIGINT")()
        send("SIGINT")()  # at once: a launcher may pass a Ctrl-C on to processes that have had it
        print("still here", flush=True)
        time.sleep(1)
        send("SIGINT")()
        print("not here", flush=True)

    start(options, at_steps(1, do=interrupt))


def test_a_log_that_cannot_be_written_ends_no_run(options, whole, tmp_path):
    (outcome,) = run_processes(1, tmp_path, write_to_full_disk, [*options, "--output-dir", tmp_path / "run"])
    assert outcome.code == 0
    assert_same(rows(tmp_path / "run"), rows(whole))


def write_to_full_disk(options):
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open("/dev/full", os.O_WRONLY), stream.fileno())
    print("begins", flush=False)
    start(options)


def stop_one(options):
    start(options, at_steps(1, do=send("SIGUSR1")) if os.environ["RANK"] == "1" else None)


def test_a_second_interrupt_ends_the_process_at_once(options, tmp_path):
    (outcome,) = run_processes(1, tmp_path, interrupt_twice, [*options, "--output-dir", tmp_path / "run"])
    assert outcome.code == -signal.SIGINT
    assert outcome.out.endswith("still here\n")
    assert outcome.err == ""


def test_a_signal_to_one_of_two_processes_stops_both(options, tmp_path):
    options = [*options, "-b", 1, "-j", 1, "--output-dir"]
    assert [run.code for run in run_processes(2, tmp_path / "0", start, [*options, tmp_path / "whole"])] == [0, 0]
    main, other = run_processes(2, tmp_path / "1", stop_one, [*options, tmp_path / "run"])
    assert (main.code, other.code) == (EXIT_CODE, EXIT_CODE)
    assert re.match("stopped by a signal to another process in epoch 0 after [^\n]*\n$", main.err)
    assert (other.out, other.err) == ("", "")
    resumed = run_processes(2, tmp_path / "2", start, [*options, tmp_path / "run", "--resume", "auto"])
    assert [run.code for run in resumed] == [0, 0]
    assert_same(state_of(tmp_path / "run/checkpoint.pth"), state_of(tmp_path / "whole/checkpoint.pth"))
    assert_same(rows(tmp_path / "run"), rows(tmp_path / "whole"))
