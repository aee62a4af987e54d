"""What a person sees of a run: progress, metrics.jsonl, pictures of predictions, and curves."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.font_manager import findfont
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

SHOWN_SCORE = 0.3


class Progress:
    """A bar on a terminal, a line every ``print_freq`` batches in a log; only where ``is_main``."""

    def __init__(self, title: str, print_freq: int, *, is_main: bool = True) -> None:
        self.title = title
        self.print_freq = print_freq
        self.is_main = is_main

    def over(self, loader: DataLoader, status: Callable[[], str]) -> Iterator[Any]:
        """The batches. ``status`` is asked on every process, for it may have to hear the others."""
        on_terminal = sys.stdout.isatty()
        start, waited, last = time.perf_counter(), 0.0, time.perf_counter()
        bar = tqdm(loader, self.title, disable=not (self.is_main and on_terminal), file=sys.stdout)
        for number, batch in enumerate(bar, 1):
            waited += time.perf_counter() - last
            yield batch
            last = time.perf_counter()
            if number % self.print_freq and number != len(loader):
                continue
            text = status()
            if not self.is_main:
                continue
            if on_terminal:
                bar.set_postfix_str(text)
            else:
                each = (last - start) / number
                eta = time.strftime("%H:%M:%S", time.gmtime(each * (len(loader) - number)))
                memory = f"  max mem {torch.cuda.max_memory_allocated() >> 20} MiB" if torch.cuda.is_available() else ""
                print(
                    f"{self.title} [{number:>{len(str(len(loader)))}}/{len(loader)}]  eta {eta}  {text}  "
                    f"time {each:.3f} s  data {waited / number:.3f} s{memory}",
                    flush=True,
                )


def write_row(path: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Appends the row of an epoch, in place of one of the same or a later epoch, and returns all rows."""
    rows = [r for r in read_rows(path) if r["epoch"] < row["epoch"]]
    rows.append(row)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(r) + "\n" for r in rows))
    unfinished.replace(path)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def save_predictions(
    path: Path, samples: Iterable[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]], names: dict[int, str]
) -> None:
    """Ground truth and predictions side by side, an image a row.

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
    """The losses and the AP of all epochs."""
    epochs = [row["epoch"] for row in rows]
    figure, (losses, precision) = plt.subplots(1, 2, figsize=(11, 4))
    for name in (n for n in rows[-1] if "loss" in n or n in ("classification", "bbox_regression")):
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
