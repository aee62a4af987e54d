"""What a power cut leaves: a file system's disk, copied between two writes, and mounted again."""

import io
from contextlib import suppress

import pytest
import torch

from balanced_learning.training import files
from tests.training.disks import Disk


def generation(number: int) -> bytes:
    """A checkpoint of half a megabyte."""
    content = io.BytesIO()
    torch.save({"epoch": number, "model": {"weight": torch.full((125_000,), float(number))}}, content)
    return content.getvalue()


GENERATIONS = [generation(number) for number in range(3)]


def write(disk: Disk, number: int) -> None:
    """Writes a generation as a run does."""
    files.write_whole(
        disk.folder / "checkpoint.pth",
        lambda file: file.write(GENERATIONS[number]),
        previous=disk.folder / "checkpoint_previous.pth",
    )


def found(disk: Disk) -> list[int | None]:
    """The generations that are there after a cut: the newest, and the one before."""
    with disk.after_cut() as folder:
        there = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    names = ("checkpoint.pth", "checkpoint_previous.pth")
    return [GENERATIONS.index(there[name]) if name in there else None for name in names]


def test_a_power_cut_leaves_the_last_checkpoint_and_the_one_before(small_cut_disk, monkeypatch):
    disk, written, moments = small_cut_disk, -1, 0

    def look(moment):
        nonlocal moments
        moments += 1
        newest, previous = found(disk)
        assert newest in {-1: (None, 0), 0: (0, 1), 1: (1, 2), 2: (2,)}[written]
        assert previous in ((newest - 1, newest) if written >= 1 else (None, 0))

    disk.at_each_moment(monkeypatch, look)
    for number in range(3):
        write(disk, number)
        written = number
        look("written")
    assert moments > 25


@pytest.mark.parametrize("left_out", ["sync", "sync_folder"])
def test_without_syncing_it_would_be_lost(small_cut_disk, monkeypatch, left_out):
    """The test above can fail."""
    monkeypatch.setattr(files, left_out, lambda _: None)
    for number in range(3):
        write(small_cut_disk, number)
    with suppress(ValueError):  # half of one
        assert found(small_cut_disk)[0] != 2
