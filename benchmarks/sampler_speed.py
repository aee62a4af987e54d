"""Cost of choosing the boxes of a batch, beside torchvision's random choice and mmdetection's balanced one.

    python benchmarks/sampler_speed.py

Prints times and their multiples of torchvision's: of the samplers, at the scale of proposals and of anchors, and of the
whole selection of training samples. Writes sampler_speed_<cpu|cuda>.json, with device, versions and commit.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from _common import environment, keep_freed_memory, markdown, measure, parser, save, write
from balanced_learning import IoUBalancedSampler, use_kernels
from balanced_learning.detection import apply_libra
from tests.reference.mmdet import balanced_samples

Image = tuple[Tensor, Tensor, Tensor]  # labels, IoUs, matched indices
Calls = dict[str, Callable[[], Any]]

BASELINE, OURS, PLAIN, MMDET = "torchvision", "ours", "ours, plain", "mmdetection"
PROPOSALS, ANCHORS = 2_010, 268_569  # of an image, with 10 ground truths; of an image of 800 x 1344
GROUND_TRUTHS = 10


def main() -> None:
    args = parser(__doc__).parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    seconds = 0.01 if args.quick else 0.3
    cases: list[tuple[str, int, Callable[[int, str], Calls]]] = [
        *(("sampler, proposals", batch, proposal_samplers) for batch in ((2,) if args.quick else (1, 2, 8, 16))),
        *(("sampler, anchors", batch, anchor_samplers) for batch in (() if args.quick else (1, 2))),
        *(("sampler, all positive", batch, positive_samplers) for batch in (() if args.quick else (2,))),
        *(("selection, second stage", batch, second_stages) for batch in (() if args.quick else (1, 2, 8))),
        *(("selection, first stage", batch, first_stages) for batch in (() if args.quick else (1, 2))),
    ]
    rows: list[dict[str, Any]] = []
    results = {**environment(args.device), "rows": rows}
    file = args.output / f"sampler_speed_{args.device}.json"
    for what, batch, calls_of in cases:
        calls = calls_of(batch, args.device)
        turns = [(name, call, partial(implementation, name)) for name, call in calls.items()]
        rows.append({"what": what, "batch": batch, "seconds": measure(turns, seconds)})
        save(file, results)
    print(table(results))
    write(file, results)


def table(results: dict[str, Any]) -> str:
    """The README's table: the time of torchvision, and that of the others over it."""
    rows = []
    for row in results["rows"]:
        times = {name: entry["seconds"] for name, entry in row["seconds"].items()}
        ratios = {
            name: f"{times[name] / times[BASELINE]:.2f}" if name in times else "-" for name in (OURS, PLAIN, MMDET)
        }
        baseline = f"{1e3 * times[BASELINE]:.3f} ms"
        rows.append({"": row["what"], "images": str(row["batch"]), BASELINE: baseline, **ratios})
    return markdown(rows)


def implementation(name: str) -> AbstractContextManager:
    """Switches the kernels off for the plain implementation."""
    return use_kernels(False) if name == PLAIN else nullcontext()


def proposal_samplers(batch: int, device: str) -> Calls:
    images = [image(PROPOSALS, 40, 60, 0, 0.5, device) for _ in range(batch)]
    return samplers(images, 512, 0.25, 0.5)


def anchor_samplers(batch: int, device: str) -> Calls:
    images = [image(ANCHORS, 50, 8_000, 2_000, 0.3, device) for _ in range(batch)]
    return samplers(images, 256, 0.5, 0.3)


def positive_samplers(batch: int, device: str) -> Calls:
    """Of as many boxes as there are anchors, none of which is a negative."""
    images = [image(ANCHORS, ANCHORS, 0, 0, 0.3, device) for _ in range(batch)]
    return samplers(images, 256, 0.5, 0.3)


def image(size: int, positives: int, near: int, ignored: int, negative_below: float, device: str) -> Image:
    """So many boxes: most far from any ground truth, some near, some ignored, some positive."""
    far = size - positives - near - ignored
    parts = [
        (far, 0, 0.02, 0),
        (near, 0.02, negative_below, 0),
        (ignored, negative_below, 0.5, -1),
        (positives, 0.5, 1, 1),
    ]
    ious = torch.cat([low + (high - low) * torch.rand(n) for n, low, high, _ in parts])
    labels = torch.cat([torch.full((n,), label) for n, _, _, label in parts])
    order = torch.randperm(size)
    return labels[order].to(device), ious[order].to(device), torch.randint(GROUND_TRUTHS, (size,)).to(device)


def samplers(images: list[Image], size: int, positive_fraction: float, max_iou: float) -> Calls:
    labels, ious, matched_idxs = (list(column) for column in zip(*images, strict=True))
    random = BalancedPositiveNegativeSampler(size, positive_fraction)
    balanced = IoUBalancedSampler(size, positive_fraction, max_iou=max_iou)
    return {
        BASELINE: lambda: random(labels),
        OURS: lambda: balanced(labels, ious, matched_idxs),
        PLAIN: lambda: balanced(labels, ious, matched_idxs),
        MMDET: lambda: [balanced_samples(*each, size, int(size * positive_fraction)) for each in images],
    }


def second_stages(batch: int, device: str) -> Calls:
    """From the proposals of an image to the boxes that are trained with, and what they are trained to be."""
    stock, libra = detectors(device)
    targets = [target(device) for _ in range(batch)]
    proposals = [boxes_around(each["boxes"], PROPOSALS - GROUND_TRUTHS) for each in targets]
    return {
        BASELINE: lambda: stock.roi_heads.select_training_samples(list(proposals), targets),
        OURS: lambda: libra.roi_heads.select_training_samples(list(proposals), targets),
        PLAIN: lambda: libra.roi_heads.select_training_samples(list(proposals), targets),
    }


def first_stages(batch: int, device: str) -> Calls:
    """From the anchors of an image to those that are trained with."""
    stock, libra = detectors(device)
    targets = [target(device) for _ in range(batch)]
    anchors = [boxes_around(each["boxes"], ANCHORS) for each in targets]

    def random() -> tuple:
        labels, _ = stock.rpn.assign_targets_to_anchors(anchors, targets)
        return stock.rpn.fg_bg_sampler(labels)

    def balanced() -> tuple:
        matches, _ = libra.rpn.assign_targets_to_anchors(anchors, targets)
        return libra.rpn.fg_bg_sampler(matches)

    return {BASELINE: random, OURS: balanced, PLAIN: balanced}


def detectors(device: str) -> tuple[Any, Any]:
    stock, libra = (fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None) for _ in range(2))
    return stock.to(device), apply_libra(libra, rpn=True).to(device)


def target(device: str) -> dict[str, Tensor]:
    corners = torch.rand(GROUND_TRUTHS, 2) * 800
    boxes = torch.cat([corners, corners + 20 + 200 * torch.rand(GROUND_TRUTHS, 2)], dim=1)
    return {"boxes": boxes.to(device), "labels": torch.randint(1, 90, (GROUND_TRUTHS,)).to(device)}


def boxes_around(boxes: Tensor, num: int) -> Tensor:
    """A twentieth of them near the given ones, the others anywhere."""
    near = boxes.repeat(-(-num // 20 // len(boxes)), 1)[: num // 20]
    near = near + 15 * torch.randn_like(near)
    corners = 800 * torch.rand(num - len(near), 2, device=boxes.device)
    sizes = 20 + 200 * torch.rand(num - len(near), 2, device=boxes.device)
    near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
    return torch.cat([near, torch.cat([corners, corners + sizes], dim=1)])


if __name__ == "__main__":
    main()
