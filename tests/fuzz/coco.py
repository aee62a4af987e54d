"""Spoils data sets in COCO layout and the index of them, and uses what is taken."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from balanced_learning.training.config import Config
from balanced_learning.training.data import coco
from balanced_learning.training.data.coco import Split, read_split
from balanced_learning.training.data.dataset import DetectionDataset
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.data.splits import read_splits
from tests.fuzz.spoiling import PLAIN, cut, flip, nested, replace_value, spoil_bytes
from tests.fuzz.verdict import ACCEPTED, REFUSED, SAME, WrongError, digest, read

NUMBERS = ("NaN", "-Infinity", "1e999", "1" * 5000, "-0", "0x1", "1_0", "1.", "01", "9223372036854775808", "1e-400")
TEXTS = (r'"\ud800"', r'"\u0000"', r'"\u001b[2J"', '"\x01"', r'"a\nb"', '"../1.png"', '"pipe"', '"/dev/zero"', '"."')
VALUES: list[Callable[[Random], Any]] = [
    *PLAIN,
    lambda r: r.choice(("1.png", "sub/3.png", "pipe", "zero", ".", "..", "/", "/dev/zero", "1.png\0", "x" * 300)),
    lambda r: [r.choice((-5, 0, 1, 1e-9, 3e9, 1e308, "4", None, True)) for _ in range(r.choice((3, 4, 4, 4, 5)))],
    lambda r: [float(r.randrange(-5, 40)) for _ in range(4)],
]


class Coco:
    """Ways to spoil a data set, by name; each does so once, and returns what became of it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "data"
        self.cache = folder / "cache" / "balanced-learning"
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        self.whole = _make_data(self.root)
        self.json = self.root / "annotations" / "instances_train2017.json"
        self.text = self.json.read_bytes()
        split = read(lambda: read_split(self.root, "train2017"))
        if split is None:
            raise WrongError("the data cannot be read as they are")
        self.before = digest(_use(split))
        self.ways: dict[str, Callable[[Random], str]] = {
            "coco: flip": lambda r: self._read(flip(self.text, r), r),
            "coco: bytes": lambda r: self._read(spoil_bytes(self.text, r), r),
            "coco: cut": lambda r: self._read(cut(self.text, r), r),
            "coco: values": self._values,
            "coco: literals": self._literals,
            "coco: keys twice": self._keys_twice,
            "coco: nesting": self._nesting,
            "coco: index": self._index,
            "coco: header of the index": self._header,
        }

    def _read(self, text: bytes, random: Random) -> str:
        self.json.write_bytes(text)
        if random.random() < 0.2:
            values = {"data_path": self.root, "min_size": 32, "max_size": 64, "keep_empty": random.random() < 0.5}
            splits = read(lambda: read_splits(Config.of(values)))
            split = splits[0] if splits else None
        else:
            resized = (32, 64) if random.random() < 0.5 else None
            split = read(lambda: read_split(self.root, "train2017", resized=resized))
        if split is None:
            return REFUSED
        return SAME if digest(_use(split)) == self.before else ACCEPTED

    def _values(self, random: Random) -> str:
        content = self.whole
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            content, _ = replace_value(content, random, VALUES)
        try:
            text = json.dumps(content, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError):  # which are no JSON
            return REFUSED
        return self._read(text, random)

    def _literals(self, random: Random) -> str:
        """Puts what is hardly JSON in the place of a value."""
        marked, _ = replace_value(self.whole, random, [lambda _: "@"])
        new = random.choice(NUMBERS + TEXTS)
        return self._read(json.dumps(marked).replace('"@"', new).encode("utf-8", "surrogatepass"), random)

    def _keys_twice(self, random: Random) -> str:
        """Writes a key of some object twice."""
        text = json.dumps(self.whole)
        at = random.choice([i for i, character in enumerate(text) if character == "{"])
        key = random.choice(("id", "image_id", "bbox", "images", "categories", "annotations", "file_name", "name"))
        value = random.choice(("1", "null", "[]", '"x"', "{}", "[0, 0, 5, 5]", "[{}]"))
        if random.random() < 0.5:
            return self._read(f'{text[: at + 1]}"{key}": {value}, {text[at + 1 :]}'.encode(), random)
        at = random.choice([i for i, character in enumerate(text) if character == "}"])
        return self._read(f'{text[:at]}, "{key}": {value}{text[at:]}'.encode(), random)

    def _nesting(self, random: Random) -> str:
        depth = random.choice((10, 500, 900, 1100, 5000, 100_000))
        opening, closing = random.choice((("[", "]"), ('{"a":', "}"), ("[", ""), ('{"a":', "")))
        marked, _ = replace_value(self.whole, random, [lambda _: "@"])
        middle = random.choice(("1", ""))
        return self._read(
            json.dumps(marked).replace('"@"', opening * depth + middle + closing * depth).encode(), random
        )

    def _with_index(self, spoil: Callable[[Path], None]) -> str:
        """Reads the data once for the index, spoils this, and reads again: it is as it was."""
        if self.json.read_bytes() != self.text:
            self.json.write_bytes(self.text)
        large, coco.LARGE = coco.LARGE, 0
        try:
            read(lambda: read_split(self.root, "train2017"))
            (folder,) = self.cache.iterdir()
            spoil(folder)
            split = read(lambda: read_split(self.root, "train2017"))
            if split is None or digest(_use(split)) != self.before:
                raise WrongError("a damaged index changes the data")
            return SAME
        finally:
            coco.LARGE = large

    def _index(self, random: Random) -> str:
        def spoil(folder: Path) -> None:
            file = random.choice(sorted(folder.iterdir()))
            data = file.read_bytes()
            way = random.choice((flip, cut, spoil_bytes, None))
            if way is None:
                file.unlink()
                other = random.choice(("nothing", "folder", "pipe", "link"))
                if other == "folder":
                    file.mkdir()
                elif other == "pipe":
                    os.mkfifo(file)
                elif other == "link":
                    file.symlink_to("/dev/zero")
            else:
                file.write_bytes(way(data, random))

        return self._with_index(spoil)

    def _header(self, random: Random) -> str:
        def spoil(folder: Path) -> None:
            file = folder / "header.json"
            content, _ = replace_value(json.loads(file.read_text()), random, PLAIN)
            try:
                file.write_text(json.dumps(content))
            except ValueError:
                file.write_text(json.dumps(nested(random)))

        return self._with_index(spoil)


