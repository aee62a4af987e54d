import multiprocessing

import numpy as np
import pytest

from balanced_learning.training.data import coco
from balanced_learning.training.data.coco import read_split
from tests.training.disks import NO_ROOM, filled


@pytest.fixture(autouse=True)
def index_folder(tmp_path, monkeypatch):
    """Keeps an index of everything, in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(coco, "LARGE", 0)
    return tmp_path / "cache" / "balanced-learning"


def content(split):
    return list(split.images), [split.annotations[image["id"]] for image in split.images], split.categories


def test_a_later_start_maps_what_the_first_read(coco_root, monkeypatch):
    first = read_split(coco_root, "train2017")
    monkeypatch.setattr(coco, "read_json", None)  # nothing is read again
    monkeypatch.setattr(coco, "check_images", None)
    later = read_split(coco_root, "train2017")
    assert content(later) == content(first)
    assert isinstance(later.columns.boxes, np.memmap)
    assert isinstance(first.columns.boxes, np.memmap)  # the first lets go of its own arrays, too
    assert len(read_split(coco_root, "train2017", limit=1).images) == 1


def test_another_json_is_read_anew(coco_root, edit, index_folder):
    read_split(coco_root, "train2017")
    edit(lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 4]))
    assert read_split(coco_root, "train2017").annotations[11][0]["bbox"] == [1, 2, 3, 4]
    assert len(list(index_folder.iterdir())) == 1  # that of the JSON before is gone


def test_a_json_written_again_at_once_is_another_one(coco_root):
    file = coco_root / "annotations" / "instances_train2017.json"
    read_split(coco_root, "train2017")
    file.write_text(file.read_text().replace("[4, 4, 30, 20]", "[5, 5, 30, 20]"))  # of the same length
    assert read_split(coco_root, "train2017").annotations[11][0]["bbox"] == [5, 5, 30, 20]


def test_anew_takes_no_index(coco_root):
    read_split(coco_root, "train2017")
    (coco_root / "train2017" / "11.png").unlink()
    assert len(read_split(coco_root, "train2017").images) == 2
    with pytest.raises(coco.UserError, match=r"11\.png is missing"):
        read_split(coco_root, "train2017", anew=True)


def test_anew_finds_files_that_were_moved_and_so_do_later_starts(coco_root):
    file = coco_root / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text().replace('"11.png"', '"part/11.png"'))
    assert read_split(coco_root, "train2017").images[0]["file_name"] == "11.png"  # where it lies
    (coco_root / "train2017" / "part").mkdir()
    (coco_root / "train2017" / "11.png").rename(coco_root / "train2017" / "part" / "11.png")
    for anew in (True, False):
        assert read_split(coco_root, "train2017", anew=anew).images[0]["file_name"] == "part/11.png"


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "header"])
def test_a_damaged_index_is_not_taken(coco_root, index_folder, damage, capsys):
    before = content(read_split(coco_root, "train2017"))
    (folder,) = index_folder.iterdir()
    file = folder / ("header.json" if damage == "header" else "boxes.npy")
    data = bytearray(file.read_bytes())
    data[-3] ^= 64
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data[:-8] if damage == "cut" else data)
    assert content(read_split(coco_root, "train2017")) == before
    if damage in ("flip", "cut"):
        assert f"the index of {coco_root}" in capsys.readouterr().err
    assert content(read_split(coco_root, "train2017")) == before  # and has been written again


def test_a_cache_that_cannot_be_written_is_told_of(coco_root, index_folder, capsys):
    index_folder.parent.mkdir()
    index_folder.write_text("in the way")
    split = read_split(coco_root, "train2017")
    assert len(split.images) == 2
    assert not isinstance(split.columns.boxes, np.memmap)
    assert "no index kept" in capsys.readouterr().err


def test_a_full_cache_is_told_of_and_kept_tidy(coco_root, small_disk, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    with filled(small_disk):
        split = read_split(coco_root, "train2017")
        assert len(split.images) == 2
        assert not list((small_disk / "balanced-learning").iterdir())
    assert f"no index kept ({NO_ROOM})" in capsys.readouterr().err


def keep_index(root, go, results):
    go.wait()
    results.put(content(read_split(root, "train2017")))


def test_processes_that_start_together_share_one_index(coco_root, index_folder, capfd):
    fork = multiprocessing.get_context("fork")
    go, results = fork.Barrier(4), fork.SimpleQueue()
    starts = [fork.Process(target=keep_index, args=(coco_root, go, results)) for _ in range(4)]
    for start in starts:
        start.start()
    found = [results.get() for _ in starts]
    for start in starts:
        start.join()
    assert found == [content(read_split(coco_root, "train2017"))] * 4
    assert len(list(index_folder.iterdir())) == 1
    assert capfd.readouterr().err == ""


def test_names_and_sizes_that_were_found_are_in_the_index(coco_root, edit, capsys):
    def change(c):
        c["images"][0].update(file_name="elsewhere\\\\11.png", width=None)
        c["categories"][0]["name"] = "tooth\x07brush"

    edit(change)
    first = read_split(coco_root, "train2017")
    assert "found under other names" in capsys.readouterr().err
    later = read_split(coco_root, "train2017")
    assert later.images[0] == {"id": 11, "file_name": "11.png", "width": 64, "height": 48}
    assert content(later) == content(first)


def test_every_json_has_one_index_by_whatever_way_it_is_reached(coco_root, tmp_path, index_folder):
    (tmp_path / "link").symlink_to(coco_root)
    for root in (coco_root, tmp_path / "link"):
        read_split(root, "train2017")
    assert len(list(index_folder.iterdir())) == 1
    read_split(coco_root, "val2017")
    assert len(list(index_folder.iterdir())) == 2
