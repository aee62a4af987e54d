"""Trains Libra Faster R-CNN and Libra RetinaNet on data in COCO layout, or their torchvision baselines.

    python examples/train_torchvision_libra.py                          # small, on drawn shapes, minutes on a CPU
    python examples/train_torchvision_libra.py --data-path coco --check-data    # a report on the data, no training
    python examples/train_torchvision_libra.py --data-path coco         # full COCO on one GPU
    torchrun --standalone --nproc-per-node 8 examples/train_torchvision_libra.py --data-path coco         # and on eight
    python examples/train_torchvision_libra.py --resume runs/.../checkpoint.pth           # goes on as it began

The output folder gets args.json, and after every epoch checkpoint.pth, a row of metrics.jsonl, curves.png and a picture
of what was found, missed, and taken for an object. checkpoint_best.pth is the checkpoint with the highest AP.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import Checkpoint, Position, prepare_folder, save
from balanced_learning.training.command_line import lr_note, make_parser, read_command_line
from balanced_learning.training.config import Config
from balanced_learning.training.data.batching import DetectionLoader, make_loaders
from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.errors import UserError
from balanced_learning.training.evaluation import detections_per_image, evaluate_detections
from balanced_learning.training.inference import predict
from balanced_learning.training.loop import train_one_epoch
from balanced_learning.training.model import make_model
from balanced_learning.training.optimization import Precision, make_optimizer, make_scheduler
from balanced_learning.training.reporting.evaluation_picture import save_evaluation
from balanced_learning.training.reporting.figures import save_curves
from balanced_learning.training.reporting.metrics import continue_rows, is_best, read_rows, write_config, write_row
from balanced_learning.training.reporting.next_steps import next_steps
from balanced_learning.training.reporting.tables import report, summary
from balanced_learning.training.reporting.tensorboard import TensorBoard
from balanced_learning.training.weights import choose_labels


def main(argv: list[str] | None = None) -> None:
    try:
        run(*read_command_line(make_parser(__doc__).parse_args(argv)))
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        distributed.stop()


def run(config: Config, checkpoint: Checkpoint | None) -> None:
    device = distributed.start(config.run.device, config.run.dist_url)
    is_main = distributed.is_main()
    say = print if is_main else lambda *_: None
    torch.use_deterministic_algorithms(config.training.use_deterministic_algorithms, warn_only=True)
    if not config.run.check_data:
        prepare_folder(config, checkpoint)

    train, val = read_splits(config)
    labels = choose_labels(config, train, checkpoint)
    train_loader, val_loader = make_loaders(config, device, train, val, labels)
    if checkpoint:
        checkpoint.check_data(
            train,
            iterations=None if config.run.test_only else len(train_loader),
            batch_size=config.training.batch_size,
            processes=distributed.world_size(),
        )
    num_images = len(train_loader.dataset)
    if num_images < len(train.images):
        say(f"{len(train.images) - num_images} images without a box to learn are left out; --keep-empty takes them")
    say(f"{num_images} images to train on, {len(val.images)} to evaluate, {len(labels.names)} classes")
    if config.run.check_data:
        return

    model = make_model(config, labels, checkpoint).to(device)
    if config.model.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    precision = Precision(config.training.amp, device)
    if config.run.test_only:
        evaluate(config, model, val, val_loader, labels, precision, "test")
        return

    say(lr_note(config))
    optimizer = make_optimizer(model, config.training)
    scheduler = make_scheduler(optimizer, config.training, len(train_loader))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": precision.scaler}
    first_epoch = config.run.start_epoch
    folder = config.run.output_dir
    if checkpoint:
        checkpoint.restore({name: part for name, part in parts.items() if name != "model"})  # which has its weights
        first_epoch = checkpoint.position.epoch
        say(f"continuing from {checkpoint.path}, at epoch {first_epoch}, to {config.training.epochs} epochs")
        if is_main:
            continue_rows(folder / "metrics.jsonl", checkpoint.path.with_name("metrics.jsonl"), first_epoch - 1)
    tensorboard = TensorBoard(folder, model) if config.run.tensorboard and is_main else None
    if is_main:
        write_config(folder / "args.json", config)

    parallel = nn.parallel.DistributedDataParallel(model) if distributed.world_size() > 1 else model
    for epoch in range(first_epoch, config.training.epochs):
        row: dict[str, Any] = {"epoch": epoch}
        row |= train_one_epoch(parallel, optimizer, scheduler, train_loader, precision, config, epoch)
        images_per_step = config.training.batch_size * distributed.world_size()
        position = Position(epoch + 1, 0, len(train_loader), images_per_step, [], [])
        state: dict[str, Any] = {"config": config, "labels": labels, "position": position}
        if is_main:
            save(folder / "checkpoint.pth", parts, **state)
            write_row(folder / "metrics.jsonl", row)
        row |= evaluate(config, model, val, val_loader, labels, precision, f"{epoch:02}")
        if is_main:
            rows = write_row(folder / "metrics.jsonl", row)
            save_curves(folder / "curves.png", rows)
            if is_best(rows):
                save(folder / "checkpoint_best.pth", parts, **state)
        if tensorboard:
            tensorboard.write(row)
    if is_main and (rows := read_rows(folder / "metrics.jsonl")):
        print(next_steps(config, rows, Path(__file__).parent, val.image_dir))


def evaluate(
    config: Config,
    model: nn.Module,
    val: Split,
    val_loader: DetectionLoader,
    labels: Labels,
    precision: Precision,
    name: str,
) -> dict[str, float | None]:
    """Prints what the main process returns, and writes it and some pictures as ``evaluation_<name>``."""
    distributed.share_buffers(model)
    detections = predict(model, val_loader, precision, config.run.print_freq)
    if not distributed.is_main():
        return {}
    evaluation = evaluate_detections(
        val, detections, labels.label_of, config.run.coco_backend, limit=detections_per_image(model)
    )
    is_last = name in ("test", f"{config.training.epochs - 1:02}")
    print(report(evaluation) if is_last else summary(evaluation))
    file = config.run.output_dir / f"evaluation_{name}.json"
    file.write_text(json.dumps(evaluation.plain(), indent=2) + "\n")
    save_evaluation(file.with_suffix(".png"), val_loader.dataset, detections, labels.names, config.training.seed)
    return evaluation.row()


if __name__ == "__main__":
    main()
