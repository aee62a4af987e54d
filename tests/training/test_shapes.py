import json
import multiprocessing
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.shapes import CATEGORIES, shapes_dataset
from balanced_learning.training.errors import UserError
from tests.training.disks import NO_ROOM, filled

NOTED_BOXES = [
    (1, 23, 0, 75, 75),
    (20, 70, 59, 58, 67),
    (1, 0, 126, 24, 34),
    (1, 0, 34, 59, 66),
    (1, 63, 101, 25, 24),
    (7, 16, 109, 52, 51),
]
NOTED_GREYS = [[130, 97, 99, 123], [161, 122, 110, 114], [152, 142, 130, 131], [99, 138, 138, 141]]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_draws_a_coco_data_set_of_many_sizes_that_overlap():
    root = shapes_dataset(train=30, val=5)
    split = read_split(root, "train2017")
    assert len(split.images) == 30
    assert split.categories == CATEGORIES
    boxes = [box for image in split.images for box in split.boxes(image)]
    assert {box["category_id"] for box in boxes} == set(CATEGORIES)
    areas = sorted(box["area"] for box in boxes)
    assert areas[-1] > 30 * areas[0]
    overlaps = [
        (a, b)
        for image in split.images
        for a, b in combinations(split.boxes(image), 2)
        if _intersect(a["bbox"], b["bbox"])
    ]
    assert len(overlaps) > 10
    ids = {image["id"] for image in split.images}
    assert not ids & {image["id"] for image in read_split(root, "val2017").images}


def _intersect(a, b):
    return all(max(a[i], b[i]) < min(a[i] + a[i + 2], b[i] + b[i + 2]) for i in (0, 1))


def test_the_seed_decides_and_the_cache_spares_a_second_drawing(tmp_path, capsys, monkeypatch):
    first = shapes_dataset(train=3, val=1)
    assert "drawing" in capsys.readouterr().out
    assert shapes_dataset(train=3, val=1) == first
    assert "drawing" not in capsys.readouterr().out
    assert _annotations(shapes_dataset(train=3, val=1, seed=1)) != _annotations(first)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    again = shapes_dataset(train=3, val=1)
    assert _annotations(again) == _annotations(first)
    assert (again / "train2017/000001.png").read_bytes() == (first / "train2017/000001.png").read_bytes()


def test_the_same_images_are_evaluated_whatever_is_trained_on():
    """They are as they were drawn at first, when these values were noted, so that AP can be compared."""
    roots = [shapes_dataset(train=train, val=3) for train in (2, 500)]
    val = [read_split(root, "val2017") for root in roots]
    assert [image["id"] for image in val[0].images] == [image["id"] for image in val[1].images] == [481, 482, 483]
    trained = [image["id"] for image in read_split(roots[1], "train2017").images]
    assert trained == [*range(1, 481), *range(484, 504)]
    for split in val:
        first = split.images[0]
        assert [(a["category_id"], *a["bbox"]) for a in split.boxes(first)] == NOTED_BOXES
        with Image.open(split.image_dir / first["file_name"]) as image:
            small = image.convert("L").resize((4, 4), Image.Resampling.BOX)
        assert np.allclose(small, NOTED_GREYS, atol=2)  # versions of Pillow may differ by a pixel at an edge


def _annotations(root):
    return json.loads((root / "annotations/instances_train2017.json").read_text())


def test_a_full_cache_is_named_and_kept_tidy(small_disk, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    message = rf"shapes-2-1-0: cannot be written \({NO_ROOM}\); set XDG_CACHE_HOME"
    with filled(small_disk), pytest.raises(UserError, match=message):
        shapes_dataset(train=2, val=1)
    assert not list((small_disk / "balanced-learning").iterdir())
    shapes_dataset(train=2, val=1)


def draw(go, results):
    go.wait()
    results.put(_annotations(shapes_dataset(train=3, val=1)))


def test_processes_that_start_together_share_one_data_set(tmp_path):
    fork = multiprocessing.get_context("fork")
    go, results = fork.Barrier(4), fork.SimpleQueue()
    starts = [fork.Process(target=draw, args=(go, results)) for _ in range(4)]
    for start in starts:
        start.start()
    found = [results.get() for _ in starts]
    for start in starts:
        start.join()
    assert found == [_annotations(shapes_dataset(train=3, val=1))] * 4
    assert [each.name for each in (tmp_path / "cache" / "balanced-learning").iterdir()] == ["shapes-3-1-0"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        shapes_dataset(train=1, val=1)
