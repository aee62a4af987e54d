"""Processes of a training run that are watched by what they print and write, and killed where they are."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "train_torchvision_libra.py"
PATIENCE = 60  # seconds until a process that was signalled must have ended, and what it started, too

_POLL = 0.005  # seconds
_PROGRESS = re.compile(r"^(epoch|evaluation)[ \d]*\[ *(\d+)/(\d+)\]", re.MULTILINE)


@dataclass(frozen=True)
class Kind:
    """A way to run the training script.

    Attributes:
        flags: of the script, in one line.
        processes: that torchrun starts; 1: there is no torchrun.
        restarts: of torchrun, after a process that failed.
    """

    flags: str
    processes: int = 1
    restarts: int = 0

    def command(self, flags: Sequence[str]) -> list[str]:
        """The command line, with these flags."""
        launch = []
        if self.processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
            launch += ["--max-restarts", str(self.restarts)] if self.restarts else []
        return [sys.executable, *launch, str(SCRIPT), *flags]


class Process(Protocol):
    pid: int

    def poll(self) -> int | None: ...


Start = Callable[[Kind, list[str], Path], Process]  # kind, flags, and the file that gets what is printed


def start_command(kind: Kind, flags: list[str], log: Path) -> Process:
    """Starts a run as one would type it, in a process group of its own."""
    with log.open("wb") as file:
        return subprocess.Popen(
            kind.command(flags), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


@dataclass(frozen=True)
class Moment:
    """A moment of a run.

    Attributes:
        lines: of progress that are printed by then.
        delay: seconds after the last of them.
        saves: if not 0, as many files after the lines, while the last of them is written.
    """

    lines: int
    delay: float = 0.0
    saves: int = 0


@dataclass
class Watched:
    """A process with the file that it prints to and the folder that it writes to."""

    process: Process
    log: Path
    folder: Path

    def progress(self) -> list[tuple[str, bool]]:
        """The kinds of the lines of progress so far, and whether each is the last of its loop."""
        text = self.log.read_text(errors="replace")
        return [(title, number == total) for title, number, total in _PROGRESS.findall(text)]

    def unfinished(self) -> set[str]:
        """The names of the files that are being written."""
        try:
            return {name for name in os.listdir(self.folder) if name.endswith(".unfinished")}
        except FileNotFoundError:
            return set()

    def wait(self, moment: Moment) -> bool:
        """Waits for a moment; False if the process ends before."""
        reached, seen, before = None, 0, set[str]()
        while self.process.poll() is None:
            now = time.perf_counter()
            if reached is None and len(self.progress()) >= moment.lines:
                reached = now
            if reached is None:
                time.sleep(_POLL)
                continue
            if not moment.saves:
                if now >= reached + moment.delay:
                    return True
                time.sleep(_POLL)
                continue
            files = self.unfinished()
            seen, before = seen + len(files - before), files
            if seen >= moment.saves:
                return True
            time.sleep(0.001)
        return False

    def place(self) -> str:
        """What the run is doing."""
        if any(".pth" in name for name in self.unfinished()):
            return "saving"
        progress = self.progress()
        if not progress:
            return "starting"
        title, is_last = progress[-1]
        if title == "epoch":
            return "evaluating" if is_last else "training"
        return "reporting" if is_last else "evaluating"

    def processes(self) -> list[int]:
        """All processes of the run, by their ids: those that print to the file."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    if os.path.samestat((entry / "fd" / "1").stat(), self.log.stat()):
                        found.append(int(entry.name))
                except OSError:  # it has just ended, or is another user's
                    continue
        return sorted(found)

    def ranks(self, kind: Kind) -> list[int]:
        """The processes that train, by their ids."""
        if kind.processes == 1:
            return [self.process.pid]
        return [pid for pid in self.processes() if _parent(pid) == self.process.pid]

    def signal(self, number: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def end(self) -> tuple[int | None, list[int]]:
        """Waits for all processes, and ends those that do not.

        Returns:
            The exit code, or ``None`` if it did not end by itself, and the processes that were left behind.
        """
        code = _wait(self.process.poll, lambda code: code is not None)
        left = _wait(self.processes, lambda left: not left) if code is not None else self.processes()
        self.signal(signal.SIGKILL, left)
        if code is None:
            _wait(self.process.poll, lambda code: code is not None)
        return code, left


def watch(run: Watched) -> list[float]:
    """Lets a run end, and returns the seconds until each line of its progress, and until its end."""
    times: list[float] = []
    start = time.perf_counter()
    while run.process.poll() is None:
        now = time.perf_counter() - start
        times += [now] * (len(run.progress()) - len(times))
        time.sleep(_POLL)
    return [*times, time.perf_counter() - start]


def _wait(ask: Callable[[], Any], is_right: Callable[[Any], bool]) -> Any:
    start = time.perf_counter()
    while not is_right(answer := ask()) and time.perf_counter() < start + PATIENCE:
        time.sleep(0.05)
    return answer


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
