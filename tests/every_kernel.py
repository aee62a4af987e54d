"""Calls every kernel in each type, and compares with plain PyTorch in float64 and with the draws of the CPU.

    python -m tests.every_kernel --device cuda [--rounds 500]

Small enough for compute-sanitizer. All tensors are made on the CPU and copied, so that on a GPU no kernels but this
library's run, and all they read has been written in sight of the sanitizer. Ends with an error if anything differs.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from balanced_learning import _ops
from tests.kernels import DTYPES, REDUCTIONS, assert_close

PARAMETERS = (0.5, 1.5, 0.3)  # alpha, gamma, beta
SIZES = (0, 1, 7, 255, 1_025, 70_001)
LARGE = 4_500_001  # so that threads of a GPU take more than one pack each

ANCHORS = 70_000
SETTINGS: dict[str, Any] = {
    "batch_size": 512,
    "num_positives": 128,
    "instance_balanced": True,
    "num_bins": 3,
    "max_iou": 0.5,
    "floor_iou": 0.0,
    "floor_fraction": 0.0,
    "max_negatives_per_positive": None,
}
BATCHES: list[tuple[list[int], dict[str, Any]]] = [
    ([2_000] * 3, {}),
    ([1_023, 1_024, 1_025, 0, 1], {}),
    ([1] * 40 + [30, 0, 700] * 20, {}),  # more images than a launch takes
    ([ANCHORS, 10], {"batch_size": 256}),
    ([0], {}),
    ([600, 900], {"batch_size": 0, "num_positives": 0}),
    ([600, 900], {"instance_balanced": False}),
    ([600, 900], {"max_iou": None}),
    ([3_000, 900], {"max_iou": None, "num_bins": 1}),
    ([3_000, 900], {"num_bins": 100}),
    ([3_000, 900], {"floor_iou": 0.1, "floor_fraction": 0.3}),
    ([3_000, 900], {"max_negatives_per_positive": 1.5}),
    ([3_000, 900], {"batch_size": 10_000, "num_positives": 10_000}),
]

Image = tuple[Tensor, Tensor, Tensor]  # labels, IoUs, matched indices


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=1, help="batches of random images to draw from")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    failures = 0
    for part in (losses(args.device), draws(args.device), random_draws(args.device, args.rounds)):
        for name, error in part:
            if error:
                print(f"{name}: {error}", flush=True)
            failures += bool(error)
    print(f"{failures} calls differ on {args.device}" if failures else f"all calls agree on {args.device}", flush=True)
    sys.exit(failures > 0)


def losses(device: str) -> Iterator[tuple[str, str]]:
    """Each type, reduction, weights or none, size and alignment: its name, and what is wrong or nothing."""
    sizes = [*product(SIZES, (0, 1)), (LARGE, 0)]
    for dtype, reduction, weighted, (size, offset) in product(DTYPES, range(3), (False, True), sizes):
        if size == LARGE and (weighted or REDUCTIONS[reduction] != "sum"):
            continue
        tensors = [2 * torch.randn(offset + size).to(dtype) for _ in range(2 + weighted)]
        tensors[2:] = [weight.abs() for weight in tensors[2:]]  # or sums would cancel
        grad = torch.randn(offset + size if REDUCTIONS[reduction] == "none" else ()).to(dtype)
        values = [grad if not grad.dim() else grad[offset:], *(tensor[offset:] for tensor in tensors)]
        # Whole storages are copied, so that a slice is as misaligned there as here.
        moved = [grad.to(device) if not grad.dim() else grad.to(device)[offset:]]
        moved += [tensor.to(device)[offset:] for tensor in tensors]
        none = [None] * (not weighted)
        results = [
            _ops._forward_op(*moved[1:], *none, *PARAMETERS, reduction),
            _ops._backward_op(*moved, *none, *PARAMETERS, reduction),
        ]
        doubles = [value.double() for value in values]
        expected = [
            _ops._plain(*doubles[1:], *none, *PARAMETERS, reduction),
            _ops._plain_backward(*doubles, *none, *PARAMETERS, reduction),
        ]
        name = f"loss, {dtype}, {REDUCTIONS[reduction]}, {size} elements from {offset} on"
        yield name + ", with weights" * weighted, difference(results, expected, dtype)


def difference(results: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> str:
    """Of a forward and a backward: nothing, or the first lines of the comparison."""
    try:
        for ours, theirs in zip(results, expected, strict=True):
            assert_close(ours.cpu(), theirs, dtype)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


def draws(device: str) -> Iterator[tuple[str, str]]:
    for dtype, (sizes, changes) in product((torch.float32, torch.float64), BATCHES):
        images = [image(size, 20, dtype) for size in sizes]
        what = f"{len(sizes)} images of up to {max(sizes)} boxes, {dtype}, {changes or 'usual settings'}"
        yield f"draw from {what}", compare_draws(images, SETTINGS | changes, device)


def random_draws(device: str, rounds: int) -> Iterator[tuple[str, str]]:
    """Batches of images of random sizes and kinds, by random settings; one of them in ten has a NaN."""
    for number in range(rounds):
        images = [image(choose(5, 300, 2_000, 9_000), choose(1, 5, 90)) for _ in range(1 + choose(1, 7, 40))]
        if number % 10 == 9 and len(images[0][1]):
            images[0][1][-1] = torch.nan
        batch_size = choose(7, 64, 256, 512)
        settings = SETTINGS | {
            "batch_size": batch_size,
            "num_positives": int(batch_size * float(torch.rand(()))),
            "instance_balanced": choose(0, 1) == 1,
            "num_bins": 1 + choose(3, 7),
            "max_iou": (0.3, 0.5, None)[number % 3],
            "floor_iou": (0.0, 0.1)[number % 2],
            "floor_fraction": float(torch.rand(())),
            "max_negatives_per_positive": (None, 0.5, 3.0)[choose(0, 2)],
        }
        yield f"round {number}, {settings}", compare_draws(images, settings, device)


def choose(*limits: int) -> int:
    """A random number from 0 to one of the limits, included."""
    limit = limits[int(torch.randint(len(limits), ()))]
    return int(torch.randint(limit + 1, ()))


def image(size: int, ground_truths: int, dtype: torch.dtype = torch.float32) -> Image:
    """One in ten boxes positive, one in ten ignored; half of the images have many equal IoUs."""
    kind = torch.rand(size)
    labels = torch.where(kind < 0.1, 1, torch.where(kind < 0.2, -1, 0))
    ious = torch.rand(size, dtype=dtype)
    ious = (64 * ious).round() / 64 if choose(1) else ious**2
    return labels, ious, torch.randint(max(ground_truths, 1), (size,))


def compare_draws(images: list[Image], settings: dict[str, Any], device: str) -> str:
    """Draws on the device and on the CPU from one seed, and tells what is wrong, if anything."""
    columns = [list(column) for column in zip(*images, strict=True)]
    seed = torch.randint(2**63 - 1, ())
    moved = [[tensor.to(device) for tensor in column] for column in columns]
    *masks, nans = [tensor.cpu() for tensor in _ops._sample_op(*moved, seed.to(device), **settings)]
    *expected, _ = _ops._sample_op(*columns, seed, **settings)
    for index, (labels, ious, _) in enumerate(images):
        has_nan = bool(ious.isnan().any())
        if bool(nans[index]) != has_nan:
            return f"image {index} has {'a' if has_nan else 'no'} NaN"
        if has_nan:
            continue
        positives, negatives = masks[index], masks[len(images) + index]
        wanted = counts(labels, settings)
        drawn = int(positives.sum()), int(negatives.sum())
        if drawn != wanted or (positives & (labels <= 0)).any() or (negatives & (labels != 0)).any():
            return f"image {index}: {drawn} positives and negatives drawn, not {wanted}, or others"
        if not (torch.equal(positives, expected[index]) and torch.equal(negatives, expected[len(images) + index])):
            return f"image {index}: other boxes than on the CPU"
    return ""


def counts(labels: Tensor, settings: dict[str, Any]) -> tuple[int, int]:
    """The positives and the negatives that must be drawn."""
    positives = min(int((labels > 0).sum()), settings["num_positives"])
    negatives = min(int((labels == 0).sum()), settings["batch_size"] - positives)
    limit = settings["max_negatives_per_positive"]
    return positives, negatives if limit is None else min(negatives, int(limit * max(positives, 1)))


if __name__ == "__main__":
    main()
