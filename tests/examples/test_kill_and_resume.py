"""Runs that are killed at random moments end with the bits of those that are not: the benchmark, in short.

The processes are forks of one that has imported everything already, and torchrun is a few lines; the signals are real.
"""

import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from tests.training.ports import keep_port

KILLS = 10


def _train(log, flags, ranks):
    """The process that a run begins with."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of its loaders, as without the server
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    if ranks > 1:
        _start_ranks(ranks)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    from examples import train_torchvision_libra

    train_torchvision_libra.main(flags)


def _start_ranks(ranks):
    """Goes on as each of them, and waits for all. It passes signals on, and if one fails it stops the others."""
    kept = keep_port()
    about = {"MASTER_ADDR": "localhost", "MASTER_PORT": kept.getsockname()[1], "WORLD_SIZE": ranks}
    pids = []
    for rank in range(ranks):
        if not (pid := os.fork()):
            os.environ.update({name: str(value) for name, value in (about | {"RANK": rank}).items()})
            return
        pids.append(pid)

    def pass_on(number, _=None):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGALRM, lambda *_: pass_on(signal.SIGKILL))
    statuses = []
    while len(statuses) < ranks:
        statuses.append(os.wait()[1])
        if statuses[-1]:
            pass_on(signal.SIGTERM)
            signal.alarm(30)  # one that waits for the others to join does not hear
    os._exit(any(statuses))


class _Fork:
    def __init__(self, context, log, *arguments):
        log.touch()
        self._process = context.Process(target=_train, args=(log, *arguments))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode


@pytest.fixture
def kill_and_resume(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return import_module("kill_and_resume")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it finds processes in /proc")
def test_ten_kills_change_no_bit(tmp_path, monkeypatch, kill_and_resume):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["examples.train_torchvision_libra"])

    def start(kind, flags, log):
        return _Fork(context, log, flags, kind.processes)

    shorter = " --epochs 2 --lr-steps 1"
    kinds = {
        name: replace(kind, flags=kind.flags + shorter)
        for name, kind in kill_and_resume.KINDS.items()
        if name in ("two loaders, AdamW, EMA", "accumulation, fp16", "two processes")
    }
    # A run that a late kill left little of can end before its fourth: half as many runs would do, mostly.
    runs = kill_and_resume.Runs(tmp_path, seed=0, count=2 * len(kinds), kinds=kinds, kills=(4,), start=start)
    for name in kinds:
        runs.refer(name)
    outcomes = map(runs.kill, range(runs.count))
    kills = 0
    while kills < KILLS:
        outcome = next(outcomes)
        assert not outcome.failures
        kills += len(outcome.kills)
