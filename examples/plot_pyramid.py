"""Shows what the balanced feature pyramid does to the levels of an image: figure 4 of Libra R-CNN.

    python examples/plot_pyramid.py                                                 # a drawn image, random weights
    python examples/plot_pyramid.py --data-path coco --resume runs/.../checkpoint.pth --image street.jpg

Takes the options of the training script; without --image the first of its training images. Writes pyramid.png to the
output folder: each level as it comes from the FPN, after integration alone and after refinement. The heat is the mean
over channels of the absolute value. It means something for trained weights only; and a pyramid that has not been
trained refines nothing, so that its last two columns are the same.
"""

import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from balanced_learning import BalancedFeaturePyramid
from coco import load_image
from errors import UserError
from figures import model_and_images
from options import make_parser, parse_args

mpl.use("Agg")
import matplotlib.pyplot as plt

COLUMN_WIDTH = 3.4  # in inches, as figures are measured


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    parser.add_argument("--image", type=Path, metavar="FILE", help="image to look at; default: the first to train on")
    try:
        run(parse_args(argv, parser))
    except UserError as error:
        sys.exit(f"error: {error}")


def run(args: Namespace) -> None:
    if not args.pyramid:
        raise UserError("--no-pyramid: there is no pyramid to look at")
    model, dataset = model_and_images(args)
    image = _read(args.image) if args.image else dataset[0][0]
    averages, levels = find_heat(model, image.to(args.device))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    plot(image, averages, levels, "PAFPN" if args.path_aggregation else "FPN", args.output_dir / "pyramid.png")
    print(f"wrote pyramid.png to {args.output_dir}")


def _read(path: Path) -> Tensor:
    return v2.functional.to_dtype(v2.functional.to_image(load_image(path)), scale=True)


@torch.no_grad()
def find_heat(model: Any, image: Tensor) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The heat of what the pyramid does, [H, W] in the size the model works on.

    Returns:
        That of the average, integrated and refined; and for every level by name, that before, with the integrated and
        with the refined average.
    """
    batch, _ = model.transform([image])
    height, width = batch.image_sizes[0]

    def heat(features: Tensor) -> Tensor:
        magnitude = features.abs().mean(dim=1, keepdim=True)
        return F.interpolate(magnitude, batch.tensors.shape[-2:])[0, 0, :height, :width].cpu()

    bfp = model.backbone.bfp
    integration = BalancedFeaturePyramid(bfp.in_channels, refine_level=bfp.refine_level, refine=None)
    before = model.backbone.fpn(model.backbone.body(batch.tensors))
    stages = list(zip(*(maps.values() for maps in (before, integration(before), bfp(before))), strict=True))
    plain, *strengthened = stages[bfp.refine_level]  # where the average is added as it is
    finest = int(math.log2(batch.tensors.shape[-1] // stages[0][0].shape[-1]))
    levels = {
        f"P{level}, stride {2**level}": [heat(features) for features in stage]
        for level, stage in enumerate(stages, finest)
    }
    return [heat(features - plain) for features in strengthened], levels


def plot(image: Tensor, averages: list[Tensor], levels: dict[str, list[Tensor]], neck: str, path: Path) -> None:
    """As figure 4: a row a level, in colours that mean the same along the row."""
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


if __name__ == "__main__":
    main()
