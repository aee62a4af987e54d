"""Measures the three imbalances that Libra R-CNN is about, of your detector on your data, and suggests what to try.

    python examples/imbalance_report.py                                             # drawn shapes, minutes on a CPU
    python examples/imbalance_report.py --data-path coco --resume runs/.../checkpoint.pth
    python examples/imbalance_report.py --data-path coco --weights DEFAULT          # torchvision's COCO weights
    python examples/imbalance_report.py --data-path coco --warm-up-steps 1000       # trains the plain detector first

Takes the options of the training script. Measures some batches of training images: how sampling by IoU would change
what the second stage learns from, which maps of the backbone an object's score comes from, and whose gradient the box
loss is; and evaluates at most as many of val2017. Both are spread evenly over the data; those of training have boxes.
Without --resume and --recipe, the parts of Libra R-CNN are off that no flag switches on; a detector whose weights know
nothing of the data's categories is trained for some steps first, in memory. Prints a block and a sentence a level, and
writes imbalance.json and imbalance.png to the output folder.

The verdicts rest on a rule of thumb, see balanced_learning/training/imbalance/advice.py, and have not foretold what
helped in the study of docs/study.md.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from balanced_learning import backend_info
from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.command_line import read_command_line
from balanced_learning.training.config import AUTO, Config
from balanced_learning.training.data.batching import make_loaders
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.endings import ends_in_one_line
from balanced_learning.training.errors import UserError, printable
from balanced_learning.training.files import write_text
from balanced_learning.training.flags import make_parser
from balanced_learning.training.imbalance.advice import advise
from balanced_learning.training.imbalance.gathering import gather, require_all_levels
from balanced_learning.training.imbalance.text import blocks
from balanced_learning.training.imbalance.warm_up import STEPS, steps_to_warm_up, warm_up
from balanced_learning.training.measuring import evenly_spaced, images_to_measure, origin_of_weights
from balanced_learning.training.model import make_model, prepare
from balanced_learning.training.optimization import Precision
from balanced_learning.training.output_folder import find_folder
from balanced_learning.training.reporting.imbalance_figure import save_imbalance
from balanced_learning.training.reproduction.reproducing import find_commit
from balanced_learning.training.settings import not_negative, positive
from balanced_learning.training.signals import StopSignals
from balanced_learning.training.weights import choose_labels

PARTS = ("sampler", "pyramid", "box_loss")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batches", type=positive, default=50, metavar="N", help="of images to measure (default: 50)")
    parser.add_argument(
        "--warm-up-steps",
        type=not_negative,
        default=None,
        metavar="N",
        help=f"train for N steps before (default: {STEPS} where the weights do not know the data's categories, else 0)",
    )
    with StopSignals(is_last=argv is None), ends_in_one_line():
        run(parser.parse_args(argv))


def run(given: argparse.Namespace) -> None:
    config, checkpoint = read_settings(given)
    require_all_levels(config)
    folder = find_folder(config)
    device = distributed.start(config.run.device, config.run.dist_url)
    train, val = read_splits(config)
    labels = choose_labels(config, train, checkpoint)
    if checkpoint:
        checkpoint.check_data(train, iterations=None)
    steps = steps_to_warm_up(config, checkpoint, labels, given.warm_up_steps)
    model = make_model(config, labels, checkpoint and checkpoint.averaged())
    model = prepare(model, replace(config.model, compile=False), device).eval()  # for so little it takes too long
    precision = Precision(config.training.amp, device)
    images = images_to_measure(config, train, labels, given.batches)
    val = val.take(evenly_spaced(len(val.images), len(images)))
    train_loader, val_loader = make_loaders(config, device, train, val, labels)
    if steps:
        warm_up(config, labels, model, precision, train_loader, steps)
    measured = gather(config, model, images, val_loader, precision)
    advices = advise(measured, config)

    origin = origin_of_weights(config, checkpoint, steps)
    data = config.data.data_path.name if config.data.data_path else "drawn shapes"
    title = f"{printable(data)}: {origin}; {measured.images} training images, {measured.evaluated_images} evaluated"
    print(f"\n{title}\n\n{blocks(measured, advices)}")
    content = {
        "detector": {"origin": origin, "warm_up_steps": steps, **vars(config.model), **vars(config.libra)},
        "data": {
            "data_path": config.plain()["data_path"],
            "images": measured.images,
            "evaluated_images": measured.evaluated_images,
            "categories": list(labels.names.values()),
        },
        "has_learned": measured.has_learned,
        **measured.plain(),
        "advice": [vars(each) for each in advices],
        "versions": backend_info(),
        "commit": find_commit(Path(__file__).parent),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    write_text(folder / "imbalance.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    save_imbalance(folder / "imbalance.png", title, measured, advices)
    print(f"wrote imbalance.json and imbalance.png to {folder}")


def read_settings(given: argparse.Namespace) -> tuple[Config, Checkpoint | None]:
    """Those that the flags ask for; the plain detector's, where they name neither a checkpoint nor a recipe."""
    if distributed.announced_world_size() > 1:
        raise UserError("torchrun: the report is of a single process; call it with python")
    if "replay" in vars(given):
        raise UserError(f"--replay {given.replay}: repeats a step of training; a checkpoint is measured with --resume")
    if not {"resume", "recipe"} & vars(given).keys():
        for part in PARTS:
            vars(given).setdefault(part, False)
    config, checkpoint = read_command_line(given, trains=False)
    if config.run.resume == AUTO and not checkpoint:
        raise UserError(f"--resume auto: {config.run.output_dir} holds no checkpoint to measure")
    return config, checkpoint


if __name__ == "__main__":
    main()
