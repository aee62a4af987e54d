"""Images with boxes drawn on them: a colour a class, and labels that cover neither each other nor leave the image."""

import colorsys
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_area
from torchvision.transforms.v2.functional import to_pil_image

from balanced_learning.training.data.labels import class_name

Color = tuple[int, int, int]

SMALLEST_SIDES = 160, 640  # of a picture, the shorter and the longer one in pixels, to have room for words
LARGEST_SIDE = 2000  # of a picture that is enlarged
# Okabe and Ito's colours, which the colour-blind tell apart too, without their black.
PALETTE: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
MOST_HIDDEN = 0.25  # of a box by a label, if there is another place near
GOLDEN_RATIO = (5**0.5 - 1) / 2


class Mark(NamedTuple):
    """A box to draw on an image."""

    box: Sequence[float]  # xyxy in pixels of the image
    color: Color
    text: str


def class_color(label: int) -> Color:
    """The colour of a class, always the same: of the palette for labels 1 to 7, then hues in steps of the golden ratio.

    Example:
        >>> class_color(1)
        (230, 159, 0)
    """
    if 1 <= label <= len(PALETTE):
        return PALETTE[label - 1]
    lightness, saturation = (0.5, 1.0) if label % 2 else (0.72, 0.85)
    red, green, blue = colorsys.hls_to_rgb(label * GOLDEN_RATIO % 1, lightness, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


def detection_marks(found: dict[str, Tensor], names: dict[int, str]) -> list[Mark]:
    """Marks of detections with name and score, in the colours of their classes, the surest first."""
    columns = (found[key].tolist() for key in ("boxes", "scores", "labels"))
    ranked = sorted(zip(*columns, strict=True), key=lambda row: -row[1])
    return [Mark(box, class_color(label), f"{class_name(names, label)} {score:.2f}") for box, score, label in ranked]


def as_image(image: Tensor) -> Image.Image:
    """An image [3, H, W] in [0, 1], of any device."""
    return to_pil_image(image.cpu().clamp(0, 1))


def draw_marks(image: Image.Image, marks: Sequence[Mark], scale: float | None = None) -> Image.Image:
    """Returns a copy with marks on it.

    Outlines are dark at their edges, to be seen on any ground. A mark has no label where there is no room near it.

    Args:
        image: RGB.
        marks: the most important first: they are on top, and their labels are the nearest.
        scale: size of the picture, in sizes of the image; by default a small image is enlarged.
    """
    scale = _enlargement(*sorted(image.size)) if scale is None else scale
    width, height = (max(1, round(side * scale)) for side in image.size)
    picture = image.copy() if scale == 1 else image.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    line = max(2, round(max(width, height) / 400))
    font = load_font(max(14, round(max(width, height) / 60)))
    boxes = torch.tensor([mark.box for mark in marks], dtype=torch.float32).reshape(-1, 4) * scale
    boxes = boxes.minimum(torch.tensor([width, height] * 2) - 1).clamp(min=0).round()
    for mark, box in reversed(list(zip(marks, boxes.tolist(), strict=True))):
        _outline(draw, box, mark.color, line)
    texts = [shorten(mark.text, font, 0.9 * width) for mark in marks]
    margin = line
    sizes = torch.tensor([_extent(text, font, margin) for text in texts], dtype=torch.float32).reshape(-1, 2)
    places = place_labels(boxes, sizes, (width, height))
    for mark, text, box, size, place in zip(marks, texts, boxes.tolist(), sizes.tolist(), places, strict=True):
        if place is None:
            continue
        (x, y), (w, h) = place, size
        near = [min(max(at, low), high) for at, low, high in zip((x + w / 2, y + h / 2), box[:2], box[2:], strict=True)]
        if not (x <= near[0] <= x + w and y <= near[1] <= y + h):
            draw.line((*near, x + w / 2, y + h / 2), mark.color, max(1, line // 2))
        draw.rectangle((x, y, x + w - 1, y + h - 1), mark.color)
        draw.text((x + margin, y + margin), text, _text_color(mark.color), font, anchor="la")
    return picture


def _enlargement(shorter: int, longer: int) -> int:
    """The whole factor by which an image is enlarged to have room for words, short of making it huge."""
    wanted = max(math.ceil(SMALLEST_SIDES[0] / shorter), math.ceil(SMALLEST_SIDES[1] / longer))
    return max(1, min(wanted, LARGEST_SIDE // longer))


def place_labels(boxes: Tensor, sizes: Tensor, canvas: tuple[int, int]) -> list[tuple[float, float] | None]:
    """Finds places for labels, at their boxes or as near as there is room, greedily in the order given.

    No two overlap and none leaves the canvas. A place that hides no box is taken before a nearer one that does.

    Args:
        boxes: [N, 4], xyxy in pixels, within the canvas.
        sizes: width and height of each label. [N, 2]
        canvas: width and height.

    Returns:
        The upper left corner of each label; None where no free place is near.
    """
    taken = torch.empty(0, 4)
    places: list[tuple[float, float] | None] = []
    for box, size, most in zip(boxes, sizes, torch.tensor(canvas) - sizes, strict=True):
        corners = _corners_near(box, size).clamp(min=0).minimum(most)
        spots = torch.cat([corners, corners + size], dim=1)  # [K, 4]
        is_free = (intersections(spots, taken) == 0).all(dim=1)
        hides_none = (intersections(spots, boxes) <= MOST_HIDDEN * box_area(boxes)).all(dim=1)
        rank = is_free.int() + (is_free & hides_none).int()
        best = int(rank.argmax())  # the first of them
        if most.min() < 0 or not is_free[best]:
            places.append(None)
            continue
        taken = torch.cat([taken, spots[best : best + 1]])
        x, y = corners[best].tolist()
        places.append((x, y))
    return places


def intersections(first: Tensor, second: Tensor) -> Tensor:
    """The areas of the intersections of boxes. [K, 4], [P, 4] -> [K, P]"""
    low = torch.maximum(first[:, None, :2], second[:, :2])
    high = torch.minimum(first[:, None, 2:], second[:, 2:])
    return (high - low).clamp(min=0).prod(dim=2)


def _corners_near(box: Tensor, size: Tensor) -> Tensor:
    """Upper left corners for a label, the best first: at the corners of its box, then farther away. [K, 2]"""
    (x1, y1, x2, y2), (w, h) = box.tolist(), size.tolist()
    at_corners = [(x, y) for x in (x1, x2 - w) for y in (y1 - h, y1, y2, y2 - h)]
    at_sides = [(x, y) for x in (x2, x1 - w) for y in (y1, y2 - h)]
    around = torch.cartesian_prod(
        torch.arange(x1 - 2 * w, x2 + w, max(w / 2, 1)).round(), torch.arange(y1 - 4 * h, y2 + 3 * h, max(h, 1)).round()
    )
    distance = (around - torch.tensor([x1, y1 - h])).square().sum(dim=1)
    return torch.cat([torch.tensor(at_corners + at_sides), around[distance.argsort(stable=True)]])


def _outline(draw: ImageDraw.ImageDraw, box: Sequence[float], color: Color, line: int) -> None:
    x1, y1, x2, y2 = box
    x2, y2 = max(x1, x2), max(y1, y2)
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=line + 2)
    draw.rectangle((x1, y1, x2, y2), outline=color, width=line)


@lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text in one line of printable characters, with an end that fits into a width."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _extent(text: str, font: ImageFont.FreeTypeFont, margin: int) -> tuple[int, int]:
    ascent, descent = font.getmetrics()
    return round(font.getlength(text)) + 2 * margin, ascent + descent + 2 * margin


def _text_color(ground: Color) -> Color:
    """Black or white, whichever stands out."""
    red, green, blue = ground
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else (255, 255, 255)
