"""Draws the boxes that IoU-balanced sampling chooses on your data, beside random sampling: figures 3 and 6.

    python examples/plot_sampling.py                                                # drawn shapes, random weights
    python examples/plot_sampling.py --data-path coco --resume runs/.../checkpoint.pth --batches 50

Takes the options of the training script, and some batches of its training images. Prints the share of the negatives in
each interval of IoU, and above IoU 0.05 beside what the paper says of COCO; writes sampling_ious.png and
sampling_boxes.png to the output folder. Hard negatives are those that the model takes for objects most; they mean
something for trained weights only. Where an image has few more negatives than are sampled, all samplers take the same;
a --small detector has more with --rpn-pre-nms-top-n-train 1000 --rpn-post-nms-top-n-train 1000.
"""

import argparse
from collections import defaultdict
from itertools import pairwise

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning.detection.imbalance.sample_level import (
    INTERVALS,
    LOW_IOU,
    MatchedProposals,
    bin_edges,
    chosen_ious,
    draw_balanced,
    draw_random,
    interval_edges,
    interval_shares,
    match_proposals,
)
from balanced_learning.training import randomness
from balanced_learning.training.command_line import read_command_line
from balanced_learning.training.endings import ends_in_one_line
from balanced_learning.training.errors import UserError
from balanced_learning.training.flags import make_parser
from balanced_learning.training.measuring import batches_to_measure, detector_and_images, origin_of_weights
from balanced_learning.training.output_folder import find_folder
from balanced_learning.training.reporting.figures import save_iou_shares, save_sampled_boxes
from balanced_learning.training.settings import positive

DRAWS = 20  # of each image
SHOWN_IMAGES = 3
PAPER = {"hard": "> 60 %", "random": "about 30 %"}  # above LOW_IOU, on COCO


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batches", type=positive, default=8, metavar="N", help="of images to measure (default: 8)")
    with ends_in_one_line():
        run(parser.parse_args(argv))


def run(given: argparse.Namespace) -> None:
    config, checkpoint = read_command_line(given, trains=False)
    if config.model.is_rpn or config.model.is_retinanet:
        raise UserError(f"--model {config.model.model}: it has no second stage that samples proposals")
    if not config.model.sampler:
        raise UserError("--no-sampler: there is no IoU-balanced sampling to draw")
    folder = find_folder(config)
    model, dataset = detector_and_images(config, checkpoint, given.batches)
    balanced = model.roi_heads.fg_bg_sampler
    random = BalancedPositiveNegativeSampler(balanced.batch_size_per_image, balanced.positive_fraction)
    randomness.seed_all(config.training.seed, "plot")
    chosen: dict[str, list[Tensor]] = defaultdict(list)
    shown: list[MatchedProposals] = []
    for images, targets in batches_to_measure("sampling", config, model, dataset):
        proposals = match_proposals(model, images, targets)
        shown += proposals[: SHOWN_IMAGES - len(shown)]
        for each in proposals:
            for name, ious in chosen_ious(each, balanced, random, draws=DRAWS).items():
                chosen[name].append(ious)
    negatives = {name: torch.cat(ious) for name, ious in chosen.items()}

    edges = interval_edges(balanced, at_least=INTERVALS)
    shares = {name: interval_shares(ious, edges) for name, ious in negatives.items()}
    print(f"the negatives of {len(dataset)} training images; {origin_of_weights(config, checkpoint)}")
    print("hard: the quarter of an image's negatives with the highest classification loss")
    print(table(negatives, shares, edges))
    save_iou_shares(folder / "sampling_ious.png", shares, edges, bin_edges(balanced))
    masks = {
        "random": [draw_random(each, random) for each in shown],
        "IoU-balanced": [draw_balanced(each, balanced) for each in shown],
    }
    save_sampled_boxes(folder / "sampling_boxes.png", shown, masks, bin_edges(balanced))
    print(f"wrote sampling_ious.png and sampling_boxes.png to {folder}")


def table(negatives: dict[str, Tensor], shares: dict[str, Tensor], edges: Tensor) -> str:
    def line(title: str, values: list[str]) -> str:
        return f"{title:>34}" + "".join(f"{value:>14}" for value in values)

    draws = {"random": DRAWS, "IoU-balanced": DRAWS}
    lines = [line("negatives", list(shares))]
    lines += [line("number", [f"{len(ious) // draws.get(name, 1)}" for name, ious in negatives.items()])]
    for i, (low, high) in enumerate(pairwise(edges.tolist())):
        title = f"share with IoU {low:.2f} to {high:.2f}"
        lines += [line(title, [f"{100 * share[i].item():.1f} %" for share in shares.values()])]
    above = [f"{100 * (ious > LOW_IOU).float().mean().item():.1f} %" for ious in negatives.values()]
    lines += [line(f"share with IoU above {LOW_IOU}", above)]
    lines += [line("the same in the paper, on COCO", [PAPER.get(name, "") for name in negatives])]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
