"""A data set to train on where there is none: overlapping shapes over clutter, in COCO layout, drawn from a seed."""

import json
import math
import random
from collections.abc import Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from balanced_learning.training.data.cache import cache_folder
from balanced_learning.training.errors import UserError
from balanced_learning.training.files import new_folder, reason_of, write_new

CATEGORIES = {1: "circle", 3: "rectangle", 7: "triangle", 20: "star"}  # sparse ids, as COCO's
SIDES = (128, 160)
HIDDEN = 0.6  # a shape covered by more than this share is not annotated
FIRST_VAL_ID = 481  # whatever is trained on, the same images are evaluated


def shapes_dataset(*, train: int = 1280, val: int = 120, seed: int = 0) -> Path:
    """Returns the folder of the data set, drawn unless it is in the cache (``$XDG_CACHE_HOME`` or ``~/.cache``).

    Seed and id decide an image. Those to evaluate have the ids from 481 on, those to train on the first others.
    """
    folder = cache_folder() / f"shapes-{train}-{val}-{seed}"
    if folder.is_dir():
        return folder
    print(f"drawing {train} + {val} images of shapes into {folder}")
    val_ids = range(FIRST_VAL_ID, FIRST_VAL_ID + val)
    train_ids = list(islice((image_id for image_id in count(1) if image_id not in val_ids), train))
    try:
        with new_folder(folder) as unfinished:
            for split, ids in (("train2017", train_ids), ("val2017", val_ids)):
                _draw_split(unfinished, split, ids, seed)
    except OSError as error:
        if not folder.is_dir():  # where it is, another process was faster
            raise UserError(f"{folder}: cannot be written ({reason_of(error)}); set XDG_CACHE_HOME") from None
    return folder


def _draw_split(root: Path, split: str, ids: Sequence[int], seed: int) -> None:
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id in tqdm(ids, f"drawing {split}", unit=" images", disable=None, delay=2, leave=False):
        image, shapes = _draw_image(random.Random(f"{seed}/{image_id}"))
        file_name = f"{image_id:06}.png"
        save = partial(image.save, format="PNG", compress_level=1)  # thrice as fast as the default
        write_new(root / split / file_name, save)
        images.append({"id": image_id, "file_name": file_name, "width": image.width, "height": image.height})
        for category_id, (x0, y0, x1, y1) in shapes:
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": category_id, "name": name} for category_id, name in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    text = json.dumps(content)
    write_new(root / "annotations" / f"instances_{split}.json", lambda file: file.write(text.encode()))


def _draw_image(rng: random.Random) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """An image and the category and box (x0, y0, x1, y1) of each shape on it."""
    size = (rng.choice(SIDES), rng.choice(SIDES))
    image = _clutter(rng, size)
    masks = []
    for _ in range(rng.randint(2, 9)):
        category = rng.choice(list(CATEGORIES))
        mask = _shape_mask(rng, CATEGORIES[category], size)
        image.paste(_texture(rng, size), mask=mask)
        masks.append((category, mask))
    return image.filter(ImageFilter.GaussianBlur(0.5)), _visible(masks, size)


def _visible(masks: list[tuple[int, Image.Image]], size: tuple[int, int]) -> list:
    """The shapes that later ones leave to be seen, by their whole box."""
    shapes = []
    free = Image.new("L", size, 255)
    for category, mask in reversed(masks):
        seen = Image.composite(free, Image.new("L", size), mask)
        whole = mask.histogram()[255]
        if whole and seen.histogram()[255] > (1 - HIDDEN) * whole:
            shapes.append((category, mask.getbbox()))
        free.paste(0, mask=mask)
    return shapes


def _shape_mask(rng: random.Random, name: str, size: tuple[int, int]) -> Image.Image:
    radius = 6 * 8 ** rng.random()  # 6 to 48 pixels, every octave as often
    x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
    turn = rng.uniform(0, 2 * math.pi)
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    if name == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return mask
    if name == "rectangle":
        slant = rng.uniform(0.5, 1.1)  # half the angle between the diagonals
        corners = [(1.0, turn + angle) for angle in (-slant, slant, math.pi - slant, math.pi + slant)]
    elif name == "triangle":
        corners = [(1.0, turn + angle * 2 * math.pi / 3) for angle in range(3)]
    else:
        corners = [(1.0 if i % 2 else 0.45, turn + i * math.pi / 5) for i in range(10)]
    draw.polygon([(x + radius * r * math.cos(a), y + radius * r * math.sin(a)) for r, a in corners], fill=255)
    return mask


def _color(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _texture(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """One colour running into another."""
    ramp = Image.linear_gradient("L").rotate(rng.uniform(0, 360)).resize(size)
    return Image.composite(Image.new("RGB", size, _color(rng)), Image.new("RGB", size, _color(rng)), ramp)


def _clutter(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A background of lines, arcs and dots that look like parts of shapes."""
    image = _texture(rng, size)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(5, 25)):
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        dx, dy = rng.uniform(-40, 40), rng.uniform(-40, 40)
        kind = rng.choice(("line", "arc", "dot"))
        if kind == "line":
            draw.line((x, y, x + dx, y + dy), fill=_color(rng), width=rng.randint(1, 4))
        elif kind == "arc":
            start = rng.uniform(0, 360)
            draw.arc((x, y, x + abs(dx), y + abs(dy)), start, start + rng.uniform(40, 180), fill=_color(rng), width=2)
        else:
            radius = rng.uniform(1, 3)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_color(rng))
    return image
