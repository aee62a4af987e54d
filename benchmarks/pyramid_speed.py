"""Cost of the balanced feature pyramid, beside mmdetection's with its explicit attention, and in training.

    python benchmarks/pyramid_speed.py [--part steps]

Prints the time and the peak memory of forward and backward, of the pyramid alone (P2 to P6 of images of 800 x 1344, 256
channels) and of whole training steps of detectors with a ResNet-50, on random images of that size, beside the same step
of torchvision's plain ones. Writes pyramid_speed_<cpu|cuda>.json, also with the times of forward alone, with device,
versions and commit. Of one part alone it writes pyramid_speed_<part>_<cpu|cuda>.json.

Freed memory goes back to the system as the C library likes: to get much of it again and again is a part of what a large
matrix costs.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from _common import environment, markdown, measure, parser, peak_memory, save, write
from balanced_learning import BalancedFeaturePyramid
from balanced_learning.detection import libra_fasterrcnn, libra_retinanet
from tests.reference.mmdet import explicit_pyramid

Calls = dict[str, Callable[[], Any]]

OURS, BASELINE = "ours", "baseline"
DETECTORS = {"step of Faster R-CNN": libra_fasterrcnn, "step of RetinaNet": libra_retinanet}


class Case(NamedTuple):
    what: str
    images: int = 1
    dtype: str = "float32"
    channels_last: bool = False
    compiled: bool = False
    size: tuple[int, int] = (800, 1344)


REFINES, LAYOUTS = ("none", "conv", "non-local"), (False, True)
QUICK = [
    *(Case(refine, channels_last=last, size=(128, 192)) for refine in REFINES for last in LAYOUTS),
    *(Case(step, size=(64, 64)) for step in DETECTORS),
]
CPU = [
    *(Case(refine, channels_last=last) for refine in REFINES for last in LAYOUTS),
    *(Case(refine, compiled=True) for refine in REFINES),
    *(Case(refine, dtype="bfloat16") for refine in REFINES),
    *(Case("non-local", images) for images in (2, 8)),
    *(Case(step) for step in DETECTORS),
]
# What matters most comes first: time on a GPU may run out.
BATCHES, TYPES = (2, 8), ("bfloat16", "float32")
CUDA = [
    Case(refine, images, dtype, channels_last)
    for refine, images, dtype, channels_last in product(reversed(REFINES), BATCHES, TYPES, LAYOUTS)
]
CUDA += [Case(refine, 2, dtype, compiled=True) for refine, dtype in product(reversed(REFINES), TYPES)]
CUDA += [Case(step, images, dtype, size=(800, 1333)) for step, images, dtype in product(DETECTORS, BATCHES, TYPES)]
COMPILED_STEPS = [
    Case(step, images, dtype, compiled=True, size=(800, 1333))
    for dtype, images, step in product(TYPES, BATCHES, DETECTORS)
]
PARTS = ("pyramids", "steps", "compiled_steps")
WARM_UPS = 3  # since a compiled step is compiled once more when the number of boxes has changed


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--part", choices=PARTS, help="default: pyramids and steps; a compiled step takes minutes")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cases = QUICK if args.quick else CUDA if args.device == "cuda" else CPU
    if args.part:
        cases = [case for case in cases + COMPILED_STEPS * (not args.quick) if part_of(case) == args.part]
    rows: list[dict[str, Any]] = []
    results = {**environment(args.device), "rows": rows}
    file = args.output / f"pyramid_speed_{args.part + '_' if args.part else ''}{args.device}.json"
    for case in cases:
        is_step = case.what in DETECTORS
        seconds = 0.01 if args.quick else 1.0 if args.device == "cpu" else 3.0 if is_step else 0.3
        calls = training_steps(case, args.device) if is_step else pyramids(case, args.device)
        rows.append({**case._asdict(), "costs": costs(calls, args.device, seconds)})
        print(table({"rows": rows[-1:]}), flush=True)
        save(file, results)
    write(file, results)


def part_of(case: Case) -> str:
    return PARTS[0] if case.what not in DETECTORS else PARTS[2] if case.compiled else PARTS[1]


def costs(calls: dict[str, Calls], device: str, seconds: float) -> dict[str, dict[str, Any]]:
    """For each name the times of its calls, and the memory that the whole of forward and backward needs."""
    rows: dict[str, dict[str, Any]] = {}
    for name, parts in calls.items():
        for _ in range(WARM_UPS if device == "cuda" else 1):
            parts["both"]()  # compiles, and gives an optimizer its memory
        rows[name] = {"peak_bytes": peak_memory(parts["both"], device)}
    for part in calls[OURS]:
        turns = [(name, parts[part], nullcontext) for name, parts in calls.items()]
        for name, times in measure(turns, seconds).items():
            rows[name][part] = times
    return rows


def shapes(case: Case) -> list[tuple[int, ...]]:
    """Of P2 to P6."""
    height, width = case.size
    return [(case.images, 256, -(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32, 64)]


def output_bytes(case: Case) -> int:
    """Of the outputs of a pyramid and their gradients."""
    return 2 * sum(map(math.prod, shapes(case))) * getattr(torch, case.dtype).itemsize


def pyramids(case: Case, device: str) -> dict[str, Calls]:
    """Both pyramids, of the same weights. In place of heads a product follows, which has a gradient for each output."""
    to = {"dtype": getattr(torch, case.dtype)}
    to["memory_format"] = torch.channels_last if case.channels_last else torch.contiguous_format
    levels, weights = ([torch.randn(shape, device=device).to(**to) for shape in shapes(case)] for _ in range(2))
    refine = None if case.what == "none" else case.what.replace("-", "_")
    bfp = BalancedFeaturePyramid(256, refine=refine, init="xavier").to(device).to(**to)
    inputs = [*(level.requires_grad_() for level in levels), *bfp.parameters()]

    def calls_of(pyramid: Callable[[list[Tensor]], list[Tensor]]) -> Calls:
        def both() -> None:
            outputs = pyramid(levels)  # they stay, as heads need them
            losses = [(level * weight).sum() for level, weight in zip(outputs, weights, strict=True)]
            torch.autograd.grad(losses, inputs)

        return {"forward": lambda: pyramid(levels), "both": both}

    functions: dict[str, Callable] = {BASELINE: partial(explicit_pyramid, bfp), OURS: bfp}
    if case.compiled:
        torch.compiler.reset()
        functions = {name: torch.compile(function, dynamic=False) for name, function in functions.items()}
    return {name: calls_of(function) for name, function in functions.items()}


def training_steps(case: Case, device: str) -> dict[str, Calls]:
    """The plain detector of torchvision, and the same with all parts of ours; in bfloat16 by autocast."""
    height, width = case.size
    images = [torch.rand(3, height, width, device=device) for _ in range(case.images)]
    targets = [target(height, width, device) for _ in images]
    torch.compiler.reset()

    def calls_of(**parts: Any) -> Calls:
        build = DETECTORS[case.what]
        frozen: dict[str, Any] = {"weights_backbone": None, "trainable_backbone_layers": 3}
        model = build(**frozen, min_size=height, max_size=width, **parts).to(device)
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.eval().requires_grad_(False)  # as with trained weights
        if case.compiled:
            model.compile()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)  # every step is of the same weights

        def both() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
                losses = model(images, targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()

        return {"both": both}

    parts = ["pyramid", "box_loss"] + ["sampler"] * (DETECTORS[case.what] is libra_fasterrcnn)
    return {BASELINE: calls_of(**dict.fromkeys(parts, False)), OURS: calls_of()}


def target(height: int, width: int, device: str) -> dict[str, Tensor]:
    size = torch.tensor([width, height])
    corners = torch.rand(10, 2) * size / 2
    boxes = torch.cat([corners, corners + (0.1 + 0.4 * torch.rand(10, 2)) * size], dim=1)
    return {"boxes": boxes.to(device), "labels": torch.randint(1, 90, (10,)).to(device)}


def table(results: dict[str, Any]) -> str:
    """The README's table: time and memory of forward and backward, and ours over it.

    The latter also without the outputs of the pyramid and their gradients, which both need.
    """
    rows = []
    for row in results["rows"]:
        case = Case(*(row[name] for name in Case._fields))
        theirs, ours = (row["costs"][name] for name in (BASELINE, OURS))
        how = [case.dtype, *(name for name in ("channels_last", "compiled") if row[name])]
        seconds, peak = theirs["both"]["seconds"], theirs["peak_bytes"]
        cells = {"": case.what, "images": str(case.images), "how": ", ".join(how)}
        cells |= {"time": f"{1e3 * seconds:,.0f} ms", "ours / it": f"{ours['both']['seconds'] / seconds:.2f}"}
        cells |= {"memory": f"{peak / 2**20:,.0f} MiB", "ours / it ": f"{ours['peak_bytes'] / peak:.2f}"}
        outputs = output_bytes(case)
        share = (ours["peak_bytes"] - outputs) / (peak - outputs)
        cells["without outputs"] = "-" if case.what in DETECTORS else f"{share:.2f}"
        rows.append(cells)
    return markdown(rows)


if __name__ == "__main__":
    main()