def _make_data(root: Path) -> Any:
    for name, ids in (("train2017", (1, 2, 3)), ("val2017", (4,))):
        (root / name / "sub").mkdir(parents=True)
        files = {image_id: f"sub/{image_id}.png" if image_id == 3 else f"{image_id}.png" for image_id in ids}
        for file in files.values():
            Image.new("RGB", (40, 30), "navy").save(root / name / file)
        content = {
            "info": {"year": 2017},
            "images": [{"id": i, "file_name": files[i], "width": 40, "height": 30} for i in ids],
            "annotations": [
                {"id": 10 * i + j, "image_id": i, "category_id": 90 if j else 3, "bbox": [1.5, 2, 20 + j, 10.25],
                 "area": 200.5, "iscrowd": int(i == 2 and j == 1), "segmentation": [[1, 2, 3, 4, 5, 6]]}
                for i in ids for j in range(2)
            ],
            "categories": [{"id": 3, "name": "car"}, {"id": 90, "name": "toothbrush", "supercategory": "x"}],
        }  # fmt: skip
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
        if name == "train2017":
            os.mkfifo(root / name / "pipe")
            (root / name / "zero").symlink_to("/dev/zero")
            whole = content
    return whole


def _use(split: Split) -> list[Any]:
    """Does what training does with what was read, and returns it."""
    columns = split.columns
    if not all(np.isfinite(array).all() for array in (columns.boxes, columns.areas, columns.widths)):
        raise WrongError("numbers that are not finite")
    entries = [list(split.images), [split.annotations[image["id"]] for image in split.images], split.categories]
    json.dumps(entries, allow_nan=False)
    labels = Labels.of(split)
    dataset = DetectionDataset(split, labels.label_of)
    for index in range(len(dataset)):
        sample = read(lambda index=index: dataset[index])  # type: ignore[misc]
        if sample is None:
            raise WrongError("an image that was checked cannot be read")
        image, target = sample
        if not (image.isfinite().all() and target["boxes"].isfinite().all()):
            raise WrongError("boxes that are not finite")
        if (target["boxes"][:, 2:] <= target["boxes"][:, :2]).any():
            raise WrongError(f"boxes without area: {target['boxes'].tolist()}")
    return entries
