"""Draws balanced L1 and its gradient beside smooth L1, figure 5 of Libra R-CNN, and measures what inliers contribute.

    python examples/plot_loss.py --output-dir figures                               # the curves alone
    python examples/plot_loss.py --data-path coco --resume runs/.../checkpoint.pth  # also measures a detector

Writes losses.png to the output folder: several alpha above, with gamma 1, several gamma below, with alpha 0.5. Given
data or a detector by the options of the training script, it also prints how much of the gradient of each loss comes
from inliers, coordinates whose error is below --beta (1, whatever the detector's), on the boxes that it learns from:
the sampled positives of the second stage, or all positive anchors of RetinaNet. The gradient of a box is the sum over
its four coordinates. Beside the inliers' share of the total and of each box's gradient there is what the paper's text
gives: the mean gradient of an inlier as a share of the mean gradient of an outlier. It means something for trained
weights only.
"""

import argparse
import math

import torch
from torch import Tensor, nn

from balanced_learning import BalancedL1Loss
from balanced_learning.detection.imbalance.objective_level import box_errors, gradient_shares
from balanced_learning.training import randomness
from balanced_learning.training.command_line import read_command_line
from balanced_learning.training.endings import ends_in_one_line
from balanced_learning.training.errors import UserError
from balanced_learning.training.flags import make_parser
from balanced_learning.training.measuring import batches_to_measure, detector_and_images, origin_of_weights
from balanced_learning.training.output_folder import find_folder
from balanced_learning.training.reporting.figures import save_losses
from balanced_learning.training.settings import above_zero, positive

ALPHA, GAMMA, BETA = 0.5, 1.0, 1.0  # of the curves of several gamma, of several alpha, and of all
PAPER = "the paper, on COCO: under smooth L1, the gradient of an inlier is 30 % of an outlier's"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--alphas", type=above_zero, nargs="+", default=[0.2, 0.3, 0.5], help="default: 0.2 0.3 0.5")
    parser.add_argument("--gammas", type=above_zero, nargs="+", default=[1.0, 1.5, 2.0], help="default: 1.0 1.5 2.0")
    parser.add_argument("--batches", type=positive, default=8, metavar="N", help="of images to measure (default: 8)")
    with ends_in_one_line():
        run(parser.parse_args(argv))


def run(given: argparse.Namespace) -> None:
    config, checkpoint = read_command_line(given, trains=False)
    beta = getattr(given, "beta", BETA)  # not that of the checkpoint: figures of several are compared
    of_alphas = balanced([(alpha, GAMMA) for alpha in given.alphas], beta)
    of_gammas = balanced([(ALPHA, gamma) for gamma in given.gammas], beta)
    smooth = {"smooth L1": nn.SmoothL1Loss(beta=beta)}
    folder = find_folder(config)
    if {"data_path", "recipe", "resume", "weights"} & vars(given).keys():
        if config.model.is_rpn:
            raise UserError("--model libra_rpn: it has no second stage, whose box errors are measured")
        model, dataset = detector_and_images(config, checkpoint, given.batches)
        randomness.seed_all(config.training.seed, "plot")
        batches = batches_to_measure("box errors", config, model, dataset)
        errors = torch.cat([box_errors(model, images, targets) for images, targets in batches])
        print(f"the {len(errors)} positives of {len(dataset)} training images; {origin_of_weights(config, checkpoint)}")
        print(table(errors, smooth | of_alphas | of_gammas, beta))
    save_losses(folder / "losses.png", [smooth | of_alphas, smooth | of_gammas], beta)
    print(f"wrote losses.png to {folder}")


def balanced(parameters: list[tuple[float, float]], beta: float) -> dict[str, nn.Module]:
    try:
        return {f"alpha {alpha:g}, gamma {gamma:g}": BalancedL1Loss(alpha, gamma, beta) for alpha, gamma in parameters}
    except ValueError as error:
        raise UserError(f"--alphas, --gammas and --beta: {error}") from None


def table(errors: Tensor, losses: dict[str, nn.Module], beta: float) -> str:
    shares = {name: gradient_shares(errors, loss, beta=beta) for name, loss in losses.items()}
    columns = ("of the total", "of a positive's, mean", "of an outlier's")
    lines = [f"{100 * next(iter(shares.values())).inliers:.1f} % of the coordinates are inliers; their gradient is"]
    lines += [" " * 22 + "".join(f"{title:>24}" for title in columns)]
    for name, (_, *parts) in shares.items():
        lines += [f"{name:>22}" + "".join(f"{'-' if math.isnan(p) else f'{100 * p:.1f} %':>24}" for p in parts)]
    return "\n".join([*lines, PAPER])


if __name__ == "__main__":
    main()
