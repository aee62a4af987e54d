"""Images a second of the training loop, beside torchvision's reference loop on the same detector and data.

    BALANCED_LEARNING_DATA=data python benchmarks/train_step.py            # the small detector on data/coco_tiny
    python benchmarks/train_step.py --data-path coco --backbone resnet50 --workers 8 --amp bf16 --device cuda

Both loops begin each epoch with the same weights and take turns; the ratio is the median of those of their turns. Then
each trains one more epoch stage by stage, for the table of where the time goes; that epoch counts for nothing else. The
reference fills up its batches with images that were there before, and leaves out those of rare shapes; ours trains on
every image once, which takes a little more padding where there are few. Writes
benchmarks/results/train_step_<detector>_<device>.json, and prints the tables.
"""

import argparse
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import _reference_loop
from _common import environment, markdown, parser, write
from _stages import STAGES, watched
from balanced_learning.training import randomness
from balanced_learning.training.config import Config
from balanced_learning.training.data.batching import make_loaders
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.loop import Loop
from balanced_learning.training.model import make_model
from balanced_learning.training.optimization import Precision
from balanced_learning.training.recipe import Recipe
from balanced_learning.training.run import Run
from balanced_learning.training.signals import StopSignals
from balanced_learning.training.weights import choose_labels

OURS, REFERENCE = "this library", "torchvision's reference"
TURNS = 5
SIZES = {"small": ["128x160", "320x512"], "other": ["800x1333"]}

Epoch = Callable[[], tuple[Any, Any, Any, Callable[[], None]]]


def main() -> None:
    arguments = parser(__doc__)
    data = os.environ.get("BALANCED_LEARNING_DATA")
    arguments.add_argument("--data-path", type=Path, default=Path(data) / "coco_tiny" if data else None)
    arguments.add_argument("--backbone", help="of torchvision; default: the small detector")
    arguments.add_argument("--sizes", nargs="+", metavar="MINxMAX", help="of the shorter and of the longer side")
    arguments.add_argument("--batch-size", "-b", type=int, help="default: 8, with --backbone 2")
    arguments.add_argument("--workers", "-j", type=int, help="default: 0 on the CPU, otherwise 4")
    arguments.add_argument("--amp", choices=["fp16", "bf16"])
    arguments.add_argument("--limit", type=int, help="train on the first N images, if the data are large")
    arguments.add_argument("--turns", type=int, default=TURNS, help="epochs of each loop")
    args = arguments.parse_args()
    if args.data_path is None:
        arguments.error("--data-path or BALANCED_LEARNING_DATA must name the data")
    torch.set_num_threads(args.threads)
    sizes = args.sizes or SIZES["other" if args.backbone else "small"]
    cases = [measure(args, size) for size in (sizes[:1] if args.quick else sizes)]
    name = args.backbone or "small"
    results = {**environment(args.device), "detector": name, "cases": cases}
    for case in cases:
        print(f"\n{name}, {case['size']}, batch {case['batch_size']}, {case['workers']} loader processes\n")
        print(f"{speeds(case)}\n\n{stages(case)}")
    write(args.output / f"train_step_{name}_{args.device}.json", results)


def measure(args: argparse.Namespace, size: str) -> dict[str, Any]:
    config = settings(args, size)
    with redirect_stdout(io.StringIO()):
        epochs = loops(config)
    for epoch in epochs.values():
        timed(epoch, args.device)  # memory is allocated, kernels are chosen
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in epochs}
    for turn in range(1 if args.quick else args.turns):
        for name in list(epochs) if turn % 2 else reversed(list(epochs)):
            runs[name].append(timed(epochs[name], args.device))
    return {
        "size": size,
        "batch_size": config.training.batch_size,
        "workers": config.data.workers,
        "amp": config.training.amp,
        "runs": runs,
        "stages": {name: staged(epoch, args.device) for name, epoch in epochs.items()},
    }


def settings(args: argparse.Namespace, size: str) -> Config:
    """The settings of a run: of the recipe ``shapes`` for the small detector, otherwise the defaults."""
    values: dict[str, Any] = {"lr": 0.0025, "weights_backbone": None, "data_augmentation": "hflip"}
    if args.backbone:
        values["backbone"] = args.backbone
    else:
        values |= Recipe.read("shapes").settings
    min_size, max_size = map(int, size.split("x"))
    default_workers = 0 if args.device == "cpu" else 4
    values |= {
        "data_path": args.data_path,
        "device": args.device,
        "min_size": min_size,
        "max_size": max_size,
        "workers": default_workers if args.workers is None else args.workers,
        "amp": args.amp,
        "limit": 16 if args.quick else args.limit,
    }
    if args.batch_size:
        values["batch_size"] = args.batch_size
    return Config.of(values)


