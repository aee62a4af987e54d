"""Draws the boxes that IoU-balanced sampling chooses on your data, beside random sampling: figures 3 and 6.

    python examples/plot_sampling.py                                                # drawn shapes, random weights
    python examples/plot_sampling.py --data-path coco --resume runs/.../checkpoint.pth -b 8

Takes the options of the training script, and one batch of its training images. Prints the share of the negatives in
each interval of IoU and writes sampling_ious.png and sampling_boxes.png to the output folder. Hard negatives are those
that the model takes for objects most; they mean something for trained weights only.
"""

import argparse
import sys
from itertools import pairwise

from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning.detection.imbalance import (
    bin_edges,
    draw_balanced,
    draw_random,
    interval_edges,
    match_proposals,
    negative_iou_shares,
)
from balanced_learning.training import randomness
from balanced_learning.training.command_line import read_command_line
from balanced_learning.training.errors import UserError
from balanced_learning.training.flags import make_parser
from balanced_learning.training.inference import detector_and_images
from balanced_learning.training.output_folder import find_folder
from balanced_learning.training.reporting.figures import save_iou_shares, save_sampled_boxes

INTERVALS = 10  # of the histogram, or more: it cuts every bin into equally many
DRAWS = 50  # that it averages
SHOWN_IMAGES = 3


def main(argv: list[str] | None = None) -> None:
    try:
        run(make_parser(__doc__).parse_args(argv))
    except UserError as error:
        sys.exit(f"error: {error}")


def run(given: argparse.Namespace) -> None:
    config, checkpoint = read_command_line(given, trains=False)
    if config.model.model != "libra_fasterrcnn":
        raise UserError(f"--model {config.model.model}: it trains on all anchors and samples none")
    if not config.model.sampler:
        raise UserError("--no-sampler: there is no IoU-balanced sampling to draw")
    folder = find_folder(config)
    model, dataset = detector_and_images(config, checkpoint)
    device = next(model.parameters()).device
    samples = [dataset[i] for i in range(len(dataset))]
    images = [image.to(device) for image, _ in samples]
    targets = [{key: target[key].to(device) for key in ("boxes", "labels")} for _, target in samples]
    randomness.seed_all(config.training.seed, "plot")
    proposals = match_proposals(model, images, targets)

    balanced = model.roi_heads.fg_bg_sampler
    random = BalancedPositiveNegativeSampler(balanced.batch_size_per_image, balanced.positive_fraction)
    edges = interval_edges(balanced, at_least=INTERVALS)
    shares = negative_iou_shares(proposals, balanced, random, edges=edges, draws=DRAWS)
    print(table(shares, edges))
    save_iou_shares(folder / "sampling_ious.png", shares, edges, bin_edges(balanced))
    shown = proposals[:SHOWN_IMAGES]
    masks = {
        "random": [draw_random(each, random) for each in shown],
        "IoU-balanced": [draw_balanced(each, balanced) for each in shown],
    }
    save_sampled_boxes(folder / "sampling_boxes.png", shown, masks, bin_edges(balanced))
    print(f"wrote sampling_ious.png and sampling_boxes.png to {folder}")


def table(shares: dict[str, Tensor], edges: Tensor) -> str:
    lines = [f"{'share of negatives with IoU':>28}" + "".join(f"{name:>14}" for name in shares)]
    for i, (low, high) in enumerate(pairwise(edges.tolist())):
        values = "".join(f"{100 * share[i].item():>12.1f} %" for share in shares.values())
        lines.append(f"{f'{low:.2f} to {high:.2f}':>28}{values}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
