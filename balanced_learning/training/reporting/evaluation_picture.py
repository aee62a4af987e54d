"""The picture of an evaluation: objects found and missed, and beside them hits and false alarms."""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_area, box_convert, box_iou

from balanced_learning.training import randomness
from balanced_learning.training.data.coco import Entry
from balanced_learning.training.data.dataset import DetectionDataset
from balanced_learning.training.data.labels import class_name
from balanced_learning.training.errors import UserError, printable, warn
from balanced_learning.training.files import write_or_warn
from balanced_learning.training.reporting.pictures import (
    Color,
    Mark,
    as_image,
    draw_marks,
    intersections,
    load_font,
    shorten,
)
from balanced_learning.training.tide import MAX_DETECTIONS

NUM_IMAGES = 4
SHOWN_SCORE = 0.3
MATCH_IOU = 0.5
FOUND, MISSED, FALSE_ALARM, CROWD = (0, 158, 115), (213, 94, 0), (240, 228, 66), (160, 160, 160)
LEGEND: dict[str, Color] = {
    "hit: object found, and what found it": FOUND,
    "missed object": MISSED,
    "false alarm": FALSE_ALARM,
    "crowd, and what lies in it: ignored": CROWD,
}
PANEL = 640  # longer side of each of the two images of a row, in pixels
GAP, LINE_HEIGHT = 12, 26


def save_evaluation(
    path: Path, dataset: DetectionDataset, detections: dict[int, dict[str, Tensor]], names: dict[int, str], seed: int
) -> None:
    """Draws ground truth and detections side by side, for a few images that follow from the seed.

    Args:
        path: the PNG to write; where it cannot be, or an image cannot be read, a warning says so.
        dataset: the images evaluated, without augmentation. Those with boxes go first.
        detections: by image id, ``boxes``, ``scores`` and ``labels``, on the CPU. Those of a low score, those of
            labels without a name, and those beyond the best 100 are left out; so are images without an entry, which
            could not be read.
        names: of the labels.
        seed: of the choice. The same images are drawn after every epoch.
    """
    try:
        ids = dataset.split.columns.image_ids[dataset.positions].tolist()
        read = [index for index in choose_images(dataset, seed) if ids[index] in detections]
        rows = [_find_outcomes(dataset, index, detections, names) for index in read]
    except UserError as error:
        warn(f"{printable(path)}: not drawn ({error})")
        return
    drawn = [_draw_row(row) for row in rows]
    top = 2 * LINE_HEIGHT + 2 * GAP
    sheet = Image.new("RGB", (2 * PANEL + 3 * GAP, top + sum(row.height + GAP for row in drawn)), "white")
    _draw_header(ImageDraw.Draw(sheet), rows)
    for row in drawn:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    write_or_warn(path, lambda file: sheet.save(file, "PNG"))


def choose_images(dataset: DetectionDataset, seed: int, count: int = NUM_IMAGES) -> list[int]:
    """Indices of the images to draw, in an order that follows from the seed; those without a box are the last."""
    order = torch.randperm(len(dataset), generator=randomness.generator(seed, "pictures")).tolist()
    has_boxes = dataset.split.has_boxes()
    return sorted(order, key=lambda index: not has_boxes[dataset.positions[index]])[:count]


