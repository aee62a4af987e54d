import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from balanced_learning.training.reporting.pictures import (
    Mark,
    class_color,
    detection_marks,
    draw_marks,
    place_labels,
)


def overlap(first, second) -> bool:
    (a, b, c, d), (e, f, g, h) = first, second
    return a < g and e < c and b < h and f < d


@st.composite
def labelled_boxes(draw):
    width, height = draw(st.integers(1, 700)), draw(st.integers(1, 500))
    boxes, sizes = [], []
    for _ in range(draw(st.integers(0, 40))):
        xs = sorted(draw(st.integers(0, width - 1)) for _ in range(2))
        ys = sorted(draw(st.integers(0, height - 1)) for _ in range(2))
        boxes.append([xs[0], ys[0], xs[1], ys[1]])
        sizes.append([draw(st.integers(1, 120)), draw(st.integers(1, 20))])
    return (
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(sizes, dtype=torch.float32).reshape(-1, 2),
        (width, height),
    )


@given(labelled_boxes())
def test_labels_cover_each_other_nowhere_and_stay_inside(case):
    boxes, sizes, (width, height) = case
    places = place_labels(boxes, sizes, (width, height))
    assert len(places) == len(boxes)
    spots = [
        (*place, place[0] + w, place[1] + h)
        for place, (w, h) in zip(places, sizes.tolist(), strict=True)
        if place is not None
    ]
    for i, spot in enumerate(spots):
        assert spot[0] >= 0
        assert spot[1] >= 0
        assert spot[2] <= width
        assert spot[3] <= height
        assert not any(overlap(spot, other) for other in spots[:i])


def test_a_label_with_room_is_at_its_box():
    boxes = torch.tensor([[100.0, 100, 200, 180], [100, 100, 200, 180], [300, 0, 390, 90]])
    places = place_labels(boxes, torch.tensor([[60.0, 16]] * 3), (640, 480))
    assert places[0] == (100, 84)
    for place, (x1, y1, x2, y2) in zip(places, boxes.tolist(), strict=True):
        assert place is not None
        assert x1 - 60 <= place[0] <= x2
        assert y1 - 16 <= place[1] <= y2


def test_a_hundred_labels_find_room_in_a_photo():
    corners = torch.rand(100, 2) * torch.tensor([560, 420])
    boxes = torch.cat([corners, corners + 5 + 60 * torch.rand(100, 2)], dim=1).round()
    places = place_labels(boxes, torch.tensor([[70.0, 16]] * 100), (640, 480))
    assert sum(place is not None for place in places) > 95


def test_a_label_does_not_hide_a_small_neighbour():
    boxes = torch.tensor([[100.0, 100, 200, 200], [110, 86, 120, 96]])
    (x, y), _ = place_labels(boxes, torch.tensor([[60.0, 16]] * 2), (640, 480))
    assert not overlap((x, y, x + 60, y + 16), (110, 86, 120, 96))


def test_colours_of_classes_are_distinct():
    colors = [class_color(label) for label in range(1, 92)]
    assert len(set(colors)) == len(colors)
    distances = torch.pdist(torch.tensor(colors[:20], dtype=torch.float32))
    assert distances.min() > 25


def test_a_box_is_drawn_in_its_colour_with_a_dark_edge_on_any_ground():
    for ground in ("white", "black", "orange"):
        image = Image.new("RGB", (800, 600), ground)
        picture = draw_marks(image, [Mark((200, 200, 400, 300), (230, 159, 0), "cat")])
        assert picture.size == (800, 600)
        assert picture.getpixel((300, 300)) == (230, 159, 0)
        assert picture.getpixel((300, 301)) == (0, 0, 0)
        assert picture.getpixel((300, 250)) == image.getpixel((300, 250))
        assert picture.getpixel((600, 500)) == image.getpixel((0, 0))
        assert image.getcolors() == [(800 * 600, image.getpixel((0, 0)))]  # the original is left alone


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (1, 3000), (3000, 1), (64, 48), (4000, 3000)])
def test_images_of_every_size_can_be_drawn_on(size):
    width, height = size
    picture = draw_marks(Image.new("RGB", size), [Mark((0, 0, width, height), (86, 180, 233), "toothbrush 0.98")])
    assert 640 <= max(picture.size) <= 4000
    assert picture.width * height == picture.height * width
    assert (86, 180, 233) in {color for _, color in picture.getcolors(2**24)}


@pytest.mark.parametrize("name", ["", "a\nb\x1b[31m", "\ud800", "猫 кошка", "x" * 500, "%s {0} $x$"])
def test_names_of_every_kind_can_be_written(name):
    draw_marks(Image.new("RGB", (100, 100)), [Mark((10, 10, 50, 50), (0, 0, 0), name)])


def test_marks_of_detections_name_class_and_score_the_surest_first():
    found = {
        "boxes": torch.tensor([[0.0, 0, 1, 1], [2, 2, 3, 3]]),
        "scores": torch.tensor([0.5, 0.75]),
        "labels": torch.tensor([1, 9]),
    }
    marks = detection_marks(found, {1: "cat"})
    assert [mark.text for mark in marks] == ["class 9 0.75", "cat 0.50"]
    assert [mark.color for mark in marks] == [class_color(9), class_color(1)]
    assert list(marks[0].box) == [2, 2, 3, 3]
