"""Proposal recall, against pycocotools and situations whose answer is known."""

import contextlib
import io

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.columns import Columns, pack
from balanced_learning.training.recall import IOU_THRESHOLDS, best_of, evaluate_proposals, proposal_recall

NAMES = ["AR100", "AR300", "AR1000"]


def make_split(images, crowds=(), categories=None):
    """``images``: each a list of boxes (x, y, width, height); ``crowds``: numbers of the boxes that hold a crowd."""
    boxes = np.array([box for image in images for box in image], float).reshape(-1, 4)
    names, name_ends = pack([f"{i}.png" for i in range(len(images))])
    crowd = np.isin(np.arange(len(boxes)), list(crowds))
    columns = Columns(
        image_ids=np.arange(10, 10 + len(images)),
        widths=np.full(len(images), 500, np.int32),
        heights=np.full(len(images), 500, np.int32),
        names=names,
        name_ends=name_ends,
        first_boxes=np.cumsum([0, *map(len, images)]),
        boxes=boxes,
        areas=boxes[:, 2] * boxes[:, 3],
        category_ids=np.array(categories if categories else [1] * len(boxes)),
        crowds=crowd,
        entries=np.arange(len(boxes), dtype=np.int32),
    )
    return Split("data.json", "images", {1: "a", 2: "b"}, columns, crowd.astype(np.uint8))


def found(*images):
    """Proposals of xywh boxes, from the highest score on."""
    xywh = [torch.tensor(image, dtype=torch.float64).reshape(-1, 4) for image in images]
    return {
        10 + i: {
            "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
            "scores": torch.linspace(1, 0.1, len(boxes)),
            "labels": torch.ones(len(boxes), dtype=torch.int64),
        }
        for i, boxes in enumerate(xywh)
    }


def pycocotools_recall(split, proposals):
    api, results = COCO(), COCO()
    truth, boxes = split.columns, []
    images = [{"id": int(i)} for i in truth.image_ids]
    annotations = [
        {"image_id": int(truth.image_ids[i]), "bbox": b.tolist(), "area": float(a), "iscrowd": int(c), "category_id": 1}
        for i, b, a, c in zip(truth.image_of_boxes(), truth.boxes, truth.areas, truth.crowds, strict=True)
    ]
    for image_id, image in proposals.items():
        for box, score in zip(image["boxes"].tolist(), image["scores"].tolist(), strict=True):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            boxes.append({"image_id": image_id, "bbox": xywh, "area": xywh[2] * xywh[3], "score": score})
    for each, rows in ((api, annotations), (results, [b | {"category_id": 1, "iscrowd": 0} for b in boxes])):
        rows = [row | {"id": n, "ignore": row["iscrowd"]} for n, row in enumerate(rows, 1)]
        each.dataset = {"images": images, "annotations": rows, "categories": [{"id": 1}]}
        with contextlib.redirect_stdout(io.StringIO()):
            each.createIndex()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(api, results, "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [100, 300, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0, 0, :]  # [T, limits], -1 where there is no truth
    return {name: recall[:, i].mean() if recall.min() >= 0 else None for i, name in enumerate(NAMES)}


def test_agrees_with_pycocotools():
    generator = np.random.default_rng(0)
    images = [np.c_[generator.uniform(0, 400, (n, 2)), generator.uniform(5, 100, (n, 2))] for n in (0, 1, 7, 40)]
    near = [np.repeat(image, 12, axis=0) + generator.normal(0, 6, (12 * len(image), 4)) for image in images]
    far = [np.c_[generator.uniform(0, 400, (700, 2)), generator.uniform(5, 100, (700, 2))] for _ in images]
    proposals = [generator.permutation(np.r_[a, b]).clip(1) for a, b in zip(near, far, strict=True)]
    split = make_split([image.tolist() for image in images], crowds=[3, 20])
    ours, theirs = proposal_recall(split, found(*proposals)), pycocotools_recall(split, found(*proposals))
    assert 0.1 < ours["AR100"] < ours["AR300"] < ours["AR1000"] < 1
    assert ours == pytest.approx(theirs, abs=1e-6)


boxes = st.lists(st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(1, 6)] * 2), max_size=12)


@given(st.lists(st.tuples(boxes, boxes), min_size=1, max_size=3), st.sets(st.integers(0, 8)))
def test_agrees_with_pycocotools_where_boxes_share_ious(images, crowds):
    truth, proposals = zip(*images, strict=True)
    split = make_split(truth, crowds)
    ours, theirs = proposal_recall(split, found(*proposals)), pycocotools_recall(split, found(*proposals))
    if theirs["AR100"] is None:
        assert ours == dict.fromkeys(NAMES)
    else:
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_the_thresholds_are_those_of_coco():
    assert IOU_THRESHOLDS.tolist() == COCOeval(iouType="bbox").params.iouThrs.tolist()


def test_only_the_first_proposals_count():
    split = make_split([[(0, 0, 10, 10), (50, 50, 10, 10)]])
    proposals = [(0, 0, 10, 10)] + [(200, 200, 5, 5)] * 299 + [(50, 50, 10, 10)]
    assert proposal_recall(split, found(proposals)) == {"AR100": 0.5, "AR300": 0.5, "AR1000": 1.0}


def test_crowds_and_categories_do_not_count():
    split = make_split([[(0, 0, 10, 10), (50, 50, 90, 90)]], crowds=[1], categories=[1, 2])
    assert proposal_recall(split, found([(0, 0, 10, 10)]))["AR100"] == 1.0
    assert proposal_recall(split, {})["AR1000"] == 0.0
    assert proposal_recall(make_split([[]]), found([(0, 0, 1, 1)])) == dict.fromkeys(NAMES)


def test_coco_counts_the_same_100_of_one_category():
    generator = np.random.default_rng(1)
    truth = np.c_[generator.uniform(0, 400, (30, 2)), generator.uniform(20, 60, (30, 2))]
    proposals = generator.permutation(np.repeat(truth, 20, axis=0) + generator.normal(0, 4, (600, 4)))
    split = make_split([truth.tolist()], categories=[1, 2] * 15).as_one_category()
    assert split.categories == {1: "object"}
    evaluation = evaluate_proposals(split, found(proposals), {1: 1}, "pycocotools")
    as_detections = evaluate_proposals(split, best_of(found(proposals), 100), {1: 1}, "pycocotools")
    assert evaluation.metrics["AR100"] < evaluation.metrics["AR1000"]
    assert evaluation.metrics["AP"] == as_detections.metrics["AP"] > 0
    assert len(evaluation.row().keys() & {"AP", *NAMES}) == 4
