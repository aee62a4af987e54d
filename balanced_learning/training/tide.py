"""TIDE: how much average precision each kind of error costs a detector.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020. Every false detection and
every object that is not found gets one kind; the cost of a kind is what AP50 would gain if that kind alone were mended.
The parts of Libra R-CNN act on different kinds: balanced L1 on ``localisation``, the IoU-balanced sampler on
``background``, for it chooses the background that the second stage learns from.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

FALSE_KINDS = ("classification", "localisation", "both", "duplicate", "background")  # of detections
KINDS = (*FALSE_KINDS, "missed")
SPECIAL_KINDS = ("false positive", "false negative")  # all of one side together, TIDE's special errors

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1
MAX_DETECTIONS = 100  # of a class in an image; COCO counts no more
RECALLS = np.linspace(0, 1, 101)

_CLASSIFICATION, _LOCALISATION, _BOTH, _DUPLICATE, _BACKGROUND, _HIT, _IGNORED = range(len(FALSE_KINDS) + 2)


@dataclass(frozen=True)
class Boxes:
    """Boxes of all images, of the ground truth or detected, in the order of the images.

    Attributes:
        image: int64 [n], the index of the image.
        category: int64 [n], the index of the category.
        box: float64 [n, 4], x, y, width and height in pixels.
        area: float64 [n], in pixels; that of the object, which may be less than that of its box.
        crowd: bool [n], whether a box of the ground truth holds many objects; finding those is neither right nor wrong.
        score: float64 [n], of detections.
    """

    image: NDArray[np.int64]
    category: NDArray[np.int64]
    box: NDArray[np.float64]
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    score: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.image)

    def take(self, indices: NDArray | slice) -> "Boxes":
        return Boxes(*(values[indices] for values in vars(self).values()))

    def by_image(self, num_images: int) -> list["Boxes"]:
        edges = np.searchsorted(self.image, np.arange(num_images + 1))
        return [self.take(slice(*edge)) for edge in pairwise(edges)]


@dataclass(frozen=True)
class Errors:
    """The errors of each category.

    Attributes:
        ap50: float64 [K], the average precision at IoU 0.5; NaN where a category has no ground truth.
        counts: by kind, int64 [K]; a false detection counts for its own category, a missed object for its own.
        costs: by kind, float64 [K], what ``ap50`` would gain without the kind; not negative.
    """

    ap50: NDArray[np.float64]
    counts: dict[str, NDArray[np.int64]]
    costs: dict[str, NDArray[np.float64]]


def find_errors(truth: Boxes, found: Boxes, num_images: int, num_categories: int) -> Errors:
    """Gives every error its kind and its cost.

    The kind of a false detection is the first that applies, by its IoU with objects:

    - ``localisation``: 0.1 or more, but less than 0.5, with an object of its class;
    - ``classification``: 0.5 or more with an object of another class;
    - ``duplicate``: 0.5 or more with an object of its class, which a detection of higher score has found;
    - ``background``: 0.1 or less with every object;
    - ``both``: more than 0.1, but less than 0.5, with an object of another class.

    Mended, one of the first two finds its object, if no detection has found it and no error of higher score would; all
    others vanish. ``missed`` is an object that no detection has found and no mended one would; mended, it is not asked
    for. A class of which nothing is asked any more has a precision of 1 without detections and 0 with them.

    Detections are matched as COCO does it, so that ``ap50`` is COCO's. This is why two things differ from tidecv: what
    lies in a crowd is no error here, and a class without ground truth counts for nothing rather than as 0.

    Args:
        truth: the ground truth.
        found: the detections.
        num_images: the images that ``image`` counts.
        num_categories: K, the categories that ``category`` counts.
    """
    pairs = zip(truth.by_image(num_images), found.by_image(num_images), strict=True)
    judged = [_judge(objects, _counted(detections)) for objects, detections in pairs]
    score, category, kind, mended, missed, unfound = (np.concatenate(parts) for parts in zip(*judged, strict=True))
    order = np.argsort(-score, kind="stable")
    order = order[kind[order] != _IGNORED]
    category, kind, mended = category[order], kind[order], mended[order]
    hit = kind == _HIT

    def count(categories: NDArray) -> NDArray[np.int64]:
        return np.bincount(categories, minlength=num_categories)

    objects = count(truth.category[~truth.crowd])
    counts = {name: count(category[kind == i]) for i, name in enumerate(FALSE_KINDS)}
    counts |= {"missed": count(missed), "false positive": count(category[~hit]), "false negative": count(unfound)}

    without = {}  # AP50 without the kind
    for i, name in enumerate(FALSE_KINDS):
        changed = np.where(kind == i, mended, category)
        left = changed >= 0
        without[name] = _average_precision(changed[left], (hit | (kind == i))[left], objects)
    without["missed"] = _average_precision(category, hit, objects - counts["missed"])
    without["false positive"] = _average_precision(category[hit], hit[hit], objects)
    without["false negative"] = _average_precision(category, hit, objects - counts["false negative"])

    ap50 = np.where(objects > 0, _average_precision(category, hit, objects), np.nan)
    return Errors(ap50, counts, {name: np.maximum(value - ap50, 0) for name, value in without.items()})


def _counted(found: Boxes) -> Boxes:
    """The detections of an image that COCO counts, the highest score first."""
    found = found.take(np.argsort(-found.score, kind="stable"))
    by_category = np.argsort(found.category, kind="stable")
    category = found.category[by_category]
    rank = np.arange(len(found)) - np.searchsorted(category, category)  # within the category
    return found.take(np.sort(by_category[rank < MAX_DETECTIONS]))


def _judge(truth: Boxes, found: Boxes) -> tuple[NDArray, ...]:
    """Judges the detections of an image, which come in order of their scores.

    Returns:
        Of each detection its score, its category, the index of its kind, and the category in which it is right once it
        is mended, or -1; then the categories of the objects that are missed, and of all that no detection has found.
    """
    num_found, num_objects = len(found), len(truth)
    if num_found and num_objects:
        iou = mask.iou(found.box, truth.box, truth.crowd.astype(np.uint8))  # [D, G]
    else:
        iou = np.zeros((num_found, num_objects))
    same = found.category[:, None] == truth.category
    own, other = iou * (same & ~truth.crowd), iou * (~same & ~truth.crowd)

    finder = np.full(num_objects, -1)  # the detection that has found the object
    for detection in np.flatnonzero((own >= FOREGROUND_IOU).any(1)):
        free = np.where(finder < 0, own[detection], 0)[::-1]  # of equal IoUs the last, as in COCO's loop
        if free.max() >= FOREGROUND_IOU:
            finder[num_objects - 1 - free.argmax()] = detection

    best_own, best_other = own.max(1, initial=0), other.max(1, initial=0)
    kind = np.select(
        [
            np.isin(np.arange(num_found), finder),
            (iou * (same & truth.crowd)).max(1, initial=0) >= FOREGROUND_IOU,
            (best_own >= BACKGROUND_IOU) & (best_own < FOREGROUND_IOU),
            best_other >= FOREGROUND_IOU,
            best_own >= FOREGROUND_IOU,
            best_other <= BACKGROUND_IOU,
        ],
        [_HIT, _IGNORED, _LOCALISATION, _CLASSIFICATION, _DUPLICATE, _BACKGROUND],
        _BOTH,
    )

    mended, wanted = np.full(num_found, -1), np.zeros(num_objects, bool)
    for detection in np.flatnonzero(np.isin(kind, (_LOCALISATION, _CLASSIFICATION))):
        target = (own if kind[detection] == _LOCALISATION else other)[detection].argmax()
        if finder[target] < 0 and not wanted[target]:
            wanted[target] = True
            mended[detection] = truth.category[target]
    unfound = (finder < 0) & ~truth.crowd
    return found.score, found.category, kind, mended, truth.category[unfound & ~wanted], truth.category[unfound]


def _average_precision(category: NDArray, hit: NDArray, objects: NDArray) -> NDArray[np.float64]:
    """COCO's average over 101 recalls of the highest precision at that recall or above it.

    Args:
        category: [n], of the detections in order of their scores, the highest first.
        hit: bool [n], which of them are right.
        objects: [K], the number of objects to find.

    Returns:
        [K], the average precision of each category.
    """
    by_category = np.argsort(category, kind="stable")
    edges = np.searchsorted(category[by_category], np.arange(len(objects) + 1))
    result = np.empty(len(objects))
    for k, (start, end) in enumerate(pairwise(edges)):
        if objects[k] == 0:
            result[k] = start == end
            continue
        hits = np.cumsum(hit[by_category[start:end]])
        precision = np.maximum.accumulate((hits / np.arange(1, end - start + 1))[::-1])[::-1]
        place = np.searchsorted(hits / objects[k], RECALLS)
        result[k] = np.append(precision, 0)[place].mean()
    return result
