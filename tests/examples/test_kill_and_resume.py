"""Runs that are killed at random moments end with the bits of those that are not: benchmarks/kill_and_resume.py, in short.

The processes are forks of one that has imported everything already. All else about them is real.
"""

import multiprocessing
import os
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path

import pytest

KILLS = 10


def _train(flags, log, ranks):
    """The main process of a run: the script, or in the place of torchrun what starts two of them."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    if ranks > 1:
        _launch(ranks)
    from examples import train_torchvision_libra

    train_torchvision_libra.main(flags)


def _launch(ranks):
    """Goes on as one of the processes that it starts. It passes signals on to them, and fails if one of them does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        about = {"MASTER_ADDR": "localhost", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": ranks}
    pids = []
    for rank in range(ranks):
        if not (pid := os.fork()):
            os.environ.update({name: str(value) for name, value in {**about, "RANK": rank, "LOCAL_RANK": rank}.items()})
            return
        pids.append(pid)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: [os.kill(pid, number) for pid in pids])
    failed = [pid for pid in pids if os.waitpid(os.wait()[0] and pid, 0)[1]]
    os._exit(bool(failed))
