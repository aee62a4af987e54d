"""Trains Libra Faster R-CNN and Libra RetinaNet on data in COCO layout, or their torchvision baselines.

    python examples/train_torchvision_libra.py                          # small, on drawn shapes, minutes on a CPU
    python examples/train_torchvision_libra.py --data-path coco --check-data    # a report on the data, no training
    python examples/train_torchvision_libra.py --data-path coco --dry-run       # all that a run does, for a minute
    python examples/train_torchvision_libra.py --data-path coco         # full COCO on one GPU
    torchrun --standalone --nproc-per-node 8 examples/train_torchvision_libra.py --data-path coco         # and on eight
    python examples/train_torchvision_libra.py --list-recipes           # settings of the paper's tables, for --recipe
    python examples/train_torchvision_libra.py --resume runs/.../checkpoint.pth           # goes on as it began

With --output-dir FOLDER --resume auto the same command starts a run and goes on with it. SIGTERM, SIGINT (Ctrl-C),
SIGUSR1 and SIGHUP (a terminal that is closed) end the step, save, and end the program with exit code 75: the run can go
on. A second Ctrl-C ends it at once.

The output folder gets args.json, checkpoint.pth, and after every epoch a row of metrics.jsonl, curves.png and a picture
of what was found, missed, and taken for an object. checkpoint_best.pth is the checkpoint with the highest AP, or the
highest AR1000 of an RPN alone.
"""

import json
from contextlib import nullcontext
from pathlib import Path

import torch

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.command_line import lr_note, read_command_line
from balanced_learning.training.config import Config
from balanced_learning.training.data.batching import DetectionLoader, make_loaders
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.dry_run import dry_run
from balanced_learning.training.dumping import dump
from balanced_learning.training.endings import ends_in_one_line
from balanced_learning.training.evaluation import Evaluation, detections_per_image, evaluate_detections
from balanced_learning.training.files import write_or_warn
from balanced_learning.training.flags import make_parser
from balanced_learning.training.loop import Loop
from balanced_learning.training.model import make_model, prepare
from balanced_learning.training.optimization import Precision
from balanced_learning.training.output_folder import run_folder
from balanced_learning.training.recall import evaluate_proposals
from balanced_learning.training.replay import replay
from balanced_learning.training.reporting.evaluation_picture import save_evaluation
from balanced_learning.training.reporting.next_steps import next_steps
from balanced_learning.training.reporting.reports import Reports
from balanced_learning.training.reporting.tables import report
from balanced_learning.training.run import Run
from balanced_learning.training.signals import StopSignals
from balanced_learning.training.weights import choose_labels


def main(argv: list[str] | None = None) -> None:
    with StopSignals(is_last=argv is None) as signals, ends_in_one_line():
        config, checkpoint = read_command_line(make_parser(__doc__).parse_args(argv))
        if config.run.dry_run:
            dry_run(config, lambda config, checkpoint: start(config, checkpoint, signals))
        else:
            start(config, checkpoint, signals)


def start(config: Config, checkpoint: Checkpoint | None, signals: StopSignals) -> None:
    """Does what the settings ask for."""
    device = distributed.start(config.run.device, config.run.dist_url)
    torch.use_deterministic_algorithms(config.training.use_deterministic_algorithms, warn_only=True)
    precision = Precision(config.training.amp, device)
    if config.run.replay and checkpoint:
        print(replay(checkpoint, make_model(config, checkpoint.labels, checkpoint).to(device), precision))
    elif config.run.check_data:
        read_data(config, checkpoint, device)
    elif config.run.dump_proposals:
        dump(config, config.run.dump_proposals, checkpoint, precision, signals)
    else:
        together = signals.deferred() if distributed.world_size() > 1 else nullcontext()  # where they ask each other
        with together, run_folder(config, checkpoint) as settled:
            train(settled, checkpoint, precision, signals)


def read_data(
    config: Config, checkpoint: Checkpoint | None, device: torch.device
) -> tuple[Labels, DetectionLoader, DetectionLoader]:
    """The labels of the data, and the loaders of what is to be trained on and evaluated."""
    train_split, val = read_splits(config)
    labels = choose_labels(config, train_split, checkpoint)
    train_loader, val_loader = make_loaders(config, device, train_split, val, labels)
    if checkpoint:
        checkpoint.check_data(train_split, config, iterations=len(train_loader))
    num_images = len(train_loader.dataset)
    if num_empty := len(train_split.images) - num_images:
        distributed.say(f"{num_empty} images without a box to learn are left out; --keep-empty takes them")
    classes = f"{len(labels.names)} class{'es' if len(labels.names) != 1 else ''}"
    distributed.say(f"{num_images} images to train on, {len(val.images)} to evaluate, {classes}")
    return labels, train_loader, val_loader


def train(config: Config, checkpoint: Checkpoint | None, precision: Precision, signals: StopSignals) -> None:
    """Trains and evaluates, epoch after epoch, or only evaluates."""
    labels, train_loader, val_loader = read_data(config, checkpoint, precision.device)
    signals.stop_together()
    if checkpoint and config.run.test_only:
        checkpoint = checkpoint.averaged()
    model = prepare(make_model(config, labels, checkpoint), config.model, precision.device)
    run = Run(config, labels, model, precision, len(train_loader), None if config.run.test_only else checkpoint)
    loop = Loop(run, train_loader, val_loader, signals)
    if config.run.test_only:
        with signals.deferred():
            distributed.say(report(evaluate(loop, labels, "test")))
        return

    distributed.say(lr_note(config))
    if checkpoint:
        distributed.say(f"{checkpoint.path}: {run.outlook()}")
    reports = Reports(run)
    with signals.deferred():  # from here on they are asked for between two batches
        while not run.is_over():
            if run.step < run.iterations:
                loop.train_epoch()
            evaluation = evaluate(loop, labels, f"{run.epoch:02}") if run.is_evaluation_due() else None
            run.end_epoch(evaluation.row() if evaluation else {})
            reports.add_epoch(evaluation)
    if run.history:
        distributed.say(next_steps(config, run.history, Path(__file__).parent, val_loader.dataset.split.image_dir))


def evaluate(loop: Loop, labels: Labels, name: str) -> Evaluation:
    """Writes what it returns, with some pictures, as ``evaluation_<name>``."""
    config, images, file = loop.run.config, loop.val_loader.dataset, loop.run.folder / f"evaluation_{name}.json"
    detections = loop.detect()

    def work() -> Evaluation:
        data = images.split, detections, labels.label_of, config.run.coco_backend
        if config.model.is_rpn:
            evaluation = evaluate_proposals(*data)
        else:
            evaluation = evaluate_detections(*data, limit=detections_per_image(loop.run.model))
        text = json.dumps(evaluation.plain(), indent=2) + "\n"
        write_or_warn(file, lambda content: content.write(text.encode()))
        save_evaluation(file.with_suffix(".png"), images, detections, labels.names, config.training.seed)
        return evaluation

    return distributed.in_main(work)


if __name__ == "__main__":
    main()
