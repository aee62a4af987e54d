"""Signals that end a run where it can go on from later."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command is to be tried again

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # a scheduler's, Ctrl-C, and SLURM's before the time is over


class Stopped(BaseException):  # no Exception, for those that a broken file raises are caught everywhere
    """A signal ended the program; the message says where it stands."""


class StopSignals:
    """The handler of SIGTERM, SIGINT and SIGUSR1 inside its ``with`` block.

    A signal raises :class:`Stopped`; in a block of :meth:`deferred` it is only remembered as ``received``. A second
    SIGINT ends the process at once, whatever it is doing.
    """

    received: str | None = None

    def __init__(self) -> None:
        self._is_deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the block end by itself: it has to look at ``received``."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def _handle(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number).name
        if not self._is_deferred:
            raise Stopped(f"stopped by {self.received}")
