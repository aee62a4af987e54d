"""What a power cut leaves: a file system's disk, copied at each moment between two writes, and mounted again."""

import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from balanced_learning.training import files
from tests.training.disks import mounted

# Names may reach the disk before what the files hold: the worst that ext4 may do.
HARSH = "loop,noauto_da_alloc,data=writeback"


class Disk:
    """A disk of 8 MiB, of which copies are taken.

    Attributes:
        folder: where its file system is mounted.
        copies: by the moment, the bytes of the disk.
    """

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder
        self.copies: list[tuple[str, bytes]] = []

    def copy(self, moment: str) -> None:
        self.copies.append((moment, self.image.read_bytes()))


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"there is no ext4 here ({error})")
    with mounted(tmp_path / "mounted", "-o", HARSH, str(image)) as folder:
        yield Disk(image, folder)


def after_the_cut(tmp_path: Path, content: bytes) -> dict[str, bytes]:
    """The files on a copy of the disk."""
    image = tmp_path / "copy"
    image.write_bytes(content)
    with mounted(tmp_path / "again", "-o", "loop", str(image)) as folder:
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def _copied(disk, monkeypatch):
    """Copies the disk before and after each call that matters to it."""

    def around(owner, name):
        real = getattr(owner, name)

        def call(*arguments, **options):
            disk.copy(f"before {name}")
            result = real(*arguments, **options)
            disk.copy(f"after {name}")
            return result

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((files._RawFile, "write"), (os, "fsync"), (os, "link"), (Path, "replace"), (Path, "unlink")):
        around(owner, name)


def generation(number: int) -> bytes:
    """A checkpoint of half a megabyte."""
    content = io.BytesIO()
    torch.save({"epoch": number, "model": {"weight": torch.full((125_000,), float(number))}}, content)
    return content.getvalue()


GENERATIONS = [generation(number) for number in range(3)]


def write_all(disk: Disk) -> None:
    """Writes the generations as a run does."""
    for number, content in enumerate(GENERATIONS):
        files.write_whole(
            disk.folder / "checkpoint.pth",
            lambda file, content=content: file.write(content),
            previous=disk.folder / "checkpoint_previous.pth",
        )
        disk.copy(f"written {number}")


def found(tmp_path: Path, disk: Disk) -> Iterator[tuple[int, int | None, int | None]]:
    """How many generations were written, and which of them are there after a cut: the newest, and the one before."""
    written = -1
    for moment, content in disk.copies:
        there = after_the_cut(tmp_path, content)
        written = int(moment.split()[1]) if moment.startswith("written") else written
        yield (
            written,
            *(
                GENERATIONS.index(there[name]) if name in there else None
                for name in ("checkpoint.pth", "checkpoint_previous.pth")
            ),
        )


@pytest.mark.usefixtures("_copied")
def test_a_power_cut_leaves_the_last_checkpoint_and_the_one_before(disk, tmp_path):
    write_all(disk)
    assert len(disk.copies) > 30
    for written, newest, previous in found(tmp_path, disk):
        if written >= 0:
            assert newest in (written, written + 1)
        if written >= 1:
            assert previous in (newest - 1, newest)


@pytest.mark.parametrize("left_out", ["sync", "sync_folder"])
def test_without_syncing_it_would_be_lost(disk, tmp_path, monkeypatch, left_out):
    """The test above can fail."""
    monkeypatch.setattr(files, left_out, lambda _: None)
    write_all(disk)
    *_, (written, newest, _) = found(tmp_path, disk)
    assert newest != written
