"""Runs the training program, and ends it with this one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import IO

from balanced_learning.training.errors import UserError, printable
from balanced_learning.training.output_folder import LOCK, locked
from balanced_learning.training.reproduction import ends_with_parent
from balanced_learning.training.reproduction.plan import Job
from balanced_learning.training.signals import EXIT_CODE, Stopped, StopSignals

PATIENCE = 60.0  # seconds for a run that was told to end to do so
_PAUSE = 0.2


def run_job(job: Job, signals: StopSignals) -> str | None:
    """Does a job; returns the last line of its errors if it fails.

    The first signal that comes meanwhile is passed on to it.

    Raises:
        Stopped: if a signal has ended it.
    """
    _wait_for(job.folder)
    with signals.deferred():
        command = [sys.executable, "-I", ends_with_parent.__file__, f"{os.getpid()}", *job.command]
        # Detached from the terminal, it hears of Ctrl-C once, from here: torchrun takes the second one amiss.
        child = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)  # noqa: S603
        errors = _Errors(child.stderr)  # type: ignore[arg-type]
        is_told = False
        while child.poll() is None:
            if signals.received and not is_told:
                is_told = True
                # torchrun passes these on, and dies of others.
                child.send_signal(signal.SIGINT if signals.received == "SIGINT" else signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                child.wait(_PAUSE)
        last_line = errors.last_line()
    if signals.received or child.returncode == EXIT_CODE:
        raise Stopped(f"stopped by {signals.received or 'a signal'} in {job.title}; start it again to go on")
    return (last_line or f"exit code {child.returncode}") if child.returncode else None


def _wait_for(folder: Path) -> None:
    """Waits for a run that is still in the folder, for one whose starter was killed takes a while to end."""
    deadline = time.monotonic() + PATIENCE
    is_told = False
    while (folder / LOCK).exists() and time.monotonic() < deadline:
        try:
            with locked(folder):
                return
        except UserError as error:
            if not is_told:
                print(f"waiting: {error}", flush=True)
            is_told = True
        time.sleep(_PAUSE)


class _Errors:
    """Passes on what a program writes to standard error, and remembers its last lines."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lines: deque[str] = deque(maxlen=100)
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def _pass_on(self) -> None:
        for line in self._stream:
            text = line.decode(errors="replace")
            with suppress(OSError, ValueError):  # nobody may be there to read it, but it must be taken from the program
                print(text, end="", file=sys.stderr, flush=True)
            self._lines.append(text)

    def last_line(self) -> str:
        """The last line that names an error, or else the last one."""
        self._thread.join(timeout=5)  # of its loader processes one may hold the stream a little longer
        lines = [line.strip() for line in self._lines if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        return printable((errors or lines or [""])[-1])
