"""Signals that end a run where it can go on from later."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from balanced_learning.training import distributed

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command is to be tried again

_ONE_INTERRUPT = 0.5  # seconds in which one Ctrl-C may come twice: from the terminal, and passed on by a launcher
# A scheduler's, Ctrl-C, SLURM's before the time is over, and that of a terminal which is closed.
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
SIGNALS = {getattr(signal, name) for name in _NAMES if hasattr(signal, name)}  # Windows lacks the last two


class Stopped(BaseException):  # not an Exception: those are caught wherever a broken file may raise one
    """A signal ended the program; the message says where it stands."""


class StopSignals:
    """The handler of SIGTERM, SIGINT, SIGUSR1 and, unless ``nohup`` has it ignored, SIGHUP inside its ``with`` block.

    The first one raises :class:`Stopped`; in a block of :meth:`deferred` it is only remembered as ``received``. A
    second SIGINT ends the process at once, whatever it is doing; other signals after the first change nothing.

    Args:
        is_last: whether the program has nothing else to do: then signals are ignored behind the block, so that none
            changes the exit code.
    """

    received: str | None = None

    def __init__(self, *, is_last: bool = False) -> None:
        self.is_last = is_last
        self._interrupted_at = math.inf
        self._is_deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS if not _is_nohup(number)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.is_last else handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the block end by itself: it has to look at ``received``."""
        before, self._is_deferred = self._is_deferred, True
        try:
            yield
        finally:
            self._is_deferred = before

    def stop_together(self) -> None:
        """Where all processes come by, raises :class:`Stopped` on all of them if one has received a signal."""
        for name in filter(None, distributed.gather(self.received)):
            raise Stopped(f"stopped by {name}; start it again")

    def _handle(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self._interrupted_at > _ONE_INTERRUPT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._interrupted_at = min(self._interrupted_at, now)
        if self.received is None:
            self.received = signal.Signals(number).name
            if not self._is_deferred:
                raise Stopped(f"stopped by {self.received}; start it again")


def _is_nohup(number: int) -> bool:
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
