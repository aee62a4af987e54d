"""Trains Libra Faster R-CNN and Libra RetinaNet on data in COCO layout, or their torchvision baselines.

    python examples/train_torchvision_libra.py                          # small, on drawn shapes, minutes on a CPU
    python examples/train_torchvision_libra.py --data-path coco --check-data    # a report on the data, no training
    python examples/train_torchvision_libra.py --data-path coco --dry-run       # all that a run does, for a minute
    python examples/train_torchvision_libra.py --data-path coco         # full COCO on one GPU
    torchrun --standalone --nproc-per-node 8 examples/train_torchvision_libra.py --data-path coco         # and on eight
    python examples/train_torchvision_libra.py --resume runs/.../checkpoint.pth           # goes on as it began

With --output-dir FOLDER --resume auto the same command starts a run and goes on with it. SIGTERM, SIGINT (Ctrl-C) and
SIGUSR1 end the step, save, and end the program with exit code 75: run it again. A second Ctrl-C ends it at once.

The output folder gets args.json, checkpoint.pth, and after every epoch a row of metrics.jsonl, curves.png and a picture
of what was found, missed, and taken for an object. checkpoint_best.pth is the checkpoint with the highest AP.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.command_line import lr_note, make_parser, read_command_line
from balanced_learning.training.config import Config
from balanced_learning.training.data.batching import make_loaders
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.dry_run import dry_run
from balanced_learning.training.errors import SharedError, UserError
from balanced_learning.training.evaluation import Evaluation, detections_per_image, evaluate_detections
from balanced_learning.training.faults import replay
from balanced_learning.training.files import write_or_warn
from balanced_learning.training.loop import Loop
from balanced_learning.training.model import make_model, prepare
from balanced_learning.training.optimization import Precision
from balanced_learning.training.output_folder import run_folder
from balanced_learning.training.reporting.evaluation_picture import save_evaluation
from balanced_learning.training.reporting.figures import save_curves
from balanced_learning.training.reporting.metrics import write_config, write_rows
from balanced_learning.training.reporting.next_steps import next_steps
from balanced_learning.training.reporting.tables import report, summary
from balanced_learning.training.reporting.tensorboard import TensorBoard
from balanced_learning.training.run import Run
from balanced_learning.training.signals import EXIT_CODE, Stopped, StopSignals
from balanced_learning.training.weights import choose_labels


def main(argv: list[str] | None = None) -> None:
    with StopSignals() as signals:
        try:
            config, checkpoint = read_command_line(make_parser(__doc__).parse_args(argv))
            if config.run.dry_run:
                dry_run(config, lambda config, checkpoint: start(config, checkpoint, signals))
            else:
                start(config, checkpoint, signals)
        except UserError as error:
            is_told = isinstance(error, SharedError) and not distributed.is_main()
            sys.exit(1 if is_told else f"error: {error}")
        except Stopped as stopped:
            if distributed.is_main():
                print(
                    f"{stopped}; the same command with --resume auto goes on (exit code {EXIT_CODE})", file=sys.stderr
                )
            sys.exit(EXIT_CODE)
        except RuntimeError as error:
            if not distributed.is_of_another_process(error):
                raise
            sys.exit(f"error: process {distributed.rank()} has lost another one, which says why if it could")
        finally:
            distributed.stop()


def start(config: Config, checkpoint: Checkpoint | None, signals: StopSignals) -> Path:
    """Does what the settings ask for, and returns the output folder."""
    device = distributed.start(config.run.device, config.run.dist_url)
    torch.use_deterministic_algorithms(config.training.use_deterministic_algorithms, warn_only=True)
    precision = Precision(config.training.amp, device)
    if config.run.replay and checkpoint:
        print(replay(checkpoint, make_model(config, checkpoint.labels, checkpoint).to(device), precision))
        return checkpoint.path.parent
    with nullcontext(config) if config.run.check_data else run_folder(config, checkpoint) as settled:
        train(settled, checkpoint, precision, signals)
        return settled.run.output_dir


def train(config: Config, checkpoint: Checkpoint | None, precision: Precision, signals: StopSignals) -> None:
    is_main = distributed.is_main()
    say = print if is_main else lambda *_: None
    train_split, val = read_splits(config)
    labels = choose_labels(config, train_split, checkpoint)
    train_loader, val_loader = make_loaders(config, precision.device, train_split, val, labels)
    if checkpoint:
        checkpoint.check_data(train_split, config, iterations=len(train_loader))
    num_images = len(train_loader.dataset)
    if num_empty := len(train_split.images) - num_images:
        say(f"{num_empty} images without a box to learn are left out; --keep-empty takes them")
    say(f"{num_images} images to train on, {len(val.images)} to evaluate, {len(labels.names)} classes")
    if config.run.check_data:
        return

    if checkpoint and config.run.test_only:
        checkpoint = checkpoint.averaged()
    model = prepare(make_model(config, labels, checkpoint), config.model, precision.device)
    run = Run(config, labels, model, precision, len(train_loader), None if config.run.test_only else checkpoint)
    loop = Loop(run, train_loader, val_loader, signals)

    def evaluate(name: str) -> Evaluation | None:
        """Writes what the main process returns, with some pictures, as ``evaluation_<name>``."""
        detections = loop.evaluate()
        if not is_main:
            return None
        limit = detections_per_image(run.model)
        evaluation = evaluate_detections(val, detections, labels.label_of, config.run.coco_backend, limit=limit)
        file = run.folder / f"evaluation_{name}.json"
        text = json.dumps(evaluation.plain(), indent=2) + "\n"
        write_or_warn(file, lambda content: content.write(text.encode()))
        save_evaluation(file.with_suffix(".png"), val_loader.dataset, detections, labels.names, config.training.seed)
        return evaluation

    if config.run.test_only:
        if evaluation := evaluate("test"):
            print(report(evaluation))
        return

    say(lr_note(config))
    if checkpoint:
        say(f"{checkpoint.path}: {run.outlook()}")
    distributed.in_main(lambda: write_rows(run.folder / "metrics.jsonl", run.history))
    distributed.in_main(lambda: write_config(run.folder / "args.json", config))
    tensorboard = TensorBoard(run) if config.run.tensorboard and is_main else None
    with signals.deferred():  # from here on they are asked for between two batches
        while not run.is_over():
            if run.step < run.iterations:
                loop.train_epoch()
            name = f"{run.epoch:02}"
            evaluation = evaluate(name)
            run.end_epoch(evaluation.row() if evaluation else {})
            distributed.in_main(lambda: write_rows(run.folder / "metrics.jsonl", run.history))
            if evaluation:
                print(report(evaluation) if run.is_over() else summary(evaluation))
                save_curves(run.folder / "curves.png", run.history)
            if tensorboard:
                tensorboard.write(run.history[-1], run.folder / f"evaluation_{name}.png")
    if is_main and run.history:
        print(next_steps(config, run.history, Path(__file__).parent, val.image_dir))


if __name__ == "__main__":
    main()