def loops(config: Config) -> dict[str, Epoch]:
    """What makes ready an epoch of each loop: the model, the optimizer, the loader, and a call that trains."""
    device = torch.device(config.run.device)
    train, val = read_splits(config)
    labels = choose_labels(config, train, None)
    loader, val_loader = make_loaders(config, device, train, val, labels)
    model = make_model(config, labels, None).to(device)

    def ours() -> tuple[Any, Any, Any, Callable[[], None]]:
        run = Run(config, labels, deepcopy(model), Precision(config.training.amp, device), len(loader))
        run.save = lambda: None  # type: ignore[method-assign]  # what the reference's loop does not do
        return run.model, run.optimizer, loader, Loop(run, loader, val_loader, StopSignals()).train_epoch

    training = config.training
    reference_loader = _reference_loop.make_loader(
        train.json_file.parents[1],
        labels.label_of,
        training.batch_size,
        config.data.workers,
        group_factor=config.data.aspect_ratio_group_factor,
        limit=config.data.limit,
    )

    def reference() -> tuple[Any, Any, Any, Callable[[], None]]:
        copy, precision = deepcopy(model), Precision(training.amp, device)
        copy.transform.__class__ = GeneralizedRCNNTransform  # torchvision's own
        parameters = [parameter for parameter in copy.parameters() if parameter.requires_grad]
        if training.opt == "adamw":
            optimizer: Any = torch.optim.AdamW(parameters, training.lr, weight_decay=training.weight_decay)
        else:
            optimizer = torch.optim.SGD(parameters, training.lr, training.momentum, weight_decay=training.weight_decay)
        randomness.seed_all(training.seed, "benchmark")
        scaler = precision.scaler if training.amp == "fp16" else None
        freq = config.run.print_freq

        def train() -> None:
            _reference_loop.train_one_epoch(copy, optimizer, reference_loader, device, 0, freq, precision.dtype, scaler)

        return copy, optimizer, reference_loader, train

    return {OURS: ours, REFERENCE: reference}


def timed(epoch: Epoch, device: str) -> dict[str, float]:
    """The seconds of an epoch, those of all processors, and its images."""
    model, _, _, train = epoch()
    with counted(model) as counts:
        before, start = os.times(), time.perf_counter()
        with redirect_stdout(io.StringIO()):
            train()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds, after = time.perf_counter() - start, os.times()
    return {"images": counts["images"], "seconds": seconds, "cpu_seconds": sum(after[:4]) - sum(before[:4])}


def staged(epoch: Epoch, device: str) -> dict[str, float]:
    """The milliseconds an image of each stage of an epoch, and the pixels of an image with its share of the padding."""
    model, optimizer, loader, train = epoch()
    with redirect_stdout(io.StringIO()), counted(model) as counts, watched(model, optimizer, loader, device) as watch:
        train()
        watch.outside("rest")
    stages = {name: 1e3 * watch.seconds[name] / counts["images"] for name in STAGES}
    return stages | {"pixels": counts["pixels"] / counts["images"]}


@contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """Counts the images that a detector is given, and the pixels of its batches."""
    counts = {"images": 0, "pixels": 0}

    def count(_: Any, __: Any, output: Any) -> None:
        counts["images"] += len(output[0].tensors)
        counts["pixels"] += output[0].tensors[:, 0].numel()

    handle = model.transform.register_forward_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def speeds(case: dict[str, Any]) -> str:
    """As Markdown: images a second of both, and their ratio, by the clock and by the time of all processors."""
    rows = []
    for title, key in (("clock", "seconds"), ("time of all processors", "cpu_seconds")):
        speed = {name: [run["images"] / run[key] for run in runs] for name, runs in case["runs"].items()}
        ratios = [ours / theirs for ours, theirs in zip(speed[OURS], speed[REFERENCE], strict=True)]
        rows.append(
            {"images a second of": title}
            | {name: f"{median(values):.2f}" for name, values in speed.items()}
            | {"ratio": f"{median(ratios):.2f}", "from": f"{min(ratios):.2f}", "to": f"{max(ratios):.2f}"}
        )
    return markdown(rows)


def stages(case: dict[str, Any]) -> str:
    """As Markdown: milliseconds an image of each stage of both."""
    rows = [
        {"ms an image": stage} | {name: f"{times[stage]:.2f}" for name, times in case["stages"].items()}
        for stage in STAGES
    ]
    totals = {name: sum(times[stage] for stage in STAGES) for name, times in case["stages"].items()}
    rows.append({"ms an image": "all"} | {name: f"{total:.2f}" for name, total in totals.items()})
    pixels = {name: f"{times['pixels']:.0f}" for name, times in case["stages"].items()}
    return markdown([*rows, {"ms an image": "pixels, with padding"} | pixels])


def table(results: dict[str, Any]) -> str:
    """As Markdown: the stages of all cases, this library beside the reference, and the ratios of images a second."""
    rows: list[dict[str, str]] = [{"ms an image, ours / torchvision's": stage} for stage in (*STAGES, "all")]
    ratio = {"ms an image, ours / torchvision's": "images a second, ours over torchvision's"}
    for case in results["cases"]:
        for row, stage in zip(rows, (*STAGES, None), strict=True):
            times = {n: sum(t[s] for s in STAGES if stage in (None, s)) for n, t in case["stages"].items()}
            row[case["size"]] = f"{times[OURS]:.1f} / {times[REFERENCE]:.1f}"
        pairs = zip(case["runs"][OURS], case["runs"][REFERENCE], strict=True)
        ratios = [(a["images"] / a["seconds"]) / (b["images"] / b["seconds"]) for a, b in pairs]
        ratio[case["size"]] = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return markdown([*rows, ratio])


if __name__ == "__main__":
    main()
