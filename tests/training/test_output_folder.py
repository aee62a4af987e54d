import errno
import multiprocessing
import os
import signal
import socket
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from balanced_learning.training import output_folder
from balanced_learning.training.config import Config
from balanced_learning.training.errors import SharedError, UserError
from balanced_learning.training.files import write_whole
from balanced_learning.training.output_folder import (
    check_folder,
    find_folder,
    locked,
    next_free_folder,
    require_writable,
    run_folder,
)
from tests.training.disks import NO_ROOM, filled, read_only

fork = multiprocessing.get_context("fork")


@contextmanager
def started(target, *args):
    """A process that ends with the block."""
    process = fork.Process(target=target, args=args)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def hold(folder: Path, ready, leave_child: bool = False) -> None:
    with locked(folder):
        child = None
        if leave_child:
            child = os.fork()
        if child != 0:
            ready.put(child)
        time.sleep(60)


@pytest.fixture
def ready():
    return fork.SimpleQueue()


def test_a_second_run_is_told_whose_the_folder_is(tmp_path, ready):
    with started(hold, tmp_path, ready) as process:
        ready.get()
        with pytest.raises(UserError) as caught, locked(tmp_path):
            pass
        words = (
            rf"--output-dir {tmp_path}: another run is in it, process {process.pid} on {socket.gethostname()} since "
        )
        assert str(caught.value).startswith(words)
        assert time.strftime("%Y-%m-%d") in str(caught.value)
        with pytest.raises(UserError, match="another run"), locked(tmp_path):  # nor at a second try
            pass
        with locked(make_there(tmp_path / "other")):
            pass


