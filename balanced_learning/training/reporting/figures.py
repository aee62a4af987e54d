"""Figures: curves of a run and of losses, the IoUs that are sampled, sampled boxes, and the levels of a pyramid."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from balanced_learning.detection.imbalance.objective_level import gradients
from balanced_learning.detection.imbalance.sample_level import MatchedProposals
from balanced_learning.training.files import Write, write_or_warn, write_whole

mpl.use("Agg")
import matplotlib.pyplot as plt

SHOWN_BOXES = 30  # of an image, spread evenly over those chosen in order of IoU
BOXES_WIDTH, COLUMN_WIDTH = 5.5, 3.4  # of an image of save_sampled_boxes and of save_pyramid, in inches
GROUND_TRUTH = "white"
GROUP_COLORS = ["#bbbbbb", "#d55e00", "#0072b2", "#009e73"]  # told apart by everybody
BIN_COLORS = ["#56b4e9", "#f0e442", "#d55e00"]  # from the first bin of IoU to the last


def save_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws losses and AP, or recall of proposals, of all epochs. Where a PNG cannot be written, a warning says so."""
    epochs = [row["epoch"] for row in rows]
    figure, (losses, precision) = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    for name in (n for n in rows[-1] if ("loss" in n and "/" not in n) or n in ("classification", "bbox_regression")):
        values = [row.get(name, math.nan) for row in rows]
        style = {"color": "black", "linewidth": 2.5} if name == "loss" else {}
        losses.plot(epochs, values, label="loss, the sum" if name == "loss" else name, marker=".", **style)
    of_proposals = any("AR1000" in row for row in rows)
    for name in ("AR100", "AR300", "AR1000") if of_proposals else ("AP", "AP50", "AP75"):
        known = {row["epoch"]: 100 * row[name] for row in rows if row.get(name) is not None}
        precision.plot(list(known), list(known.values()), label=name, marker=".")
    losses.set(xlabel="epoch", ylabel="loss, mean of the epoch", yscale="log")
    losses.yaxis.set_major_formatter("{x:g}")
    precision.set(xlabel="epoch", ylabel=f"average {'recall' if of_proposals else 'precision'} in %", ylim=(0, None))
    for axis in (losses, precision):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save_figure(figure, path, dpi=120, save=write_or_warn)


def save_losses(path: Path, rows: list[dict[str, nn.Module]], beta: float) -> None:
    """Draws gradients and values of box losses over the error, figure 5 of Libra R-CNN.

    Args:
        path: the PNG to write.
        rows: of the figure, each with losses by name. The first one of a row is dashed.
        beta: the error that divides inliers from outliers; it is marked.
    """
    figure, axes = plt.subplots(len(rows), 2, figsize=(11, 3.6 * len(rows)), squeeze=False, layout="constrained")
    for (gradient, value), losses in zip(axes, rows, strict=True):
        colors = ["black", *mpl.colormaps["viridis"](torch.linspace(0, 0.85, len(losses) - 1).numpy())]
        draw_losses(gradient, value, losses, colors, beta)
        gradient.lines[0].set_linestyle("--")
        value.lines[0].set_linestyle("--")
        gradient.set_ylabel("dL / d|x|")
        value.set_ylabel("L(x)")
        value.legend(*gradient.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for axis, title in zip(axes[0], ("(a) gradient", "(b) loss"), strict=True):
        axis.set_title(title)
    save_figure(figure, path, dpi=120)


def draw_losses(
    gradient: plt.Axes, value: plt.Axes, losses: dict[str, nn.Module], colors: Sequence[Any], beta: float
) -> None:
    """Draws each loss of one coordinate of a box into two axes, with its gradient by autograd."""
    errors = torch.linspace(0, 2 * beta, 401)
    for (name, loss), color in zip(losses.items(), colors, strict=True):
        each: Any = copy(loss)
        each.reduction = "none"
        gradient.plot(errors.numpy(), gradients(errors, loss).numpy(), color=color, label=name)
        value.plot(errors.numpy(), each(errors, torch.zeros_like(errors)).numpy(), color=color, label=name)
    for axis in (gradient, value):
        axis.axvline(beta, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="|x|, error of a coordinate", xlim=(0, 2 * beta), ylim=(0, None))
    for x, words, side in ((0.49, "inliers", "right"), (0.51, "outliers", "left")):
        gradient.annotate(words, (x, 0.03), xycoords="axes fraction", ha=side)


def save_iou_shares(path: Path, shares: dict[str, Tensor], edges: Tensor, bins: list[float]) -> None:
    """Draws the share of negatives in intervals of IoU, figure 3 of Libra R-CNN.

    Args:
        path: the PNG to write.
        shares: by name, the shares of the I intervals; at most four.
        edges: of the intervals. [I + 1]
        bins: the edges of the sampler's bins, which are among them. [K + 1]
    """
    figure, axis = plt.subplots(figsize=(11, 4.5), layout="constrained")
    draw_iou_shares(axis, shares, edges, bins)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, title="negatives")
    save_figure(figure, path, dpi=120)


