"""Trains Libra Faster R-CNN and Libra RetinaNet on data in COCO layout.

    python examples/train_torchvision_libra.py                          # small, on drawn shapes, minutes on a CPU
    python examples/train_torchvision_libra.py --data-path coco         # full COCO on one GPU
    torchrun --nproc-per-node 8 examples/train_torchvision_libra.py --data-path coco      # and on eight

The output folder gets args.json, checkpoint.pth and a row of metrics.jsonl after every epoch, pictures of predictions
beside the ground truth, and curves.png at the end.
"""

import json
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import checkpoint
import distributed
from balanced_learning import backend_info
from board import Board
from coco import Split, read_split
from dataset import AspectRatioBatchSampler, DetectionDataset, augmentation, loader
from engine import Precision, make_optimizer, make_scheduler, predict, train_one_epoch
from errors import UserError
from evaluation import coco_metrics, table
from model import build_model
from options import parse_args, scale_lr
from report import Progress, save_curves, save_predictions, write_row
from shapes import shapes_dataset

NUM_PICTURES = 4


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_args(argv))
    except UserError as error:
        # An error from a loader process comes with that process's traceback before it.
        message = str(error).strip().splitlines()[-1].removeprefix("errors.UserError: ")
        sys.exit(f"error: {message}")
    finally:
        distributed.stop()


def run(args: Namespace) -> None:
    device = distributed.start(args.device, args.dist_url)
    say = print if distributed.is_main() else lambda *_: None
    torch.use_deterministic_algorithms(args.use_deterministic_algorithms, warn_only=True)
    _check_output(args)

    train, val = read_data(args)
    label_of = labels_of(train, args.weights)
    say(f"{len(train.images)} images to train on, {len(val.images)} to evaluate, {len(label_of)} classes")
    say(scale_lr(args))
    batches, train_loader, val_loader = _loaders(args, device, train, val, label_of)

    torch.manual_seed(args.seed)
    model = build_model(args, max(label_of.values()) + 1).to(device)
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    precision = Precision(args.amp, device)
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, args, len(train_loader))
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": precision.scaler}
    made_for = made_for_of(args, label_of)
    schedule = _schedule(args, len(train_loader))
    if args.test_only:
        if args.resume:
            checkpoint.load(args.resume, {"model": model}, made_for)
        _evaluate(args, model, val, val_loader, label_of, precision, "test")
        return
    if args.resume:
        epoch = checkpoint.load(args.resume, state, made_for | schedule)
        args.start_epoch = epoch + 1
        say(f"continuing from {args.resume}, after epoch {epoch}")
    board = Board(args.output_dir, model) if args.tensorboard and distributed.is_main() else None
    if distributed.is_main():
        _write_args(args)

    parallel = nn.parallel.DistributedDataParallel(model) if distributed.world_size() > 1 else model
    for epoch in range(args.start_epoch, args.epochs):
        # All chance starts anew with the epoch, so a resumed run draws what an uninterrupted one would.
        torch.manual_seed(args.seed + epoch * distributed.world_size() + distributed.rank())
        batches.epoch = epoch
        progress = Progress(f"epoch {epoch}", args.print_freq, is_main=distributed.is_main())
        row = train_one_epoch(
            parallel, optimizer, scheduler, train_loader, precision, clip_norm=args.clip_grad_norm, progress=progress
        )
        if distributed.is_main():
            write_row(args.output_dir / "metrics.jsonl", {"epoch": epoch, **row})
            checkpoint.save(args.output_dir / "checkpoint.pth", state, epoch, made_for | schedule)
        metrics = _evaluate(args, model, val, val_loader, label_of, precision, f"{epoch:02}")
        if distributed.is_main():
            rows = write_row(args.output_dir / "metrics.jsonl", {"epoch": epoch, **row, **metrics})
            save_curves(args.output_dir / "curves.png", rows)
        if board:
            board.write(rows[-1])
    say(f"done: {args.output_dir}")


