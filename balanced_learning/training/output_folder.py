"""The output folder of a run: made for it alone, and kept from other runs while it lasts."""

import errno
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from balanced_learning.training import distributed, files
from balanced_learning.training.checkpoint import NEWEST, PREVIOUS, Checkpoint
from balanced_learning.training.config import Config
from balanced_learning.training.errors import SharedError, UserError, printable, warn

LOCK = ".lock"

_HELD = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


@contextmanager
def run_folder(config: Config, checkpoint: Checkpoint | None) -> Iterator[Config]:
    """The settings with the output folder of a run, which is there, may be written, and is no other run's.

    All processes call it, when they have joined. The main one makes the folder, a new one in ``runs`` where none is
    named, and holds its lock; a run that only evaluates may share the folder with one that trains.

    Raises:
        SharedError: if that fails.
    """
    with ExitStack() as stack:
        folder = distributed.in_main(lambda: _take(config, checkpoint, stack))
        if len(set(distributed.gather(checkpoint and _place(checkpoint)))) > 1:
            raise SharedError(f"--output-dir {folder}: the processes do not read the same checkpoint; start again")
        yield replace(config, run=replace(config.run, output_dir=folder))


def _take(config: Config, checkpoint: Checkpoint | None, stack: ExitStack) -> Path:
    folder = find_folder(config)
    if not config.run.test_only:
        stack.enter_context(locked(folder))
        check_folder(folder, checkpoint)
    return folder


def find_folder(config: Config) -> Path:
    """The output folder of the settings, or a new one in ``runs`` where they name none; made, and found to be writable.

    Raises:
        UserError: if it cannot be written.
    """
    data = config.data.data_path
    folder = config.run.output_dir or next_free_folder(
        f"{config.model.model}-{data.resolve().name if data else 'shapes'}"
    )
    require_writable(folder)
    return folder


def next_free_folder(name: str, parent: Path = Path("runs")) -> Path:
    """Makes a folder of that name, or with a number behind it, that no other process has made.

    Raises:
        UserError: if it cannot be made.
    """
    files.make_folder(parent)
    for number in range(1, 10_000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({files.reason_of(error)})") from None
        return folder
    raise UserError(f"{parent}: holds too many folders called {name}; pass --output-dir")


def require_writable(folder: Path) -> None:
    """Makes an output folder, unless it is there, and tries to write into it.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({files.reason_of(error)})") from None


def check_folder(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Keeps a run from writing over the work of another one, or over its own.

    A damaged checkpoint gets another name, so that it does not take the place of the one before it.

    Raises:
        UserError: if the folder holds the checkpoint of another run than that of ``checkpoint``, or a later one.
    """
    for existing in (folder / name for name in (NEWEST, PREVIOUS) if os.path.lexists(folder / name)):
        if checkpoint is None or checkpoint.path.resolve().parent != folder.resolve():
            raise UserError(f"--output-dir {folder}: holds {existing.name}; --resume {existing}, or name another")
        if checkpoint.path.name == existing.name:
            return
        try:
            found = Checkpoint.load(existing)
        except UserError:
            damaged = existing.with_stem(f"{existing.stem}_damaged")
            files.move(existing, damaged)
            warn(f"{existing}: cannot be read, and is now called {damaged.name}")
            continue
        if _place(found) > _place(checkpoint):
            raise UserError(f"--resume {checkpoint.path}: {existing} is a later one; name another --output-dir")


def _place(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint.position.epoch, checkpoint.position.step


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder.

    It is the kernel's record lock on a file, which says for people whose it is. The kernel takes it from a process that
    ends, in whatever way, so that none is ever stale; children do not have it. The file stays: whoever removed it could
    remove one that another process has just locked.

    Raises:
        UserError: if another process holds it.
    """
    descriptor = _open(folder / LOCK)
    try:
        if _lock(descriptor, folder):
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            _write(descriptor, folder / LOCK, json.dumps(owner) + "\n")
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """The lock's file, if it is one: no link to somewhere else, and no pipe that would be waited for."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise files.cannot_write(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: no file, where the lock of the folder should be")
    return descriptor


def _lock(descriptor: int, folder: Path) -> bool:
    """Locks the file; False where files cannot be locked."""
    if fcntl is None:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise UserError(f"--output-dir {folder}: another run is in it, {_owner(descriptor)}") from None
        if error.errno not in _NO_LOCKS:
            raise files.cannot_write(folder / LOCK, error) from None
        warn(f"{folder}: no lock to be had here ({files.reason_of(error)}); see to it that no other run writes there")
        return False
    return True


def _owner(descriptor: int) -> str:
    try:
        owner: dict[str, Any] = json.loads(os.read(descriptor, 1000))
        return printable(f"process {int(owner['pid'])} on {owner['host']!s:.100} since {owner['since']!s:.30}")
    except (KeyError, OSError, TypeError, ValueError):
        return "which has not said who it is"


def _write(descriptor: int, path: Path, text: str) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    except OSError as error:
        raise files.cannot_write(path, error) from None