def match_detections(
    truth: dict[str, Tensor], crowds: dict[str, Tensor], detected: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tells hits, misses and false alarms apart, at an IoU of 0.5.

    As in COCO's evaluation, the detections of a class choose in the order of their scores: each the ground truth of its
    class that it overlaps most, among those not yet taken. What finds none and lies in a crowd is ignored.

    Args:
        truth, crowds: ``boxes`` [G, 4], xyxy, and ``labels`` [G].
        detected: ``boxes`` [N, 4], ``labels`` [N] and ``scores`` [N].

    Returns:
        tuple[Tensor[N], Tensor[N], Tensor[G]]: bool masks of the detections that are hits, of those that are ignored,
        and of the ground truths that are found.
    """
    boxes, labels = detected["boxes"], detected["labels"]
    ious = box_iou(boxes, truth["boxes"]) * (labels[:, None] == truth["labels"])  # [N, G]
    hit = torch.zeros(len(boxes), dtype=torch.bool)
    found = torch.zeros(len(truth["boxes"]), dtype=torch.bool)
    for index in detected["scores"].argsort(descending=True, stable=True).tolist() if len(found) else ():
        overlap, match = ious[index].masked_fill(found, 0).max(dim=0)
        if overlap >= MATCH_IOU:
            hit[index] = found[match] = True
    ignored = ~hit & _lies_in_crowd(boxes, labels, crowds)
    return hit, ignored, found


def _lies_in_crowd(boxes: Tensor, labels: Tensor, crowds: dict[str, Tensor]) -> Tensor:
    """Whether half of a box is inside a crowd of its class. [N]"""
    inside = intersections(boxes, crowds["boxes"]) >= MATCH_IOU * box_area(boxes)[:, None]  # [N, C]
    return (inside & (labels[:, None] == crowds["labels"])).any(dim=1)


class _Row(NamedTuple):
    image: Image.Image
    truth: list[Mark]
    detections: list[Mark]
    title: str
    counts: str


def _find_outcomes(
    dataset: DetectionDataset, index: int, detections: dict[int, dict[str, Tensor]], names: dict[int, str]
) -> _Row:
    image, truth = dataset[index]
    entry = dataset.split.images[int(dataset.positions[index])]
    crowds = _crowds(dataset, entry)
    detected = detections[truth["image_id"]]
    is_known = torch.isin(detected["labels"].long(), torch.tensor(list(names)))  # others do not count in AP either
    shown = (is_known & (detected["scores"] >= SHOWN_SCORE)).nonzero().flatten()
    shown = shown[detected["scores"][shown].argsort(descending=True, stable=True)[:MAX_DETECTIONS]]
    detected = {key: detected[key][shown] for key in ("boxes", "labels", "scores")}
    hit, ignored, found = match_detections(truth, crowds, detected)

    def marks(boxes: dict[str, Tensor], colors: list[Color], note: str = "") -> list[Mark]:
        texts = [class_name(names, int(label)) + note for label in boxes["labels"].tolist()]
        if "scores" in boxes:
            texts = [f"{text} {score:.2f}" for text, score in zip(texts, boxes["scores"].tolist(), strict=True)]
        return [Mark(*each) for each in zip(boxes["boxes"].tolist(), colors, texts, strict=True)]

    left = marks(truth, [FOUND if each else MISSED for each in found.tolist()])
    left += marks(crowds, [CROWD] * len(crowds["boxes"]), ", crowd")
    outcomes = zip(hit.tolist(), ignored.tolist(), strict=True)
    right = marks(
        detected, [FOUND if is_hit else CROWD if is_ignored else FALSE_ALARM for is_hit, is_ignored in outcomes]
    )
    alarms = int((~hit & ~ignored).sum())
    counts = f"{int(found.sum())} of {len(found)} found, {alarms} false alarm{'' if alarms == 1 else 's'}"
    return _Row(as_image(image), left, right, entry["file_name"], counts)


def _crowds(dataset: DetectionDataset, entry: Entry) -> dict[str, Tensor]:
    crowds = [a for a in dataset.split.annotations[entry["id"]] if a["iscrowd"]]
    boxes = torch.tensor([a["bbox"] for a in crowds], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([dataset.label_of[a["category_id"]] for a in crowds], dtype=torch.int64)
    return {"boxes": box_convert(boxes, "xywh", "xyxy"), "labels": labels}


def _draw_row(row: _Row) -> Image.Image:
    """Ground truth and detections side by side, under the file name and what is counted."""
    panels = [draw_marks(row.image, marks, PANEL / max(row.image.size)) for marks in (row.truth, row.detections)]
    drawn = Image.new("RGB", (2 * PANEL + 3 * GAP, panels[0].height + LINE_HEIGHT), "white")
    draw = ImageDraw.Draw(drawn)
    font = load_font(16)
    for column, (panel, text) in enumerate(zip(panels, (row.title, row.counts), strict=True)):
        start = GAP + column * (PANEL + GAP)
        draw.text((start, 2), shorten(text, font, PANEL), "black", font)
        drawn.paste(panel, (start, LINE_HEIGHT))
    return drawn


def _draw_header(draw: ImageDraw.ImageDraw, rows: list[_Row]) -> None:
    """A legend of both sides and of the colours."""
    font = load_font(16)
    for column, text in enumerate(("ground truth", f"detections with a score of {SHOWN_SCORE:g} or more")):
        draw.text((GAP + column * (PANEL + GAP), GAP), text, "black", load_font(18))
    has_crowds = any(mark.color == CROWD for row in rows for mark in row.truth)
    start = GAP
    for text, color in LEGEND.items():
        if color == CROWD and not has_crowds:
            continue
        draw.rectangle((start, GAP + LINE_HEIGHT + 2, start + 24, GAP + LINE_HEIGHT + 18), color, "black")
        draw.text((start + 32, GAP + LINE_HEIGHT), text, "black", font)
        start += 32 + round(font.getlength(text)) + 3 * GAP
