"""Draws the pictures of the component pages. Those of the study are benchmarks/study.py's, that of the report
on imbalances is benchmarks/imbalance_page.py's.

    python docs/pictures.py                 # writes docs/images/*.svg

The curves and the samples come from the library itself; the schemes show what its docstrings say.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import box_iou

from balanced_learning import BalancedL1Loss, IoUBalancedSampler, use_kernels
from balanced_learning.training.files import write_whole
from balanced_learning.training.reporting.figures import draw_losses

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS, STOCK, INK = "#c2410c", "#94a3b8", "#1e293b"
# Letters as text, and no bit that differs from run to run.
SVG: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "the same picture from every run"}
STYLE: dict[Any, Any] = {
    **SVG,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_balanced_l1() -> plt.Figure:
    """Loss and gradient over the error, beside smooth L1: figure 5 of the paper."""
    figure, (gradient, value) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    losses: dict[str, nn.Module] = {"smooth L1": nn.SmoothL1Loss()}
    for alpha, gamma in ((0.5, 1.5), (0.5, 1.0), (0.2, 1.0)):
        losses[rf"balanced L1, $\alpha$ = {alpha}, $\gamma$ = {gamma}"] = BalancedL1Loss(alpha, gamma)
    draw_losses(gradient, value, losses, (STOCK, OURS, "#0f766e", "#6d28d9"), beta=1)
    for axis, title in ((gradient, "gradient"), (value, "loss")):
        axis.set_title(title)
        for line in axis.lines[:2]:
            line.set_linewidth(2.5)
    figure.legend(*gradient.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def draw_sampling() -> plt.Figure:
    """The IoUs of the negatives that random and IoU-balanced sampling choose: figure 3 of the paper."""
    ious, labels, matched_idxs = propose()
    balanced = IoUBalancedSampler()
    random = BalancedPositiveNegativeSampler(balanced.batch_size_per_image, balanced.positive_fraction)
    shares = {
        "all negatives": ious[labels == 0],
        "random sampling": torch.cat([ious[random([labels])[1][0].bool()] for _ in range(100)]),
        "IoU-balanced sampling": torch.cat(
            [ious[balanced([labels], [ious], [matched_idxs])[1][0]] for _ in range(100)]
        ),
    }
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    edges = torch.linspace(0, 0.5, 13)
    for i, ((name, chosen), color) in enumerate(zip(shares.items(), ("#e2e8f0", STOCK, OURS), strict=True)):
        share = chosen.histc(12, 0, 0.5) / len(chosen)
        axis.bar((edges[:-1] + (i + 0.75) / 84).tolist(), (100 * share).tolist(), 1 / 84, label=name, color=color)
    for edge in (0, 1 / 6, 1 / 3, 0.5):
        axis.axvline(edge, color=INK, linewidth=0.8, linestyle=":")
    axis.set(xlabel="IoU with the nearest ground truth of 2,000 drawn boxes; dotted: the bins", ylabel="share in %")
    axis.set(xlim=(-0.005, 0.505), xticks=[0, 1 / 6, 1 / 3, 0.5], xticklabels=["0", "1/6", "1/3", "1/2"])
    axis.legend(frameon=False)
    return figure


def propose() -> tuple[Tensor, Tensor, Tensor]:
    """IoUs, labels and matched ground truths [M] of 2,000 boxes: half anywhere, half shifted from six ground truths."""
    gt_boxes = boxes_at(torch.rand(6, 2) * 400 + 56, torch.rand(6, 2) * 60 + 60)
    anywhere = boxes_at(torch.rand(1000, 2) * 512, torch.rand(1000, 2) * 120 + 20)
    near = gt_boxes[torch.randint(6, (1000,))] + 40 * torch.randn(1000, 1).abs() * torch.randn(1000, 4)
    ious, matched_idxs = box_iou(gt_boxes, torch.cat([anywhere, near])).max(dim=0)
    return ious, (ious >= 0.5).long(), matched_idxs


def boxes_at(centres: Tensor, sizes: Tensor) -> Tensor:
    return torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1)


class Scheme:
    """A figure of boxes with words and arrows between them, in inches."""

    def __init__(self, width: float, height: float) -> None:
        self.figure, self.axis = plt.subplots(figsize=(width, height))
        self.figure.subplots_adjust(0, 0, 1, 1)
        self.axis.set(xlim=(0, width), ylim=(0, height))
        self.axis.set_axis_off()

    def words(self, x: float, y: float, words: str, **style: Any) -> None:
        self.axis.text(x, y, words, **{"ha": "center", "va": "center", "fontsize": 8, **style})

    def title(self, x: float, y: float, words: str, **style: Any) -> None:
        self.words(x, y, words, fontsize=10, fontweight="bold", **style)

    def box(self, x: float, y: float, width: float, height: float, words: str, color: str, line: str = "-") -> None:
        """A box around its centre."""
        self.axis.add_patch(
            plt.Rectangle(
                (x - width / 2, y - height / 2),
                width,
                height,
                facecolor=color + "33",
                edgecolor=color,
                linewidth=1.5,
                linestyle=line,
            )
        )
        self.words(x, y, words, fontsize=9)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
        self.axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0})


def draw_pyramid() -> plt.Figure:
    """Rescale, integrate, refine, strengthen: figure 4 of the paper."""
    scheme = Scheme(9, 4)
    for x, title in (
        (0.9, "levels"),
        (2.3, "rescale"),
        (3.65, "integrate"),
        (5.25, "refine"),
        (6.9, "rescale, strengthen"),
    ):
        scheme.title(x, 3.8, title)
    for level in range(5):
        y, side, spread = 3.3 - 0.7 * level, 1.4 - 0.24 * level, 1.9 + 0.14 * (2 - level)
        scheme.box(0.9, y, side, 0.4, f"$C_{level + 2}$", STOCK)
        scheme.box(8.2, y, side, 0.4, f"$P_{level + 2}$", OURS)
        scheme.arrow((0.9 + side / 2, y), (3.2, spread))
        scheme.arrow((5.7, spread), (8.2 - side / 2, y), OURS)
    scheme.words(2.75, 2.95, "finer levels:\nmax pooling")
    scheme.words(2.75, 0.85, "coarser levels:\nnearest neighbour")
    scheme.box(3.65, 1.9, 0.9, 1.0, "mean $C$\nat the size\nof $C_4$", STOCK)
    scheme.arrow((4.1, 1.9), (4.8, 1.9))
    scheme.box(5.25, 1.9, 0.9, 1.0, "non-local\nblock", OURS)
    scheme.words(6.5, 0.5, "each output is its own level\nplus what comes back")
    return scheme.figure


def draw_path_aggregation() -> plt.Figure:
    """The levels of an FPN through the bottom-up path."""
    scheme = Scheme(8, 3.6)
    for x, title in ((1.2, "from the FPN"), (4.0, "bottom-up path"), (6.8, "outputs")):
        scheme.title(x, 3.4, title)
    for level, y in enumerate((0.4, 1.2, 2.0, 2.8), 2):
        side = 1.6 - 0.25 * (level - 2)
        for x, name, color in ((1.2, "P", STOCK), (4.0, "S", OURS), (6.8, "N", OURS)):
            scheme.box(x, y, side, 0.4, f"${name}_{level}$", color)
        scheme.arrow((1.2 + side / 2, y), (4.0 - side / 2, y))
        scheme.arrow((4.0 + side / 2, y), (6.8 - side / 2, y), OURS)
        scheme.words(5.4, y + 0.12, "out: 3 x 3" if level > 2 else "as it is")
        if level > 2:
            scheme.words(2.6, y + 0.12, "add")
            scheme.arrow((4.0, y - 0.6), (4.0, y - 0.2), OURS)
            scheme.words(4.1, y - 0.4, "down: 3 x 3, stride 2", ha="left")
    return scheme.figure


def draw_detectors() -> plt.Figure:
    """The places of the parts in Faster R-CNN and in RetinaNet."""
    scheme = Scheme(9.6, 3.9)
    rows = (
        (
            2.9,
            "Faster R-CNN",
            "P6",
            (("RPN", "with rpn=True:\nsampler, balanced L1"), ("RoI heads", "sampler,\nbalanced L1")),
        ),
        (1.0, "RetinaNet", "P6, P7", (("head", "balanced L1"),)),
    )
    for y, name, extra, heads in rows:
        scheme.title(0.27, y + 0.65, name, ha="left")
        parts = [("backbone", STOCK, "-"), ("FPN", STOCK, "-"), ("path\naggregation", OURS, "--"), (extra, STOCK, "-")]
        parts += [("balanced\npyramid", OURS, "-"), *((head, STOCK, "-") for head, _ in heads)]
        for i, (words, color, line) in enumerate(parts):
            scheme.box(0.75 + 1.35 * i, y, 0.95, 0.7, words, color, line)
            if i:
                scheme.arrow((1.35 * i - 0.125, y), (1.35 * i + 0.275, y))
        for i, (_, words) in enumerate(heads, 5):
            scheme.words(0.75 + 1.35 * i, y - 0.42, words, va="top", color=OURS)
    scheme.words(0.27, 0.2, "dashed: off unless asked for", ha="left")
    return scheme.figure


def save(figure: plt.Figure, file: Path) -> None:
    """Writes a figure as the same SVG every time, and lets go of it."""
    write_whole(file, lambda binary: figure.savefig(binary, format="svg", metadata={"Date": None, "Creator": None}))
    plt.close(figure)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    with mpl.rc_context(STYLE), use_kernels(False):  # so that the samples are the same on every machine
        for draw in (draw_balanced_l1, draw_sampling, draw_pyramid, draw_path_aggregation, draw_detectors):
            name = draw.__name__.removeprefix("draw_")
            save(draw(), folder / f"{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("images"))
