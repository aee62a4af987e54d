"""File systems of a test's own, which can be filled, made read-only and removed."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    """An empty file system of 4 MiB, in memory."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=4m", "none") as folder:
        yield folder


def fill(folder: Path) -> None:
    """Leaves no room on the file system of a folder."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def make_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def before_writing(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[Path], None]) -> None:
    """Acts on the folder of a file when that is to be written for the first time."""
    real, left = files.write_new, [act]

    def write_new(path: Path, write: files.Write) -> os.stat_result:
        if path.name.removesuffix(".unfinished") == name and left:
            left.pop()(path.parent)
        return real(path, write)

    monkeypatch.setattr(files, "write_new", write_new)


NO_ROOM = os.strerror(errno.ENOSPC)