def _evaluate(
    args: Namespace,
    model: nn.Module,
    val: Split,
    val_loader: DataLoader,
    label_of: dict[int, int],
    precision: Precision,
    name: str,
) -> dict[str, float | None]:
    """Prints the metrics, and writes them and some pictures as ``evaluation_<name>``; the main process returns them."""
    distributed.share_buffers(model)
    progress = Progress("evaluation", args.print_freq, is_main=distributed.is_main())
    detections = distributed.union_over_processes(predict(model, val_loader, precision, progress))
    if not distributed.is_main():
        return {}
    metrics = coco_metrics(val, detections, label_of, args.coco_backend)
    print(table(metrics))
    (args.output_dir / f"evaluation_{name}.json").write_text(json.dumps(metrics, indent=2) + "\n")
    samples = (val_loader.dataset[i] for i in range(min(NUM_PICTURES, len(val.images))))
    pictures = ((image, target, detections[target["image_id"]]) for image, target in samples)
    names = {label: val.categories[category_id] for category_id, label in label_of.items()}
    save_predictions(args.output_dir / f"evaluation_{name}.png", pictures, names)
    return metrics


def made_for_of(args: Namespace, label_of: dict[int, int]) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued from or evaluated."""
    backbone = "small" if args.small else args.backbone
    necks = {"pyramid": args.pyramid, "path_aggregation": args.path_aggregation}
    return {"model": args.model, "backbone": backbone, **necks, "label of each category": label_of}


def _schedule(args: Namespace, iterations: int) -> dict[str, Any]:
    """What a checkpoint must also agree with for its learning rates to go on as they began."""
    schedule = {"iterations of an epoch": iterations, "lr": args.lr, "lr_scheduler": args.lr_scheduler}
    if args.lr_scheduler == "cosineannealinglr":
        return schedule | {"epochs": args.epochs}
    return schedule | {"lr_steps": args.lr_steps, "lr_gamma": args.lr_gamma}


def _check_output(args: Namespace) -> None:
    """Finds out before training that the folder cannot be written, or holds the checkpoint of another run."""
    if not distributed.is_main():
        return
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        probe = args.output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output-dir {args.output_dir}: cannot be written ({error.strerror})") from None
    existing = args.output_dir / "checkpoint.pth"
    if (
        existing.exists()
        and not args.test_only
        and (args.resume is None or args.resume.resolve() != existing.resolve())
    ):
        raise UserError(f"--output-dir {args.output_dir}: holds {existing.name}; --resume {existing}, or name another")


def read_data(args: Namespace) -> tuple[Split, Split]:
    if args.data_path is None:
        if distributed.is_main():
            args.data_path = shapes_dataset()
        distributed.barrier()
        args.data_path = args.data_path or shapes_dataset()
    train, val = (read_split(args.data_path, name, limit=args.limit) for name in ("train2017", "val2017"))
    if train.categories != val.categories:
        odd = set(train.categories.items()) ^ set(val.categories.items())
        raise UserError(f"{val.json_file}: other categories than in {train.json_file.name}, such as {min(odd)}")
    return train, val


def labels_of(split: Split, weights: str | None) -> dict[int, int]:
    """The model's label of each category id: 1, 2, ... in the order of the ids, or as ``weights`` have it."""
    if not weights:
        return {category_id: label for label, category_id in enumerate(sorted(split.categories), 1)}
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    known = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    unknown = [name for name in split.categories.values() if name not in known]
    if unknown:
        raise UserError(f"--weights {weights}: they know no category {unknown[0]!r}, which {split.json_file} has")
    return {category_id: known.index(name) for category_id, name in split.categories.items()}


def _loaders(
    args: Namespace, device: torch.device, train: Split, val: Split, label_of: dict[int, int]
) -> tuple[AspectRatioBatchSampler, DataLoader, DataLoader]:
    images = train.images if args.keep_empty else [image for image in train.images if train.boxes(image)]
    if not images:
        raise UserError(f"{train.json_file}: no image has a box to train on")
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = AspectRatioBatchSampler(
        images,
        args.batch_size,
        group_factor=args.aspect_ratio_group_factor,
        seed=args.seed,
        rank=rank,
        world_size=world_size,
    )
    train_set = DetectionDataset(train, label_of, images, augmentation(args.data_augmentation))
    train_loader = loader(train_set, args.workers, device, batch_sampler=batches)
    val_set = DetectionDataset(val, label_of)
    share = range(rank, len(val_set), world_size)  # no padding: nothing is evaluated twice
    return batches, train_loader, loader(val_set, args.workers, device, sampler=share)


def _write_args(args: Namespace) -> None:
    values: dict[str, Any] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    values |= {"world_size": distributed.world_size(), "command": shlex.join(["python", *sys.argv])}
    values |= {
        "versions": backend_info(),
        "threads": torch.get_num_threads(),
    }
    (args.output_dir / "args.json").write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
