"""File systems of a test's own, which can be filled, made read-only and removed."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from balanced_learning.training import files


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Mounts a file system, or skips the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    if os.name != "posix" or not shutil.which("mount"):
        pytest.skip("there is no mount here")
    result = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"nothing can be mounted here ({result.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """An empty disk of 4 MiB, in memory."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=4m", "none") as folder:
        yield folder


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """An empty disk in memory that has room for a run."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=100m", "none") as folder:
        yield folder


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Leaves no room on a disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Turns a folder read-only, for root as well."""
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield


@contextmanager
def removed(folder: Path) -> Iterator[None]:
    """Puts a folder out of reach."""
    away = folder.rename(folder.with_name("away"))
    try:
        yield
    finally:
        away.rename(folder)


def while_written(
    monkeypatch: pytest.MonkeyPatch, name: str, trouble: Callable[[], AbstractContextManager], number: int = 1
) -> None:
    """Has a trouble while the file of a name is written, from the ``number``-th time on, until it has done harm."""
    real, times = files.write_new, 0

    def write_new(path: Path, write: files.Write) -> os.stat_result:
        nonlocal times
        times += path.name.removesuffix(".unfinished") == name
        if times < number or path.name.removesuffix(".unfinished") != name:
            return real(path, write)
        try:
            with trouble():
                return real(path, write)
        except OSError:
            monkeypatch.setattr(files, "write_new", real)
            raise

    monkeypatch.setattr(files, "write_new", write_new)


NO_ROOM, NO_FILE = os.strerror(errno.ENOSPC), os.strerror(errno.ENOENT)
