"""The benchmark of the training loop: what it compares is comparable, and its times add up."""

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return import_module


def test_stages_inside_others_are_counted_once(load, monkeypatch):
    stopwatch = load("_stages").Stopwatch
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = stopwatch("cpu")  # 0
    with watch.stage("neck"):  # 1
        watch.timed(lambda: None, "backbone")()  # 2, 3
        watch.outside("optimiser")  # 4: what is open stays open
    watch.outside("rest")  # 5, 6
    assert dict(watch.seconds) == {"rest": 1, "neck": 3, "backbone": 1, "optimiser": 1}


def test_batches_of_the_reference_are_full_and_of_one_group(load):
    loop = load("_reference_loop")
    groups = [0] * 7 + [1] * 4 + [2]
    batches = list(loop._GroupedBatches(range(len(groups)), groups, 3))
    assert len(batches) == 4
    assert all(len(batch) == 3 and len({groups[i] for i in batch}) == 1 for batch in batches)
    assert batches[:2] == [[0, 1, 2], [3, 4, 5]]


def test_the_reference_makes_masks_and_flips_them_with_the_boxes(load, coco_root, edit):
    def draw(content):
        square, crowd = content["annotations"]
        crowd["image_id"] = square["image_id"]  # the other image is left without a box
        crowd |= {"iscrowd": 1, "segmentation": {"counts": [0, 48 * 64], "size": [48, 64]}}
        square["segmentation"] = [[4, 4, 34, 4, 34, 24, 4, 24]]

    edit(draw)
    loader = load("_reference_loop").make_loader(coco_root, {90: 2, 3: 1}, 1, 0, group_factor=3, limit=None)
    seen = set()
    for _ in range(20):
        (((image,), (target,)),) = loader
        assert (image.dtype, image.shape) == (torch.float32, (3, 48, 64))
        (box,) = target["boxes"].long().tolist()
        (mask,) = target["masks"]
        rows, columns = mask.nonzero(as_tuple=True)
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box
        assert target["labels"].tolist() == [2]
        seen.add(tuple(box))
    assert seen == {(4, 4, 34, 24), (30, 4, 60, 24)}


def test_both_loops_train_on_the_same_images(load, coco_root, tmp_path, monkeypatch, capsys):
    train_step = load("train_step")
    options = ["--data-path", str(coco_root), "--quick", "--sizes", "64x64", "-b", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--device", "cpu", "--threads", "1", *options])
    start = time.perf_counter()
    train_step.main()
    took = time.perf_counter() - start
    (case,) = json.loads((tmp_path / "train_step_small_cpu.json").read_text())["cases"]
    for name in (train_step.OURS, train_step.REFERENCE):
        (run,) = case["runs"][name]
        assert run["images"] == 2
        assert 0 < run["seconds"] < took
        *times, pixels = case["stages"][name].values()
        assert pixels == 64 * 64
        assert all(spent > 0 for spent in times)
        assert 2 * sum(times) < 1e3 * took
    assert "| ratio |" in capsys.readouterr().out


def test_the_ratio_is_that_of_the_turns(load):
    train_step = load("train_step")
    ours, theirs = (
        [{"images": 8, "seconds": s, "cpu_seconds": 2 * s} for s in turns] for turns in ((1, 2, 4), (2, 5, 4))
    )
    row = train_step.speeds({"runs": {train_step.OURS: ours, train_step.REFERENCE: theirs}}).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["4.00", "2.00", "2.00", "1.00", "2.50"]
