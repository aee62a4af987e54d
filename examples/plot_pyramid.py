"""Draws the levels of an image before and after the balanced feature pyramid, figure 4 of Libra R-CNN.

    python examples/plot_pyramid.py                                                 # a drawn image, random weights
    python examples/plot_pyramid.py --data-path coco --resume runs/.../checkpoint.pth --image street.jpg

Takes the options of the training script; without --image the first of its training images, with its boxes. Writes
pyramid.png to the output folder, with the steps of the pyramid: each level as it comes from the FPN and rescaled, their
average and its refinement, and each level strengthened by the one and by the other. The heat is the mean over channels
of the absolute value. It means something for trained weights only; and a pyramid that has not been trained refines
nothing, so that its last two columns are the same.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from balanced_learning import BalancedFeaturePyramid
from balanced_learning.resizing import resize
from balanced_learning.training.command_line import read_command_line
from balanced_learning.training.data.images import load_image
from balanced_learning.training.endings import ends_in_one_line
from balanced_learning.training.errors import UserError
from balanced_learning.training.flags import make_parser
from balanced_learning.training.measuring import detector_and_images
from balanced_learning.training.output_folder import find_folder
from balanced_learning.training.reporting.figures import save_pyramid


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--image", type=Path, default=None, metavar="FILE", help="image to draw; default: the first to train on"
    )
    with ends_in_one_line():
        run(parser.parse_args(argv))


def run(given: argparse.Namespace) -> None:
    config, checkpoint = read_command_line(given, trains=False)
    if not config.model.pyramid:
        raise UserError("--no-pyramid: there is no pyramid to draw")
    folder = find_folder(config)
    model, dataset = detector_and_images(config, checkpoint)
    if given.image:
        image, boxes = _read(given.image), torch.empty(0, 4)
    else:
        image, target = dataset[0]
        boxes = target["boxes"]
    try:
        averages, levels = find_heat(model, image.to(next(model.parameters()).device))
    except RuntimeError as error:  # a strip that shrinks to nothing, or too little memory
        size = " x ".join(map(str, image.shape[:0:-1]))
        name = given.image or "the first image"
        raise UserError(f"{name}: nothing can be drawn of {size} pixels ({str(error).splitlines()[0]})") from None
    neck = "PAFPN" if config.model.path_aggregation else "FPN"
    save_pyramid(folder / "pyramid.png", image, boxes, averages, levels, neck)
    print(f"wrote pyramid.png to {folder}")


def _read(path: Path) -> Tensor:
    return v2.functional.to_dtype(v2.functional.to_image(load_image(path)), scale=True)


@torch.no_grad()
def find_heat(model: Any, image: Tensor) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Finds the heat of the levels and of their average, [H, W] in the size the model works on.

    Returns:
        That of the average, integrated and refined; and for every level by name, that before, rescaled to the size of
        the average, with the integrated and with the refined average.
    """
    batch, _ = model.transform([image])
    height, width = batch.image_sizes[0]

    def heat(features: Tensor) -> Tensor:
        magnitude = features.abs().mean(dim=1, keepdim=True)
        return F.interpolate(magnitude, batch.tensors.shape[-2:])[0, 0, :height, :width].cpu()

    bfp = model.backbone.bfp
    integration = BalancedFeaturePyramid(bfp.in_channels, refine_level=bfp.refine_level, refine=None)
    seen: list[dict[str, Tensor]] = []
    hook = bfp.register_forward_hook(lambda _, args, output: seen.extend((args[0], integration(args[0]), output)))
    model.backbone(batch.tensors)
    hook.remove()
    stages = list(zip(*(maps.values() for maps in seen), strict=True))
    plain, *strengthened = stages[bfp.refine_level]  # where the average is added as it is
    finest = int(math.log2(batch.tensors.shape[-1] // stages[0][0].shape[-1]))
    levels = {}
    for i, (before, *after) in enumerate(stages):
        rescaled = resize(before, plain.shape[-2:], bfp.refine_level - i)
        name = f"P{finest + i}, stride {2 ** (finest + i)}"
        levels[name] = [heat(features) for features in (before, rescaled, *after)]
    return [heat(features - plain) for features in strengthened], levels


if __name__ == "__main__":
    main()
