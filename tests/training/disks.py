"""File systems of a test's own, which can be filled, made read-only and removed."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

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


class Disk:
    """A disk that can be looked at as a power cut would leave it.

    Its file system may bring names to the disk before what the files hold, which is the worst that ext4 can do.

    Attributes:
        folder: where it is mounted.
    """

    OPTIONS = "loop,noauto_da_alloc,data=writeback,commit=300"  # seconds until it syncs by itself

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder

    @contextmanager
    def after_cut(self) -> Iterator[Path]:
        """Mounts a copy of what is on the disk at this moment."""
        copy = self.image.with_suffix(".copy")
        subprocess.run(["cp", "--sparse=always", str(self.image), str(copy)], check=True)
        with mounted(self.folder.with_name("after"), "-o", "loop", str(copy)) as folder:
            yield folder

    def at_each_moment(self, monkeypatch: pytest.MonkeyPatch, look: Callable[[str], object]) -> None:
        """Looks at the disk before and after each call that writes to it, but for looks within looks."""
        is_looking = False

        def look_once(moment: str) -> None:
            nonlocal is_looking
            if not is_looking:
                is_looking = True
                try:
                    look(moment)
                finally:
                    is_looking = False

        def around(owner: Any, name: str) -> None:
            real = getattr(owner, name)

            def call(*arguments: Any, **options: Any) -> Any:
                look_once(f"before {name}")
                result = real(*arguments, **options)
                look_once(f"after {name}")
                return result

            monkeypatch.setattr(owner, name, call)

        around(os, "fsync")
        around(os, "link")
        around(Path, "replace")


@contextmanager
def cut_disk(tmp_path: Path, mebibytes: int) -> Iterator[Disk]:
    image = tmp_path / "disk.image"
    with image.open("wb") as file:
        file.truncate(mebibytes << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"there is no ext4 here ({error})")
    with mounted(tmp_path / "disk", "-o", Disk.OPTIONS, str(image)) as folder:
        yield Disk(image, folder)


@pytest.fixture
def small_cut_disk(tmp_path) -> Iterator[Disk]:
    """A disk of 8 MiB whose power can be cut."""
    with cut_disk(tmp_path, 8) as disk:
        yield disk


@pytest.fixture
def large_cut_disk(tmp_path) -> Iterator[Disk]:
    """A disk whose power can be cut that has room for a run."""
    with cut_disk(tmp_path, 120) as disk:
        yield disk


NO_ROOM, NO_FILE = os.strerror(errno.ENOSPC), os.strerror(errno.ENOENT)
