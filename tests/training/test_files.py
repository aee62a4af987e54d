import errno
import multiprocessing
import os
import signal
import stat
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from balanced_learning.training import files
from balanced_learning.training.errors import UserError
from balanced_learning.training.files import (
    keep_previous,
    new_folder,
    write_new,
    write_or_warn,
    write_text,
    write_whole,
)
from tests.training.disks import NO_ROOM, filled, read_only


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "file"
    path.write_text("old")
    return path


@pytest.fixture
def _no_hang():
    """Ends a test that waits for a pipe."""

    def end(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_file_is_replaced_and_nothing_left_beside_it(path):
    write_text(path, "neu: \u00fc\n")
    assert path.read_bytes() == b"neu: \xc3\xbc\n"
    assert names(path.parent) == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_file_of_the_longest_name_can_be_written(tmp_path):
    for name in ("x" * 255, "\u732b" * 85):
        write_text(tmp_path / name, "new")
    assert len(names(tmp_path)) == 2


@pytest.mark.usefixtures("_no_hang")
@pytest.mark.parametrize("name", ["file", "file.unfinished"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "hard link"])
def test_nothing_is_written_through_what_is_in_the_way(path, tmp_path, name, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    target = path.with_name(name)
    target.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "hard link":
        os.link(elsewhere, target)
    else:
        target.symlink_to(elsewhere if kind == "link" else tmp_path / "missing")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert stat.S_ISREG(path.lstat().st_mode)
    assert names(path.parent) == ["file"]
    assert elsewhere.read_text() == "precious"
    assert names(tmp_path) == ["elsewhere", "folder"]


@pytest.mark.parametrize(
    ("name", "reason"), [("file", "Is a directory"), ("file.unfinished", r"file\.unfinished is a folder in its way")]
)
def test_a_folder_in_the_way_ends_in_one_line(path, name, reason):
    folder = path.with_name(name)
    folder.unlink(missing_ok=True)
    (folder / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"/file: cannot be written \({reason}\)$"):
        write_text(path, "new")
    assert names(folder) == ["inside"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, NO_ROOM), UserError),
        (OSError("two\nlines"), UserError),
        (RuntimeError("PytorchStreamWriter failed\nat 0x7f"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
)
def test_what_fails_leaves_the_old_file_alone(path, error, raised, capsys):
    def write(file):
        file.write(b"half")
        file.flush()
        assert names(path.parent) == ["file", "file.unfinished"]
        raise error

    with pytest.raises(raised) as caught:
        write_whole(path, write)
    assert path.read_text() == "old"
    assert names(path.parent) == ["file"]
    assert "\n" not in str(caught.value)
    if raised is UserError:
        write_or_warn(path, write)
        assert capsys.readouterr().err == f"warning: {caught.value}\n"


def test_a_name_that_steers_the_terminal_is_printed_harmless(tmp_path):
    with pytest.raises(UserError) as caught:
        write_text(tmp_path / "missing" / "a\nb\x1b[31m", "new")
    assert str(caught.value) == rf"{tmp_path}/missing/a\nb\x1b[31m: cannot be written (No such file or directory)"


def figure() -> Figure:
    drawn = Figure()
    drawn.subplots().imshow(noise())
    return drawn


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)


WRITERS = {
    "bytes": lambda file: file.write(bytes(100)),
    "torch": partial(torch.save, {"model": torch.zeros(10_000), "small": [torch.zeros(9)] * 9}),
    "numpy": lambda file: np.save(file, np.zeros(10_000)),
    "png": lambda file: Image.fromarray(noise()).save(file, "PNG"),
    "jpeg": lambda file: Image.fromarray(noise()).save(file, "JPEG"),
    "figure": lambda file: figure().savefig(file, format="png"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_named_whatever_library_writes(small_disk, write, tmp_path):
    path = small_disk / "file"
    path.write_text("old")
    with filled(small_disk), pytest.raises(UserError, match=rf"/file: cannot be written \({NO_ROOM}\)$"):
        write_whole(path, write)
    assert path.read_text() == "old"
    assert names(small_disk) == ["file"]
    write_whole(path, write)
    write_whole(tmp_path / "file", write)
    assert path.read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize(
    "write",
    [
        partial(torch.save, [torch.zeros(10_000) for _ in range(200)]),
        lambda file: np.save(file, np.zeros(1 << 20)),
        lambda file: Image.effect_noise((3000, 3000), 99).save(file, "JPEG", quality=100),
    ],
    ids=["torch", "numpy", "jpeg"],
)
def test_a_disk_that_is_full_in_the_middle_is_named(small_disk, write):
    with pytest.raises(UserError, match=NO_ROOM):
        write_whole(small_disk / "file", write)
    assert names(small_disk) == []


def test_a_read_only_disk_is_named(small_disk):
    path = small_disk / "file"
    path.write_text("old")
    with read_only(small_disk):
        with pytest.raises(UserError, match=r"/file: cannot be written \(Read-only file system\)$"):
            write_text(path, "new")
        with pytest.raises(UserError, match=r"/new: cannot be made \(Read-only file system\)$"):
            files.make_folder(small_disk / "new")


def test_a_disk_that_turns_read_only_meanwhile_is_named(small_disk):
    """As ext4 does on an error. Not even the half file can be removed."""
    path = small_disk / "file"

    def write(file):
        file.write(b"new")
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(UserError, match="Read-only"):
        write_whole(path, write)


def test_a_folder_removed_meanwhile_is_named(path):
    def write(file):
        file.write(b"new")
        path.unlink()
        path.with_name("file.unfinished").unlink()
        path.parent.rmdir()

    with pytest.raises(UserError, match=r"file: cannot be written \(No such file or directory\)"):
        write_whole(path, write)


def test_two_that_write_one_file_never_mix(path):
    def write(file):
        file.write(b"half")
        path.with_name("file.unfinished").unlink()
        path.with_name("file.unfinished").write_text("of another")

    with pytest.raises(UserError, match="another program writes it, too"):
        write_whole(path, write)
    assert path.read_text() == "old"


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What is synced and renamed, in order."""
    made: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def name_of(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    def record(call, *names):
        made.append(" ".join((call, *names)))

    monkeypatch.setattr(os, "fsync", lambda number: record("sync", name_of(number)) or fsync(number))
    monkeypatch.setattr(Path, "replace", lambda self, to: record("move", self.name, to.name) or replace(self, to))
    monkeypatch.setattr(Path, "rename", lambda self, to: record("move", "made", to.name) or rename(self, to))
    return made


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_file_is_on_the_disk_before_it_has_its_name(path, calls):
    write_whole(path, lambda file: file.write(b"new"), previous=path.with_name("before"))
    assert calls == [
        "sync file.unfinished",
        "move before.unfinished before",
        "move file.unfinished file",
        "sync folder",
    ]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    with new_folder(tmp_path / "made") as folder:
        (folder / "sub").mkdir()
        write_new(folder / "sub" / "file", lambda file: file.write(b"new"))
    assert calls == ["sync file", f"sync {folder.name}", "sync sub", "move made made", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_is_written_to(path, monkeypatch, number):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_disk_that_fails_to_sync_is_named(path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="Input/output error"):
        write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("links", [True, False])
def test_what_was_there_is_kept_under_another_name(path, monkeypatch, links):
    if not links:

        def link(*_, **__):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", link)
    before = path.with_name("before")
    for new, kept in (("1", "old"), ("2", "1"), ("3", "2")):
        write_whole(path, lambda file, new=new: file.write(new.encode()), previous=before)
        assert (path.read_text(), before.read_text()) == (new, kept)
    assert names(path.parent) == ["before", "file"]


def test_what_fails_leaves_both_generations_alone(small_disk):
    path, before = small_disk / "file", small_disk / "before"
    for text in (b"1", b"2"):
        write_whole(path, lambda file, text=text: file.write(text), previous=before)
    with filled(small_disk), pytest.raises(UserError, match=NO_ROOM):
        write_whole(path, lambda file: file.write(b"3"), previous=before)
    assert (path.read_text(), before.read_text()) == ("2", "1")


def test_keeping_twice_or_nothing_changes_nothing(path):
    before = path.with_name("before")
    keep_previous(path.with_name("missing"), before)
    assert names(path.parent) == ["file"]
    for _ in range(2):
        keep_previous(path, before)
        assert names(path.parent) == ["before", "file"]
    assert path.read_text() == before.read_text() == "old"


def write_on_and_on(path: Path, number) -> None:
    while True:
        number.value += 1
        block = number.value.to_bytes(4, "big") * 25_000
        write_whole(path, lambda file, block=block: file.write(10 * block), previous=path.with_name("before"))


def test_a_killed_program_leaves_whole_files(tmp_path):
    path = tmp_path / "file"
    context = multiprocessing.get_context("fork")
    for attempt in range(20):
        number = context.Value("i", 0, lock=False)  # a lock would die with the process that holds it
        process = context.Process(target=write_on_and_on, args=(path, number))
        process.start()
        while number.value < 3:
            time.sleep(0.001)
        time.sleep(0.0007 * attempt)
        process.kill()
        process.join()
        kept = []
        for each in (path, path.with_name("before")):
            content = each.read_bytes()
            assert content == content[:4] * 250_000
            kept.append(int.from_bytes(content[:4], "big"))
        last, before = kept
        assert number.value - 1 <= last <= number.value
        assert last - 1 <= before <= last
    assert set(names(tmp_path)) <= {"before", "before.unfinished", "file", "file.unfinished"}


def fill_folder(place: Path, text: str, ready, results) -> None:
    try:
        with new_folder(place) as folder:
            write_new(folder / "file", lambda file: file.write(text.encode()))
            ready.wait()
        results.put("made")
    except OSError:
        results.put("other was faster")


def test_of_two_that_make_a_folder_one_is_taken(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(2), context.Queue()
    makers = [context.Process(target=fill_folder, args=(tmp_path / "made", text, ready, results)) for text in "ab"]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert {results.get() for _ in makers} == {"made", "other was faster"}
    assert names(tmp_path) == ["made"]
    assert (tmp_path / "made" / "file").read_text() in "ab"


def test_what_a_killed_program_left_of_a_folder_is_removed_after_a_day(tmp_path):
    for name, days in (("made.01234567", 2), ("made.abcdef01", 0.5), ("other.01234567", 2)):
        folder = tmp_path / f"{name}.unfinished"
        folder.mkdir()
        (folder / "file").touch()
        os.utime(folder, (time.time() - days * 86400,) * 2)
    with new_folder(tmp_path / "made"):
        pass
    assert names(tmp_path) == ["made", "made.abcdef01.unfinished", "other.01234567.unfinished"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ZeroDivisionError])
def test_a_folder_is_made_whole_or_not_at_all(tmp_path, error):
    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(error), new_folder(tmp_path / "made") as folder:
        write_new(folder / "file", write)
    assert names(tmp_path) == []