def make_there(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_killed_run_is_free_at_once(tmp_path, ready, number):
    with started(hold, tmp_path, ready) as process:
        ready.get()
        os.kill(process.pid, number)
        process.join()
        with locked(tmp_path):
            assert f'"pid": {os.getpid()}' in (tmp_path / ".lock").read_text()


def test_a_child_that_outlives_its_run_does_not_hold_the_lock(tmp_path, ready):
    with started(hold, tmp_path, ready, True) as process:
        child = ready.get()
        try:
            with pytest.raises(UserError, match="another run"), locked(tmp_path):
                pass
            process.kill()
            process.join()
            os.kill(child, 0)  # is there
            with locked(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_the_lock_is_free_after_the_run_and_after_an_error(tmp_path, ready):
    for _ in range(2):
        with locked(tmp_path):
            pass
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with started(hold, tmp_path, ready):
        assert ready.get() is None


def take(folder: Path, go, results) -> None:
    go.wait()
    try:
        with locked(folder):
            results.put("taken")
            go.wait()
    except UserError:
        results.put("refused")
        go.wait()


def test_of_many_runs_that_start_together_one_gets_the_folder(tmp_path):
    go, results = fork.Barrier(8), fork.SimpleQueue()
    runs = [fork.Process(target=take, args=(tmp_path, go, results)) for _ in range(8)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(results.get() for _ in runs) == ["refused"] * 7 + ["taken"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"5", b'{"pid": "x"}', b'{"pid": 1}', bytes(5000)])
def test_a_damaged_lock_still_locks(tmp_path, ready, content):
    with started(hold, tmp_path, ready):
        ready.get()
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(UserError, match=r"another run is in it, which has not said who it is$"), locked(tmp_path):
            pass
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().count("\n") == 1


def test_the_owner_is_printed_harmless(tmp_path, ready):
    with started(hold, tmp_path, ready):
        ready.get()
        (tmp_path / ".lock").write_text('{"pid": 1, "host": "a\\nb\\u001b[31m", "since": "then"}')
        with pytest.raises(UserError, match=r"process 1 on a\\nb\\x1b\[31m since then$"), locked(tmp_path):
            pass


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_lock_ends_in_one_line(tmp_path, kind):
    lock, elsewhere = tmp_path / ".lock", tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    if kind == "link":
        lock.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(UserError, match=r"/\.lock: "), locked(tmp_path):
        pass
    assert elsewhere.read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_run_goes_on_where_nothing_can_be_locked(tmp_path, monkeypatch, capsys, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(output_folder.fcntl, "lockf", lockf)
    with locked(tmp_path):
        assert f"{tmp_path}: no lock to be had here ({os.strerror(number)})" in capsys.readouterr().err
    monkeypatch.setattr(output_folder, "fcntl", None)
    with locked(tmp_path):
        pass


def test_a_full_and_a_read_only_disk_are_named(small_disk):
    for trouble, reason in ((filled, NO_ROOM), (read_only, "Read-only file system")):
        message = rf"{small_disk}/\.lock: cannot be written \({reason}\)"
        with trouble(small_disk), pytest.raises(UserError, match=message), locked(small_disk):
            pass
    message = rf"--output-dir {small_disk}: cannot be written \(Read-only file system\)"
    with read_only(small_disk), pytest.raises(UserError, match=message):
        require_writable(small_disk)


def make_some(parent: Path, go, results) -> None:
    go.wait()
    results.put([next_free_folder("run", parent).name for _ in range(5)])


def test_no_two_processes_make_one_folder(tmp_path):
    go, results = fork.Barrier(4), fork.SimpleQueue()
    makers = [fork.Process(target=make_some, args=(tmp_path / "runs", go, results)) for _ in range(4)]
    for maker in makers:
        maker.start()
    made = [name for _ in makers for name in results.get()]
    for maker in makers:
        maker.join()
    assert sorted(made) == sorted(["run", *(f"run-{i}" for i in range(2, 21))])
    assert {each.name for each in (tmp_path / "runs").iterdir()} == set(made)


def test_a_new_folder_is_made_beside_whatever_is_there(tmp_path):
    (tmp_path / "run").write_text("a file")
    (tmp_path / "run-2").symlink_to("nowhere")
    assert next_free_folder("run", tmp_path) == tmp_path / "run-3"
    with pytest.raises(UserError, match="/run: cannot be made"):
        next_free_folder("run", tmp_path / "run")


def test_a_probe_of_a_folder_goes_through_no_link(tmp_path):
    for name in (".writable", ".lock.unfinished"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    require_writable(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_the_folder_is_named_after_model_and_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_folder(Config()) == Path("runs/libra_fasterrcnn-shapes")
    config = Config.of({"data_path": Path("my/coco"), "model": "libra_retinanet"})
    assert find_folder(config) == Path("runs/libra_retinanet-coco")
    assert find_folder(config) == Path("runs/libra_retinanet-coco-2")
    given = replace(config, run=replace(config.run, output_dir=tmp_path / "a/b"))
    assert find_folder(given) == find_folder(given) == tmp_path / "a/b"


def config_in(folder: Path, **values) -> Config:
    return Config.of({"output_dir": folder, **values})


def test_a_run_keeps_others_that_train_out_of_its_folder(tmp_path, ready):
    with started(hold, tmp_path, ready):
        ready.get()
        with pytest.raises(UserError, match="another run"), run_folder(config_in(tmp_path), None):
            pass
        with run_folder(config_in(tmp_path, test_only=True), None) as config:
            assert config.run.output_dir == tmp_path


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint_previous.pth"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path, name):
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"holds {name}; --resume {tmp_path}/{name}, or name another"):
        run_folder(config_in(tmp_path), None).__enter__()
    with run_folder(config_in(tmp_path, test_only=True), None), run_folder(config_in(tmp_path / "new"), None):
        pass


def checkpoint_at(path: Path, epoch: int, step: int) -> Any:
    return SimpleNamespace(path=path, position=SimpleNamespace(epoch=epoch, step=step))


@pytest.mark.parametrize(
    ("name", "position", "is_refused"),
    [
        ("checkpoint.pth", (0, 0), False),  # the very one, whatever it holds
        ("checkpoint_best.pth", (2, 5), False),
        ("checkpoint_best.pth", (3, 0), False),
        ("checkpoint_best.pth", (2, 4), True),
        ("checkpoint_previous.pth", (1, 9), True),
        ("../other/checkpoint.pth", (9, 9), True),
        ("link/checkpoint_best.pth", (3, 0), False),
    ],
)
def test_a_run_goes_on_in_its_folder_from_its_last_checkpoint(tmp_path, monkeypatch, name, position, is_refused):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(folder)
    (folder / "checkpoint.pth").touch()
    monkeypatch.setattr(output_folder.Checkpoint, "load", lambda path: checkpoint_at(path, 2, 5))
    refused = pytest.raises(UserError, match=r"(is a later one|holds checkpoint\.pth)") if is_refused else nullcontext()
    with refused:
        check_folder(folder, checkpoint_at(folder / name, *position))


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(tmp_path, capsys):
    newest, previous = tmp_path / "checkpoint.pth", tmp_path / "checkpoint_previous.pth"
    newest.write_bytes(b"damaged")
    previous.write_bytes(b"good")
    check_folder(tmp_path, checkpoint_at(previous, 1, 3))
    assert f"{newest}: cannot be read, and is now called checkpoint_damaged.pth" in capsys.readouterr().err
    assert (tmp_path / "checkpoint_damaged.pth").read_bytes() == b"damaged"
    write_whole(newest, lambda file: file.write(b"new"), previous=previous)
    assert (newest.read_bytes(), previous.read_bytes()) == (b"new", b"good")


def join_and_enter(rank: int, store: Path, folder: Path | None, results, epochs=None) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    checkpoint = epochs and epochs[rank] and checkpoint_at(folder / "checkpoint.pth", epochs[rank], 0)
    try:
        with run_folder(Config.of({"output_dir": folder}), checkpoint) as config:
            results.put((rank, str(config.run.output_dir)))
            dist.barrier()
    except SharedError as error:
        results.put((rank, str(error)))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("kind", ["new", "given", "refused"])
def test_all_processes_agree_on_the_folder_or_on_why_there_is_none(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    taken = tmp_path / "runs" / "libra_fasterrcnn-shapes"
    taken.mkdir(parents=True)
    (taken / "checkpoint.pth").touch()
    given, expected = {
        "new": (None, "runs/libra_fasterrcnn-shapes-2"),
        "given": (tmp_path / "a", f"{tmp_path}/a"),
        "refused": (
            taken,
            f"--output-dir {taken}: holds checkpoint.pth; --resume {taken}/checkpoint.pth, or name another",
        ),
    }[kind]
    assert enter_together(tmp_path / "store", given) == [(rank, expected) for rank in range(3)]


def enter_together(store: Path, folder: Path | None, epochs: list[int | None] | None = None) -> list[tuple[int, str]]:
    """What each of three processes says of the folder."""
    results = fork.SimpleQueue()
    ranks = [fork.Process(target=join_and_enter, args=(rank, store, folder, results, epochs)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    said = sorted(results.get() for _ in ranks)
    for rank in ranks:
        rank.join()
    return said


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_processes_that_read_different_checkpoints_do_not_go_on(tmp_path):
    (tmp_path / "checkpoint.pth").touch()
    assert [text for _, text in enter_together(tmp_path / "same", tmp_path, [3, 3, 3])] == [f"{tmp_path}"] * 3
    for epochs in ([3, 3, 2], [3, None, 3]):
        for _, text in enter_together(tmp_path / f"other {epochs[1]}", tmp_path, epochs):
            assert text == f"--output-dir {tmp_path}: the processes do not read the same checkpoint; start again"
