"""Seconds and memory of reading the annotations of COCO and of data as large as Objects365, beside pycocotools.

    python benchmarks/reading_speed.py --folder big-disk     # draws 5 GB of JSON there, once, and keeps it

Writes benchmarks/results/reading_speed.json with seconds and memory, device, versions and commit, and prints the
table of docs/guides/own_data.md. Annotations are drawn, as many as the real ones and as long; the images are links to a
few files. Every figure is that of a process of its own, beyond what its imports took. Memory is what stays resident
when all is read, without mapped files, of which the system takes back what it needs.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from _common import environment, markdown, parser, write

ROOT = Path(__file__).resolve().parents[1]
CASES = {"COCO": (118_287, 860_001, 30), "Objects365": (2_000_000, 30_000_000, 0)}  # images, boxes, points of a polygon
QUICK = {"COCO": (300, 2_000, 30)}
CATEGORIES = 365
LINKS = 30_000  # to one file; file systems allow few more
READERS = {
    "pycocotools": "from pycocotools.coco import COCO; read = lambda: COCO(str(json_file))",
    "ours, JSON alone": "from balanced_learning.training.data.coco_json import read_json; "
    "read = lambda: read_json(json_file)",
    "ours, first start": "from balanced_learning.training.data.coco import read_split; "
    "read = lambda: read_split(root, 'train2017', anew=True)",
    "ours, later starts": "from balanced_learning.training.data.coco import read_split; "
    "read = lambda: read_split(root, 'train2017')",
}
STARTS = [name for name in READERS if "start" in name]
MEASURE = """
import contextlib, gc, json, os, re, sys, time
from pathlib import Path
import numpy, torch
def memory():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
root = Path(sys.argv[1])
json_file = root / "annotations" / "instances_train2017.json"
{reader}
before, start = memory(), time.perf_counter()
with contextlib.redirect_stdout(sys.stderr):
    data = read()
seconds = time.perf_counter() - start
gc.collect()
print(json.dumps({{"seconds": seconds, "mebibytes": memory() - before}}))
"""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--folder", type=Path, default=ROOT / "build" / "reading", help="for what is drawn")
    args = arguments.parse_args()
    os.environ["XDG_CACHE_HOME"] = str(args.folder.resolve() / "cache")
    results: dict[str, Any] = environment("cpu")
    results["rows"] = []
    for name, (images, boxes, points) in (QUICK if args.quick else CASES).items():
        root = args.folder.resolve() / f"{name}-{images}"
        draw(root, images, boxes, points)
        size = (root / "annotations" / "instances_train2017.json").stat().st_size
        row: dict[str, Any] = {"what": name, "images": images, "boxes": boxes, "bytes": size, "readers": {}}
        for reader in STARTS if boxes > 5_000_000 else READERS:  # pycocotools would need some 50 GB
            print(f"{name}: {reader}", flush=True)
            command = [sys.executable, "-c", MEASURE.format(reader=READERS[reader]), str(root)]
            run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            row["readers"][reader] = json.loads(run.stdout)
        results["rows"].append(row)
    write(args.output / "reading_speed.json", results)
    print(f"\n{table(results)}")


def table(results: dict[str, Any]) -> str:
    """Seconds and memory as Markdown, a row a data set and reader."""
    rows = []
    for row in results["rows"]:
        data = f"{row['what']}: {row['images']:,} images, {row['boxes']:,} boxes, {row['bytes'] / 2**20:,.0f} MiB"
        for reader, figures in row["readers"].items():
            seconds, memory = f"{figures['seconds']:.1f} s", f"{figures['mebibytes']:,.0f} MiB"
            rows.append({"": data, "read by": reader, "time": seconds, "memory": memory})
    return markdown(rows)


def draw(root: Path, images: int, boxes: int, points: int) -> None:
    """Draws annotations in the form of COCO's, and links for the images, unless they are there."""
    if (root / "drawn").exists():
        return
    start = time.perf_counter()
    folder = root / "train2017"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    rng = random.Random(0)
    polygon = "".join(f"{rng.uniform(0, 640):.2f}, " for _ in range(2 * points))
    categories = [{"supercategory": "thing", "id": i, "name": f"category {i}"} for i in range(1, CATEGORIES + 1)]
    with (root / "annotations" / "instances_train2017.json").open("w") as file:
        file.write('{"categories": ' + json.dumps(categories))
        write_list(file, "images", (image_entry(i) for i in range(images)))
        write_list(file, "annotations", (box_entry(rng, i, images, polygon) for i in range(boxes)))
        file.write("}")
    for i in range(images):
        path = folder / f"{i:012}.jpg"
        path.unlink(missing_ok=True)
        if i % LINKS == 0:
            Image.new("RGB", (640, 480)).save(path)
            source = path
        else:
            path.hardlink_to(source)
    (root / "drawn").touch()
    print(f"drew {root.name} in {time.perf_counter() - start:.0f} s", flush=True)


def write_list(file: TextIO, key: str, entries: Iterator[str]) -> None:
    file.write(f', "{key}": [{next(entries)}')
    file.writelines(f", {entry}" for entry in entries)
    file.write("]")


def image_entry(i: int) -> str:
    return (
        f'{{"license": 1, "file_name": "{i:012}.jpg", "height": 480, "width": 640, '
        f'"date_captured": "2013-11-14 17:02:52", "id": {3 * i + 1}}}'
    )


def box_entry(rng: random.Random, i: int, images: int, polygon: str) -> str:
    x, y, width, height = rng.randrange(500), rng.randrange(400), rng.randrange(10, 140), rng.randrange(10, 80)
    segmentation = f"[[{polygon}{x}.5, {y}.25]]" if polygon else "[]"
    return (
        f'{{"segmentation": {segmentation}, "area": {width * height}, "iscrowd": 0, '
        f'"image_id": {3 * rng.randrange(images) + 1}, "bbox": [{x}.42, {y}.17, {width}, {height}], '
        f'"category_id": {rng.randrange(1, CATEGORIES + 1)}, "id": {i + 1}}}'
    )


if __name__ == "__main__":
    main()