def draw_iou_shares(axis: plt.Axes, shares: dict[str, Tensor], edges: Tensor, bins: list[float]) -> None:
    """Draws what :func:`save_iou_shares` does into an axis, without its legend."""
    widths = edges.diff() / (len(shares) + 1)
    for i, ((name, share), color) in enumerate(zip(shares.items(), GROUP_COLORS, strict=False)):
        left = edges[:-1] + (i + 0.5) * widths
        axis.bar(left.numpy(), 100 * share.numpy(), widths.numpy(), align="edge", label=name, color=color)
    for edge in bins:
        axis.axvline(edge, color="black", linestyle="--", linewidth=1)
    for number, (low, high) in enumerate(pairwise(bins), 1):
        axis.text((low + high) / 2, 1.01, f"bin {number}", transform=axis.get_xaxis_transform(), ha="center")
    axis.set(xlabel="IoU with the nearest ground truth", ylabel="share of the negatives in %", xlim=(0, bins[-1]))
    axis.set_xticks(edges.tolist(), [f"{edge:.2f}" for edge in edges.tolist()])


def save_sampled_boxes(
    path: Path, proposals: list[MatchedProposals], masks: dict[str, list[Tensor]], bins: list[float]
) -> None:
    """Draws negatives that samplers chose, an image a row and a sampler a column, figure 6 of Libra R-CNN.

    Args:
        path: the PNG to write.
        proposals: of each image.
        masks: by the name of the sampler, the negatives of each image that it chose; some of them are shown.
        bins: the edges of the bins of IoU, each of which has a colour. [K + 1]
    """
    heights = [BOXES_WIDTH * _tallness(each.image) + 0.3 for each in proposals]
    figure, axes = plt.subplots(
        len(proposals),
        len(masks),
        figsize=(BOXES_WIDTH * len(masks) + 1.2, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    colors = LinearSegmentedColormap.from_list("IoU", BIN_COLORS, len(bins) - 1)
    norm = BoundaryNorm(bins, len(bins) - 1, clip=True)
    for row, (each, *chosen) in enumerate(zip(proposals, *masks.values(), strict=True)):
        for axis, name, mask in zip(axes[row], masks, chosen, strict=True):
            axis.imshow(each.image.mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1.3)  # colours are for boxes
            indices = mask.nonzero().flatten()
            num_shown = min(SHOWN_BOXES, len(indices))
            by_iou = indices[each.ious[indices].argsort()]
            for index in by_iou[torch.linspace(0, len(by_iou) - 1, num_shown).long()].tolist():
                _outline(axis, each.boxes[index].tolist(), colors(norm(each.ious[index].item())), 1.2)
            for box in each.gt_boxes.tolist():
                _outline(axis, box, GROUND_TRUTH, 2)
            counts = torch.histogram(each.ious[mask].clamp(max=bins[-1]), torch.tensor(bins)).hist
            in_bins = " + ".join(f"{count:.0f}" for count in counts.tolist())
            axis.set_title(f"{name}: {in_bins} negatives in the bins, {num_shown} of them drawn", size=10)
            axis.set_axis_off()
    figure.colorbar(
        mpl.cm.ScalarMappable(norm, colors),
        ax=axes,
        ticks=bins,
        format="{x:.2f}",
        label="IoU with the nearest ground truth (white)",
        shrink=0.6,
    )
    save_figure(figure, path, dpi=110)


def save_figure(figure: Figure, path: Path, dpi: int, save: Callable[[Path, Write], None] = write_whole) -> None:
    """Writes a figure as PNG, and lets go of it."""
    try:
        save(path, lambda file: figure.savefig(file, format="png", dpi=dpi))
    finally:
        plt.close(figure)


def _tallness(image: Tensor) -> float:
    """Height over width, bounded so that a strip makes no endless figure."""
    return min(image.shape[-2] / image.shape[-1], 3.0)


def _outline(axis: plt.Axes, box: list[float], color: object, width: float) -> None:
    """A box with a dark edge, to be seen on any ground."""
    x1, y1, x2, y2 = box
    edge = [withStroke(linewidth=width + 1.5, foreground="black")]
    axis.add_patch(
        plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width, path_effects=edge)
    )


def save_pyramid(
    path: Path, image: Tensor, boxes: Tensor, averages: list[Tensor], levels: dict[str, list[Tensor]], neck: str
) -> None:
    """Draws what a balanced feature pyramid does to the levels of an image, figure 4 of Libra R-CNN.

    Args:
        path: the PNG to write.
        image: [3, H, W], from 0 to 1.
        boxes: the ground truth, outlined everywhere, xyxy in pixels of the image. [G, 4]
        averages: heat maps [h, w] of the average of all levels, as it is and refined.
        levels: for every level by name, the heat maps before, at the size of the average, with the average and with the
            refined average added; in colours that mean the same along the row.
        neck: the name of what makes the levels.
    """
    rows = 1 + len(levels)
    height, width = image.shape[1:]
    row_height = COLUMN_WIDTH * _tallness(image) + 0.35
    figure, axes = plt.subplots(rows, 4, figsize=(4 * COLUMN_WIDTH + 1, rows * row_height), layout="constrained")
    axes[0, 0].imshow(image.permute(1, 2, 0).numpy())
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)  # heat in the size of the image
    _plot_row(axes[0, 2:], averages, extent)
    axes[0, 1].set_visible(False)
    for line, heats in zip(axes[1:], levels.values(), strict=True):
        _plot_row(line, heats, extent)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for box in boxes.tolist():
            _outline(axis, box, GROUND_TRUTH, 1.2 if axis is axes[0, 0] else 0.6)
    for axis, name in zip(axes[:, 0], ("image", *levels), strict=True):
        axis.set_ylabel(name)
    truth = "ground truth in white" if len(boxes) else ""
    added = ("4. strengthen: average added", "4. strengthen: refined average added")
    for line, titles in (
        (axes[0], (truth, "", "2. integrate: average of all levels", "3. refine: the average refined")),
        (axes[1], (f"level from the {neck}", "1. rescale to one size", *added)),
    ):
        for axis, title in zip(line, titles, strict=True):
            axis.set_title(title, size=10)
    save_figure(figure, path, dpi=110)


def _plot_row(axes: Any, heats: list[Tensor], extent: tuple[float, float, float, float]) -> None:
    scale = Normalize(min(heat.min().item() for heat in heats), max(heat.max().item() for heat in heats))
    for axis, heat in zip(axes, heats, strict=True):
        shown = axis.imshow(heat.numpy(), cmap="inferno", norm=scale, extent=extent)
    axes[0].figure.colorbar(shown, ax=axes, pad=0.01, aspect=12, label="mean |value| of the channels")
