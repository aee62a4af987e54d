"""Figures: predictions beside the ground truth, curves, sampled boxes, and the levels of a pyramid."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.font_manager import findfont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from balanced_learning.detection.imbalance import MatchedProposals

mpl.use("Agg")
import matplotlib.pyplot as plt

SHOWN_SCORE = 0.3
SHOWN_BOXES = 60  # of an image, spread evenly over those chosen in order of IoU
COLUMN_WIDTH = 3.4  # of save_pyramid, in inches


def save_predictions(
    path: Path, samples: Iterable[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]], names: dict[int, str]
) -> None:
    """Draws ground truth and predictions side by side, an image a row.

    Args:
        path: the PNG to write.
        samples: images [3, H, W] in [0, 1] with their targets and detections.
        names: of the labels.
    """
    samples = list(samples)
    figure, axes = plt.subplots(len(samples), 2, figsize=(10, 4 * len(samples)), squeeze=False)
    for (image, target, detected), (left, right) in zip(samples, axes, strict=True):
        sure = detected["scores"] >= SHOWN_SCORE
        found = [
            f"{names.get(label, label)} {score:.2f}"
            for label, score in zip(
                detected["labels"][sure].int().tolist(), detected["scores"][sure].tolist(), strict=True
            )
        ]
        _show(left, image, target["boxes"], [names[label] for label in target["labels"].tolist()], "lime")
        _show(right, image, detected["boxes"][sure], found, "orange")
    axes[0, 0].set_title("ground truth")
    axes[0, 1].set_title(f"predictions with a score of {SHOWN_SCORE:g} or more")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _show(axis: plt.Axes, image: Tensor, boxes: Tensor, labels: list[str], color: str) -> None:
    scale = max(1, math.ceil(480 / max(image.shape[-2:])))  # small images are enlarged to have room for words
    image = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    if len(boxes):
        font = findfont("DejaVu Sans")  # comes with matplotlib
        image = draw_bounding_boxes(
            image, boxes * scale, labels, color, width=2, font=font, font_size=16, fill_labels=True
        )
    axis.imshow(image.permute(1, 2, 0).numpy())
    axis.set_axis_off()


def save_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws the losses and the AP of all epochs."""
    epochs = [row["epoch"] for row in rows]
    figure, (losses, precision) = plt.subplots(1, 2, figsize=(11, 4))
    for name in (n for n in rows[-1] if ("loss" in n and "/" not in n) or n in ("classification", "bbox_regression")):
        losses.plot(epochs, [row.get(name, math.nan) for row in rows], label=name, marker=".")
    for name in ("AP", "AP50", "AP75"):
        values = [row.get(name) for row in rows]
        precision.plot(epochs, [math.nan if v is None else 100 * v for v in values], label=name, marker=".")
    losses.set(xlabel="epoch", ylabel="loss", yscale="log")
    precision.set(xlabel="epoch", ylabel="average precision in %", ylim=(0, None))
    for axis in (losses, precision):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_iou_shares(path: Path, shares: dict[str, Tensor], max_iou: float) -> None:
    """Draws the share of negatives in equal intervals of [0, max_iou], figure 3 of Libra R-CNN."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    intervals = len(next(iter(shares.values())))
    edges = torch.linspace(0, max_iou, intervals + 1)
    width = (edges[1] - edges[0]).item() / (len(shares) + 1)
    for i, (name, share) in enumerate(shares.items()):
        axis.bar((edges[:-1] + (i + 1) * width).numpy(), 100 * share.numpy(), width, label=name)
    axis.set(xlabel="IoU with the nearest ground truth", ylabel="share of the negatives in %", xticks=edges.tolist())
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_sampled_boxes(
    path: Path, proposals: list[MatchedProposals], masks: dict[str, list[Tensor]], max_iou: float
) -> None:
    """Draws negatives that samplers chose, an image a row and a sampler a column, figure 6 of Libra R-CNN.

    Args:
        path: the PNG to write.
        proposals: of each image.
        masks: by the name of the sampler, the negatives of each image that it chose; some of them are shown.
        max_iou: the IoU at the end of the colours.
    """
    figure, axes = plt.subplots(
        len(proposals),
        len(masks),
        figsize=(5.5 * len(masks), 4.2 * len(proposals)),
        squeeze=False,
        layout="constrained",
    )
    color_of = plt.get_cmap("plasma")
    for row, (each, *chosen) in enumerate(zip(proposals, *masks.values(), strict=True)):
        for axis, name, mask in zip(axes[row], masks, chosen, strict=True):
            axis.imshow(0.7 * each.image.permute(1, 2, 0).numpy().clip(0, 1))
            indices = mask.nonzero().flatten()
            by_iou = indices[each.ious[indices].argsort()]
            for index in by_iou[torch.linspace(0, len(by_iou) - 1, min(SHOWN_BOXES, len(by_iou))).long()].tolist():
                iou = each.ious[index].item()
                _outline(axis, each.boxes[index].tolist(), color_of(iou / max_iou), 0.6 + 1.4 * iou / max_iou)
            for box in each.gt_boxes.tolist():
                _outline(axis, box, "lime", 2)
            near = int((each.ious[mask] >= 0.1 * max_iou).sum())
            title = f"{len(indices)} negatives, {near} with IoU of {0.1 * max_iou:.2g} or more"
            axis.set_title(title if row else f"{name}: {title}", size=10)
            axis.set_axis_off()
    figure.colorbar(
        mpl.cm.ScalarMappable(mpl.colors.Normalize(0, max_iou), color_of),
        ax=axes,
        label="IoU with the nearest ground truth (green)",
        shrink=0.6,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _outline(axis: plt.Axes, box: list[float], color: object, width: float) -> None:
    x1, y1, x2, y2 = box
    axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width))


def save_pyramid(path: Path, image: Tensor, averages: list[Tensor], levels: dict[str, list[Tensor]], neck: str) -> None:
    """Draws what a balanced feature pyramid does to the levels of an image, figure 4 of Libra R-CNN.

    Args:
        path: the PNG to write.
        image: [3, H, W], from 0 to 1.
        averages: heat maps [h, w] of the average of all levels, as it is and refined.
        levels: for every level by name, the heat maps before, with the average and with the refined average added; in
            colours that mean the same along the row.
        neck: the name of what makes the levels.
    """
    rows = 1 + len(levels)
    row_height = COLUMN_WIDTH * image.shape[1] / image.shape[2] + 0.35
    figure, axes = plt.subplots(rows, 3, figsize=(3 * COLUMN_WIDTH + 1, rows * row_height), layout="constrained")
    axes[0, 0].imshow(image.permute(1, 2, 0).numpy())
    _plot_row(axes[0, 1:], averages)
    for line, heats in zip(axes[1:], levels.values(), strict=True):
        _plot_row(line, heats)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("image", *levels), strict=True):
        axis.set_ylabel(name)
    for line, titles in (
        (axes[0], ("", "average of all levels", "the average refined")),
        (axes[1], (f"level from the {neck}", "with the average added", "with the refined average added")),
    ):
        for axis, title in zip(line, titles, strict=True):
            axis.set_title(title, size=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_row(axes: Any, heats: list[Tensor]) -> None:
    scale = mpl.colors.Normalize(min(heat.min().item() for heat in heats), max(heat.max().item() for heat in heats))
    for axis, heat in zip(axes, heats, strict=True):
        shown = axis.imshow(heat.numpy(), cmap="inferno", norm=scale)
    axes[0].figure.colorbar(shown, ax=axes, pad=0.01, aspect=12)
