"""The page of the report on imbalances: a column for each level, with what was measured and what is advised."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from balanced_learning.detection.imbalance.feature_level import FeatureLevel
from balanced_learning.detection.imbalance.sample_level import SampleLevel
from balanced_learning.training.imbalance.advice import Advice, decimal, likeness, percent
from balanced_learning.training.imbalance.gathering import PAPER_ABOVE, PAPER_TO_OUTLIER, Measurements
from balanced_learning.training.imbalance.text import too_young
from balanced_learning.training.reporting.figures import GROUP_COLORS, draw_iou_shares, save_figure

SIZE = (18, 10.5)  # inches
LETTERS = 62  # of a line below a column
GREY, ORANGE, BLUE, GREEN = GROUP_COLORS
PAPER = "diamond: the paper, on COCO"
VERDICTS = {"can help": GREEN, "little": "#b8860b", "nothing": "#777777"}


def save_imbalance(path: Path, title: str, measured: Measurements, advices: Sequence[Advice]) -> None:
    """Writes the page as PNG: see :func:`draw_imbalance`."""
    save_figure(draw_imbalance(title, measured, advices), path, dpi=100)


def draw_imbalance(title: str, measured: Measurements, advices: Sequence[Advice]) -> Figure:
    """Draws the three levels of a detector on one page.

    Args:
        title: what was measured, above all.
        measured: of the detector.
        advices: of each level, from the samples to the objective.
    """
    figure = plt.figure(figsize=SIZE, layout="constrained")
    figure.suptitle(title if measured.has_learned else f"{title}\n{too_young(measured)}", size=13)
    columns: Any = figure.subfigures(1, 3, wspace=0.03)
    names = ("Sample level: which negatives", "Feature level: which maps", "Objective level: whose gradient")
    for column, name, advice in zip(columns, names, advices, strict=True):
        color = VERDICTS[advice.verdict]
        column.suptitle(
            f"{name}\n{advice.verdict}, strength {advice.strength:.2f}", color=color, size=13, weight="bold"
        )
        column.supxlabel(fill(advice.sentence, LETTERS, break_on_hyphens=False), size=11, x=0.03, ha="left")
    if measured.sample:
        _draw_samples(columns[0], measured.sample, measured.bins)
    else:
        columns[0].text(0.5, 0.5, "all anchors are learned from:\nnothing is sampled", ha="center", size=12)
    _draw_features(columns[1], measured.feature)
    _draw_objective(columns[2], measured)
    return figure


def _draw_samples(column: Any, level: SampleLevel, bins: list[float]) -> None:
    histogram, above, images = column.subplots(3, 1, height_ratios=[3, 1.5, 1.5])
    draw_iou_shares(histogram, level.shares, level.edges, bins)
    histogram.tick_params("x", labelrotation=45)
    histogram.legend(loc="upper right", framealpha=1, edgecolor="none", title="negatives")
    _draw_bars(above, level.above, [GROUP_COLORS[i] for i in range(len(level.above))], PAPER_ABOVE)
    above.set_title(f"negatives above IoU 0.05 ({PAPER})", size=10)
    of_images = {"negatives changed": level.changed, "too few negatives": level.few_candidates}
    of_images |= {f"bin {number} empty": share for number, share in enumerate(level.empty_bins, 1)}
    _draw_bars(images, of_images, [BLUE] + [GREY] * (len(of_images) - 1))
    images.set_title(f"what sampling changes, and where it cannot, of {level.images} images", size=10)


def _draw_features(column: Any, level: FeatureLevel) -> None:
    top, bottom = column.subfigures(2, 1, height_ratios=[3, 2.6])
    axis = top.subplots()
    rows = [f"{name}: {percent(share)} of boxes" for name, share in zip(level.levels, level.boxes, strict=True)]
    _draw_matrix(axis, level.contribution, rows, level.body_maps, percent)
    axis.set_title("what an object's score takes from each map of the backbone", size=10)
    for axis, matrix, when in zip(
        bottom.subplots(1, 2), (level.likeness_before, level.likeness_after), ("before", "after"), strict=True
    ):
        _draw_matrix(axis, matrix, level.levels, level.levels, decimal)
        axis.set_title(f"likeness {when} integration\n(linear CKA), mean {decimal(likeness(matrix))}", size=10)


def _draw_matrix(
    axis: plt.Axes, matrix: Tensor, rows: list[str], columns: list[str], write: Callable[[float], str]
) -> None:
    """A heat map from 0 to 1 with its numbers in it."""
    axis.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    for y, row in enumerate(matrix.tolist()):
        for x, value in enumerate(row):
            axis.text(x, y, write(value), ha="center", va="center", color="white" if value > 0.6 else "black", size=9)


def _draw_objective(column: Any, measured: Measurements) -> None:
    gradient, precision, errors = column.subplots(3, 1, height_ratios=[2, 1, 2.4])
    level, metrics = measured.objective, measured.evaluation.metrics
    one = "an inlier's gradient / an outlier's"
    shares = {
        "of the coordinates": level.inliers,
        "of smooth L1's gradient": level.of_total,
        "of balanced L1's gradient": level.of_total_balanced,
        one: level.to_outlier,
    }
    _draw_bars(gradient, shares, [GREY, ORANGE, GREEN, ORANGE], {one: PAPER_TO_OUTLIER})
    gradient.set_title("share of the inliers (diamond: the paper, beta of 1)", size=10)
    aps = {name: metrics.get(name) for name in ("AP50", "AP75")} | {"AP50 - AP75": measured.difference}
    _draw_bars(precision, aps, [BLUE, BLUE, ORANGE])
    precision.set_title(
        f"{measured.evaluated_images} other images; box loss / classification loss {decimal(level.ratio)}", size=10
    )
    costs = measured.costs()
    end = 1.2 * max(0.01, *(cost or 0.0 for cost in costs.values()))
    _draw_bars(errors, costs, [ORANGE if kind == "localisation" else GREY for kind in costs], end=end, digits=1)
    share = percent(measured.localisation_share())
    errors.set_title(f"what AP50 loses to each kind of error (TIDE)\nlocalisation: {share} of it all", size=10)


def _draw_bars(
    axis: plt.Axes,
    values: Mapping[str, float | None],
    colors: Sequence[str],
    paper: Mapping[str, float] | None = None,
    end: float = 1.0,
    digits: int = 0,
) -> None:
    """A bar for each share with its number, the first on top, and a diamond where the paper has one."""
    known = [0.0 if value is None or math.isnan(value) else value for value in values.values()]
    axis.barh(range(len(known)), known, color=colors, height=0.7)
    for y, (name, value) in enumerate(values.items()):
        theirs = (paper or {}).get(name, -1.0)
        is_beside = 0 <= theirs - known[y] < 0.1 * end
        axis.text((theirs if is_beside else known[y]) + 0.02 * end, y, percent(value, digits), va="center", size=9)
        if theirs >= 0:
            axis.plot(theirs, y, marker="D", color="black", markersize=6, markerfacecolor="white")
    axis.set_yticks(range(len(known)), list(values))
    axis.invert_yaxis()
    axis.set(xlim=(0, end), xticks=[])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
