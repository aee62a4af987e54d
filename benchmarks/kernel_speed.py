"""What the fused balanced L1 costs, beside the other ways to compute it and beside smooth L1.

    python benchmarks/kernel_speed.py

Prints the times of forward and backward together as multiples of those of smooth L1, and the peak memory as a multiple
of the gradient's. Writes benchmarks/results/kernel_speed_<cpu|cuda>.json with all times, device, versions and commit,
and a figure of the same name.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from _common import environment, measure, parser, peak_memory, print_table, write
from torch import Tensor

from balanced_learning import _ops, balanced_l1_loss

SIZES = [256, 2_048, 8_192, 65_536, 800_000, 4_000_000, 16_000_000, 64_000_000]
MIDDLE = 800_000  # where types and reductions are compared: the anchors of a batch
QUICK_SIZES = [256, 2_048, 65_536]


def mmdet_formula(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Balanced L1 as mmdetection evaluates it, at its defaults."""
    alpha, gamma, beta = 0.5, 1.5, 1.0
    b = math.e ** (gamma / alpha) - 1
    size = (input - target).abs()
    inlier = alpha / b * (b * size + 1) * (b * size / beta + 1).log() - alpha * size
    loss = torch.where(size < beta, inlier, gamma * size + gamma / b - alpha * beta)
    return {"none": lambda: loss, "mean": loss.mean, "sum": loss.sum}[reduction]()


def fused(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    return balanced_l1_loss(input, target, reduction=reduction)


def smooth_l1(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.smooth_l1_loss(input, target, reduction=reduction)


LOSSES: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "smooth L1": smooth_l1,
    "fused": fused,
    "formula": fused,  # without the kernels
    "compiled formula": torch.compile(fused, dynamic=True),
    "mmdet's formula": mmdet_formula,
}


def main() -> None:
    arguments = parser(__doc__)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    seconds = 0.01 if args.quick else 0.1
    cases = [(n, torch.float32, "sum") for n in (QUICK_SIZES if args.quick else SIZES)]
    if not args.quick:
        cases += [(MIDDLE, dtype, "sum") for dtype in (torch.float16, torch.bfloat16, torch.float64)]
        cases += [(MIDDLE, torch.float32, reduction) for reduction in ("none", "mean")]

    rows: list[dict[str, Any]] = []
    for numel, dtype, reduction in cases:
        copied = copy_bandwidth(numel, dtype, args.device, seconds) if args.device == "cuda" else None
        for name, loss in LOSSES.items():
            if args.quick and name == "compiled formula":
                continue  # compiling takes longer than all else
            case = {"elements": numel, "dtype": str(dtype).removeprefix("torch."), "reduction": reduction}
            with mock.patch.object(_ops, "serves", new=lambda _: False) if name == "formula" else nullcontext():
                rows.append({**case, "loss": name, **costs(loss, numel, dtype, reduction, args.device, seconds)})
            if copied is not None:
                rows[-1] |= shares_of_bandwidth(rows[-1], dtype, copied)
        print_table([summary(row, rows) for row in rows[-len(LOSSES) + args.quick :]])

    stem = f"kernel_speed_{args.device}"
    write(args.output / f"{stem}.json", {**environment(args.device), "rows": rows})
    draw([row for row in rows if (row["dtype"], row["reduction"]) == ("float32", "sum")], args.output / f"{stem}.png")


def costs(
    loss: Callable[[Tensor, Tensor, str], Tensor],
    numel: int,
    dtype: torch.dtype,
    reduction: str,
    device: str,
    seconds: float,
) -> dict[str, Any]:
    """The times of forward, backward and both, and the memory that both need."""
    generator = torch.Generator(device).manual_seed(0)
    input = torch.randn(numel, generator=generator, device=device).to(dtype).requires_grad_()
    target = torch.randn(numel, generator=generator, device=device).to(dtype)
    grad = torch.ones(numel if reduction == "none" else (), dtype=dtype, device=device)

    def forward() -> Tensor:
        return loss(input, target, reduction)

    def both() -> None:
        input.grad = None
        forward().backward(grad)

    both()
    input.grad = None
    memory = peak_memory(both, device)
    result = forward()
    return {
        "forward": measure(forward, seconds),
        "backward": measure(lambda: torch.autograd.grad(result, input, grad, retain_graph=True), seconds),
        "both": measure(both, seconds),
        "peak_bytes": memory,
    }


def copy_bandwidth(numel: int, dtype: torch.dtype, device: str, seconds: float) -> float:
    """Bytes a second, read and written, of copying a tensor."""
    source = torch.zeros(numel, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), seconds)["seconds"]


def shares_of_bandwidth(row: dict[str, Any], dtype: torch.dtype, copied: float) -> dict[str, float]:
    """How fast the loss reads what it must read and writes what it must write, as a share of copying."""
    moved = {"forward": 3 if row["reduction"] == "none" else 2, "backward": 4 if row["reduction"] == "none" else 3}
    tensor_bytes = row["elements"] * dtype.itemsize
    return {
        f"{part}_bandwidth": tensors * tensor_bytes / row[part]["seconds"] / copied for part, tensors in moved.items()
    }


def summary(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    case = [row[key] for key in ("elements", "dtype", "reduction")]
    smooth = next(other for other in rows if other["loss"] == "smooth L1" and [*other.values()][:3] == case)
    gradient_bytes = row["elements"] * getattr(torch, row["dtype"]).itemsize
    cells = dict(zip(("elements", "dtype", "reduction", "loss"), (f"{row['elements']:,}", *case[1:], row["loss"])))
    cells |= {f"{part} ms": f"{1e3 * row[part]['seconds']:.3f}" for part in ("forward", "backward", "both")}
    cells["/ smooth L1"] = f"{row['both']['seconds'] / smooth['both']['seconds']:.2f}"
    cells["memory / gradient"] = f"{row['peak_bytes'] / gradient_bytes:.2f}"
    for part in ("forward", "backward"):
        if f"{part}_bandwidth" in row:
            cells[f"{part} / copy"] = f"{row[f'{part}_bandwidth']:.2f}"
    return cells


def draw(rows: list[dict[str, Any]], file: Any) -> None:
    """Milliseconds of forward and backward over elements, one line for each way to compute them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name in LOSSES:
        points = [(row["elements"], 1e3 * row["both"]["seconds"]) for row in rows if row["loss"] == name]
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="elements, float32, summed", ylabel="ms, forward and backward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
