import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balanced_learning.training.data.columns import Columns, pack

NAMES = ["a.png", "ü/b c.jpg", "\ud83d.png", "d"]


def columns(counts, image_ids=None):
    """Images with so many boxes each, whose areas number them."""
    names, name_ends = pack([NAMES[i % len(NAMES)] for i in range(len(counts))])
    total = sum(counts)
    return Columns(
        image_ids=np.arange(len(counts)) if image_ids is None else np.array(image_ids),
        widths=np.full(len(counts), 64, np.int32),
        heights=np.full(len(counts), 48, np.int32),
        names=names,
        name_ends=name_ends,
        first_boxes=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        boxes=np.tile([1.0, 2.0, 3.0, 4.0], (total, 1)),
        areas=np.arange(total, dtype=np.float64),
        category_ids=np.ones(total, np.int64),
        crowds=np.zeros(total, bool),
        entries=np.arange(total, dtype=np.int32),
    )


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_every_part_of_the_boxes_knows_its_images(counts, data):
    whole = [image for image, count in enumerate(counts) for _ in range(count)]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole) + 3))
    table = columns(counts)
    assert table.image_of_boxes().tolist() == whole
    assert table.image_of_boxes(start, stop).tolist() == whole[start:stop]
    for image, (first, last) in enumerate(pairwise(table.first_boxes)):
        assert table.boxes_of(image) == slice(first, last)


def test_names_of_all_kinds_come_back():
    table = columns([0] * 4)
    assert [table.file_name(i) for i in range(4)] == NAMES
    renamed = table.with_images(["x", "", "yy", "z"], np.array([[1, 2], [3, 4], [5, 6], [7, 8]]))
    assert [renamed.file_name(i) for i in range(4)] == ["x", "", "yy", "z"]
    assert renamed.heights.tolist() == [2, 4, 6, 8]


def test_images_are_found_by_their_ids():
    ids = [2**60 + 1, 7, -3, 2**60]
    table = columns([1, 1, 1, 1], ids)
    assert [table.position(image_id) for image_id in ids] == [0, 1, 2, 3]
    for unknown in (8, -4, 2**62):
        with pytest.raises(KeyError):
            table.position(unknown)


def test_the_first_images_keep_their_boxes():
    table = columns([2, 0, 3, 1]).first(3)
    assert len(table) == 3
    assert table.areas.tolist() == [0, 1, 2, 3, 4]
    assert [table.file_name(i) for i in range(3)] == NAMES[:3]
    assert len(columns([2, 0]).first(9)) == 2


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_some_images_keep_their_boxes(counts, data):
    positions = data.draw(st.lists(st.integers(0, len(counts) - 1), unique=True))
    table = columns(counts)
    part = table.take(np.array(positions, np.int64))
    assert part.image_ids.tolist() == positions
    assert [part.file_name(i) for i in range(len(part))] == [table.file_name(i) for i in positions]
    for i, position in enumerate(positions):
        expected = table.areas[table.boxes_of(position)].tolist()
        assert part.areas[part.boxes_of(i)].tolist() == expected


def test_mapped_arrays_are_sent_as_their_folder_and_others_whole(tmp_path):
    table = columns([2, 1])
    table.write(tmp_path)
    mapped = Columns.map(tmp_path)
    assert len(pickle.dumps(mapped)) < 400
    for copy in (pickle.loads(pickle.dumps(mapped)), pickle.loads(pickle.dumps(table))):  # noqa: S301
        for name in Columns.array_names():
            assert np.array_equal(getattr(copy, name), getattr(table, name)), name
