"""Processes that load data: deaf to the signals that are meant for the main one, and gone when it needs them no more.

A terminal and a batch system signal all processes of a group or job. The main process answers by finishing its step,
for which it needs its loaders.
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from typing import Any

from balanced_learning import _torch_private
from balanced_learning.training.errors import UserError
from balanced_learning.training.signals import SIGNALS

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


LOST = (
    "a process that loads images was killed, most often because memory ran out; fewer --workers need less. "
    "--resume auto goes on from the last checkpoint"
)


def is_of_lost_process(error: Exception) -> bool:
    """Whether torch raised it because a loader process died, which it does wherever the program is at the time."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def ignore_signals(worker: int) -> None:
    """Makes a loader process deaf; for the ``worker_init_fn`` of a ``DataLoader``."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # which also forgets those that are pending
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def loading(start: Callable[[], Iterator[Any]]) -> Generator[Any, None, None]:
    """Yields what the iterator of a ``DataLoader`` does, and ends its processes however that stops.

    That includes the end of the program: as they ignore SIGTERM, ``multiprocessing`` would wait for them for ever.

    Args:
        start: makes the iterator, and with it the processes.

    Raises:
        UserError: if one of the processes was killed.
    """
    _allow_open_files()
    before = multiprocessing.active_children()
    processes: list[Any] = []
    batches: Iterator[Any] = iter(())
    main = os.getpid()

    def end() -> None:
        nonlocal batches
        if os.getpid() != main:  # a copy that a fork made
            return
        _torch_private.end_loading(batches)
        batches = iter(())  # frees the other
        for process in processes:
            if process.is_alive():  # stuck, say in a file that cannot be reached
                process.kill()
                process.join()

    atexit.register(end)
    try:
        with _blocked_signals():  # in a new process, until it ignores them
            try:
                batches = start()
            finally:
                processes += [process for process in multiprocessing.active_children() if process not in before]
        try:
            yield from batches
        except (RuntimeError, OSError, EOFError):
            if processes and _is_one_killed(processes):
                raise UserError(LOST) from None
            raise
    finally:
        end()
        atexit.unregister(end)


def _is_one_killed(processes: list[Any]) -> bool:
    """Whether one has died; its connection breaks a moment before that can be seen."""
    ended = connection.wait([process.sentinel for process in processes], timeout=1)
    for process in processes:
        if process.sentinel in ended:
            process.join()
    return any(process.exitcode for process in processes)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _allow_open_files() -> None:
    """Raises the limit of open files to what the system grants: each tensor of a loader process is one in this one."""
    if resource:
        with suppress(OSError, ValueError):  # macOS grants less than it says
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
