"""The one place where the programs write files: whole or not at all, and never through a link to somewhere else."""

import errno
import io
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from balanced_learning.training.errors import UserError, printable, warn

Write = Callable[[BinaryIO], object]

_NO_SYNC = {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}  # of file systems that cannot sync
_NO_LINKS = {errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EPERM}  # and of those without hard links
_ABANDONED = 24 * 3600  # seconds after which nobody fills a folder any more


def write_whole(path: Path, write: Write, *, previous: Path | None = None) -> None:
    """Writes a file beside its place, and moves it there when all of it is on the disk.

    Whenever the program, the machine or the disk stops, ``path`` holds what it held before or what ``write`` wrote.
    What is there is replaced, not written into: also where it is a link or a pipe.

    Args:
        path: the file.
        write: puts the content into the binary file that it gets.
        previous: keeps what ``path`` held before.

    Raises:
        UserError: if it cannot be written. What was there before is left alone.
    """
    unfinished = _unfinished(path)
    try:
        _remove(unfinished)
        written = write_new(unfinished, write)
        if not os.path.samestat(written, unfinished.lstat()):
            raise OSError("another program writes it, too")
        if previous:
            keep_previous(path, previous)
        unfinished.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from None
        raise


def write_text(path: Path, text: str) -> None:
    """As :func:`write_whole`, of a text in UTF-8."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_or_warn(path: Path, write: Write) -> None:
    """As :func:`write_whole`, for what a run can go on without: a warning says that it is lost."""
    try:
        write_whole(path, write)
    except UserError as error:
        warn(str(error))


def write_new(path: Path, write: Write) -> os.stat_result:
    """Writes a file where there is none, down to the disk.

    Raises:
        OSError: if it cannot be written, or something is there.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    raw = _RawFile(path, "wb", opener=lambda name, _: os.open(name, flags, 0o666))
    try:
        with _File(raw) as file:
            write(file)
            file.flush()
            sync(raw.fileno())
            return os.fstat(raw.fileno())
    except (OSError, RuntimeError) as error:  # torch.save makes the one into the other
        raise raw.failure or (error if isinstance(error, OSError) else OSError(str(error))) from None


def keep_previous(path: Path, previous: Path) -> None:
    """Makes what ``path`` holds be at ``previous`` as well, in place of what is there.

    ``path`` is never missing meanwhile, except on a file system without hard links.

    Raises:
        OSError: if that fails.
    """
    link = _unfinished(previous)
    _remove(link)
    try:
        if os.path.samestat(path.lstat(), previous.lstat()):
            return
    except FileNotFoundError:
        if not os.path.lexists(path):
            return
    try:
        os.link(path, link, follow_symlinks=False)
    except (OSError, NotImplementedError) as error:  # Windows cannot link without following
        if getattr(error, "errno", errno.ENOSYS) not in _NO_LINKS:
            raise
        link = path
    link.replace(previous)


def move(path: Path, to: Path) -> None:
    """Gives a file another name, in place of what has it.

    Raises:
        UserError: if that fails.
    """
    try:
        path.replace(to)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be renamed ({reason_of(error)})") from None


def map_array(path: Path, *, to_fill: bool = False) -> np.memmap:
    """Maps the array of a ``.npy`` file, for reading or for filling it in its place.

    Raises:
        OSError, ValueError: if that fails. A damaged file may raise anything else.
    """
    return np.lib.format.open_memmap(path, mode="r+" if to_fill else "r")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the place of ``folder``, which is moved there when it is full.

    It is to be filled by :func:`write_new`. If the block fails, what it made is removed; so is, after a day, what a
    killed program has left.

    Raises:
        OSError: if it cannot be made, or there is one that is not empty, perhaps made by another process meanwhile.
    """
    unfinished = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.unfinished")
    unfinished.mkdir(parents=True)
    for left in folder.parent.glob(f"{escape(folder.name)}.????????.unfinished"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left)
    try:
        yield unfinished
        for made in (unfinished, *(each for each in unfinished.rglob("*") if each.is_dir())):
            sync_folder(made)
        unfinished.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def make_folder(folder: Path) -> None:
    """Makes a folder, and those that it lies in, unless it is there.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{printable(folder)}: cannot be made ({reason_of(error)})") from None


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"{printable(path)}: cannot be written ({reason_of(error)})")


def reason_of(error: OSError) -> str:
    """Why it failed, on one line."""
    return printable(error.strerror or str(error).split("\n")[0] or type(error).__name__)


def sync(descriptor: int) -> None:
    """Waits until what was written is on the disk, where the file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (AttributeError, PermissionError):  # Windows; a folder that may be written, but not be listed
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name[:60]}.unfinished")  # a longer name could be too long with its ending


def _remove(unfinished: Path) -> None:
    """Removes what a killed program left."""
    try:
        unfinished.unlink(missing_ok=True)
    except OSError:
        if unfinished.is_dir():
            raise OSError(f"{unfinished.name} is a folder in its way") from None
        raise


class _RawFile(io.FileIO):
    """A file that remembers why it failed, for libraries that do not pass it on."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


class _File(io.BufferedWriter):
    """A file without a descriptor to see, so that libraries write through it and not beside it."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")
