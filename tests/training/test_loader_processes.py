"""Loader processes beside real signals: they live while the main process needs them, and never longer."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch.utils.data import dataloader

from balanced_learning import _torch_private
from balanced_learning.training.data.batching import DetectionLoader, OneByOne
from balanced_learning.training.endings import ends_in_one_line

# Iterates over 40 batches that take their time, with two loader processes, whose ids it prints when they all work.
PROGRAM = """
import multiprocessing, os, signal, sys, time
import torch
from balanced_learning import _torch_private
from balanced_learning.training.data.batching import DetectionLoader, OneByOne

multiprocessing.set_start_method("forkserver")  # the default of Python 3.14

class Slow:
    def __getitems__(self, share):
        time.sleep(0.02)
        return torch.full((3,), share.indices[0])

def batches():
    for step, batch in enumerate(DetectionLoader(Slow(), OneByOne(40), 2, torch.device("cpu"))):
        assert batch.tolist() == [step] * 3
        if step == 5:
            print(*[process.pid for process in multiprocessing.active_children()], flush=True)
        yield step

"""

GOES_ON = """
asked = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))
steps = list(batches())
print(len(steps), multiprocessing.active_children(), sorted(set(asked)))
"""

STOPS_IN_THE_MIDDLE = """
kept = batches()
for step in kept:
    if step == 10:
        sys.exit(3)
"""

WAITS = """
for step in batches():
    time.sleep(0.5)
"""


class Numbers:
    """A data set of its own indices."""

    def __getitems__(self, share):
        return torch.tensor(share.indices)


def loader(count=20):
    return DetectionLoader(Numbers(), OneByOne(count), 2, torch.device("cpu"))


def is_alive(pid):
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.fixture
def program():
    """Starts the program with such an end, in a process group of its own, and returns it with its loaders' ids."""
    started = []

    def start(end):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM + end],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        loaders = [int(pid) for pid in process.stdout.readline().split()]
        assert len(loaders) == 2
        return process, loaders

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_signals_to_all_leave_the_loaders_to_the_main_process(program):
    process, loaders = program(GOES_ON)
    for number in (2, 10, 15):  # SIGINT, SIGUSR1, SIGTERM
        os.killpg(process.pid, number)
    out, err = process.communicate(timeout=300)
    assert (out, err) == ("40 [] [2, 10, 15]\n", "")
    assert process.returncode == 0
    assert not any(map(is_alive, loaders))


def test_signals_while_the_loaders_start_disturb_nothing():
    """Those that hit a new process before it has torch's handlers, and its own, too."""
    asked = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    sender = subprocess.Popen(
        [sys.executable, "-c", SENDER, str(os.getpid())], start_new_session=True, stdout=subprocess.PIPE
    )
    try:
        sender.stdout.readline()
        for _ in range(5):
            assert [batch.item() for batch in loader()] == list(range(20))
    finally:
        sender.kill()
        sender.communicate()
        signal.signal(signal.SIGTERM, before)
    assert asked
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert multiprocessing.active_children() == []


SENDER = """
import os, signal, sys, time
from pathlib import Path
print(flush=True)
main = sys.argv[1]
while True:
    for pid in [main, *Path(f"/proc/{main}/task/{main}/children").read_text().split()]:
        if int(pid) != os.getpid():
            try:
                os.kill(int(pid), signal.SIGTERM)
            except ProcessLookupError:
                pass
    time.sleep(0.001)
"""


def test_a_program_that_exits_in_the_middle_ends_at_once(program):
    process, loaders = program(STOPS_IN_THE_MIDDLE)
    assert process.communicate(timeout=300) == ("", "")
    assert process.returncode == 3
    assert not any(map(is_alive, loaders))


def test_loaders_of_a_killed_program_end_by_themselves(program):
    process, loaders = program(WAITS)
    process.kill()
    process.wait()
    end = time.monotonic() + 300
    while any(map(is_alive, loaders)):
        assert time.monotonic() < end
        time.sleep(0.1)


def leave_by_break():
    for _ in loader():
        break


def leave_by_error():
    with suppress(KeyError):
        for _ in loader():
            raise KeyError


def leave_by_close():
    batches = iter(loader())
    next(batches)
    batches.close()


def leave_by_exhaustion():
    assert len(list(loader(3))) == 3


LEAVINGS = [leave_by_break, leave_by_error, leave_by_close, leave_by_exhaustion]


@pytest.fixture
def killed(monkeypatch):
    """The processes that had to be killed."""
    processes = []
    kill = BaseProcess.kill
    monkeypatch.setattr(BaseProcess, "kill", lambda process: processes.append(process) or kill(process))
    return processes


@pytest.mark.parametrize("leave", LEAVINGS)
def test_no_loader_is_left_behind(leave, killed):
    leave()
    assert multiprocessing.active_children() == []
    assert not killed


@pytest.mark.parametrize("leave", LEAVINGS)
def test_no_loader_is_left_behind_where_torch_does_not_end_them_when_asked(leave, killed, monkeypatch):
    monkeypatch.setattr(_torch_private, "end_loading", lambda batches: None)
    leave()
    assert multiprocessing.active_children() == []
    assert not killed


class Faulty(Numbers):
    def __getitems__(self, share):
        raise TypeError(share)


def test_an_error_that_is_kept_keeps_no_loader(killed):
    with pytest.raises(TypeError) as kept:
        list(DetectionLoader(Faulty(), OneByOne(20), 2, torch.device("cpu")))
    assert multiprocessing.active_children() == []
    assert not killed
    assert kept.traceback


class Stuck(Numbers):
    def __init__(self):
        self.is_stuck = multiprocessing.Event()
        self.pid = multiprocessing.Value("i")

    def __getitems__(self, share):
        if share.step == 3:
            self.pid.value = os.getpid()
            self.is_stuck.set()
            signal.pause()
        return super().__getitems__(share)


def test_a_loader_that_is_stuck_is_killed(killed, monkeypatch):
    monkeypatch.setattr(dataloader._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    images = Stuck()
    batches = iter(DetectionLoader(images, OneByOne(20), 2, torch.device("cpu")))
    next(batches)
    assert images.is_stuck.wait(300)
    batches.close()
    assert multiprocessing.active_children() == []
    assert images.pid.value in [process.pid for process in killed]  # a slow machine has to kill the other, too


class Killed(Numbers):
    def __getitems__(self, share):
        if share.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(share)


def test_a_loader_that_is_killed_is_told_of_in_a_line(monkeypatch):
    """Whether the program waits for the process at the time, or does something else."""
    monkeypatch.setattr(dataloader._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)

    def load(pause):
        with ends_in_one_line():
            for _ in DetectionLoader(Killed(), OneByOne(20), 2, torch.device("cpu")):
                time.sleep(pause)

    for pause in (0, 0.5):
        with pytest.raises(SystemExit) as caught:
            load(pause)
        assert str(caught.value).startswith("error: a process that loads images was killed, most often because memory")
        assert multiprocessing.active_children() == []


class Many(Numbers):
    def __getitems__(self, share):
        return [torch.tensor(share.step) for _ in range(200)]


def test_tensors_may_be_more_than_the_files_that_a_shell_allows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert len(list(DetectionLoader(Many(), OneByOne(10), 2, torch.device("cpu")))) == 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
