"""Cost of the fused balanced L1, beside the other ways to compute it and beside smooth L1.

    python benchmarks/kernel_speed.py

Prints times, the time of forward and backward together over that of smooth L1, the peak memory over that of the
gradient, and, on a GPU, the bandwidth as a share of that of copying as many elements. Writes
kernel_speed_<cpu|cuda>.json, with all times, device, versions and commit, and a figure of that name.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from _common import environment, keep_freed_memory, markdown, measure, parser, peak_memory, save, write
from balanced_learning import balanced_l1_loss, use_kernels
from tests.reference.mmdet import balanced_l1

Loss = Callable[[Tensor, Tensor, str], Tensor]


class Case(NamedTuple):
    elements: int
    dtype: str = "float32"
    reduction: str = "sum"


MIDDLE = 800_000  # about the coordinates of the anchors of three images
QUICK = [Case(n) for n in (256, 2_048, 65_536)]
FULL = [
    *(Case(MIDDLE, dtype=name) for name in ("float16", "bfloat16", "float64")),
    *(Case(MIDDLE, reduction=name) for name in ("none", "mean")),
    *(Case(n) for n in (256, 2_048, 8_192, 65_536, MIDDLE, 4_000_000, 16_000_000, 64_000_000)),
]
LARGE = [Case(n, dtype=name) for name in ("bfloat16", "float16") for n in (16_000_000, 64_000_000)]  # on a GPU
TOO_SLOW = 0.1  # seconds of a call; such a loss is left out of what is larger


def smooth_l1(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.smooth_l1_loss(input, target, reduction=reduction)


def ours(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    return balanced_l1_loss(input, target, reduction=reduction)


def mmdet_formula(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    loss = balanced_l1(input, target)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


BASELINE, PLAIN, COMPILED = "smooth L1", "plain formula", "compiled formula"
LOSSES: dict[str, Loss] = {
    BASELINE: smooth_l1,
    "fused": ours,
    PLAIN: ours,
    COMPILED: torch.compile(ours, dynamic=True),
    "mmdet's formula": mmdet_formula,
}


def main() -> None:
    args = parser(__doc__).parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch._functorch.config.donated_buffer = False  # or compiled code could not go backward twice
    seconds = 0.01 if args.quick else 0.1
    names = [name for name in LOSSES if not (args.quick and name == COMPILED)]  # compiling takes longer than all else
    cases = QUICK if args.quick else FULL + LARGE if args.device == "cuda" else FULL
    rows: list[dict[str, Any]] = []
    results = {**environment(args.device), "rows": rows}
    file = args.output / f"kernel_speed_{args.device}.json"
    for case in cases:
        copied = copy_bandwidth(case, args.device, seconds) if args.device == "cuda" else None
        group = costs(names, case, args.device, seconds)
        if copied is not None:
            for row in group.values():
                row |= shares_of_bandwidth(case, row, copied)
        print(markdown([{"loss": name, **summary(case, row, group[BASELINE])} for name, row in group.items()]))
        rows += [{**case._asdict(), "loss": name, **row} for name, row in group.items()]
        save(file, results)
        names = [name for name in names if group[name]["both"]["seconds"] < TOO_SLOW]

    write(file, results)
    if find_spec("matplotlib"):
        draw(results, file.with_suffix(".png"))


def costs(names: list[str], case: Case, device: str, seconds: float) -> dict[str, dict[str, Any]]:
    """The times of forward, backward and both of each loss, and the memory that both need."""
    rows: dict[str, dict[str, Any]] = {}
    calls = {}
    for name in names:
        with implementation(name):
            calls[name], peak, gradient = prepare(LOSSES[name], case, device)
        rows[name] = {"peak_bytes": peak, "gradient_bytes": gradient}
    for part in ("forward", "backward", "both"):
        turns = [(name, calls[name][part], partial(implementation, name)) for name in names]
        for name, times in measure(turns, seconds).items():
            rows[name][part] = times
    return rows


def prepare(loss: Loss, case: Case, device: str) -> tuple[dict[str, Callable[[], Any]], int, int]:
    """The calls to time, each called once before, and the memory that forward and backward, and the gradient, need."""
    dtype = getattr(torch, case.dtype)
    input, target = torch.randn(2, case.elements, device=device).to(dtype)
    input.requires_grad_()
    grad = torch.ones(case.elements if case.reduction == "none" else (), dtype=dtype, device=device)

    def forward() -> Tensor:
        return loss(input, target, case.reduction)

    def both() -> None:
        input.grad = None
        forward().backward(grad)

    result = forward()
    both()
    input.grad = None
    calls = {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(result, input, grad, retain_graph=True),
        "both": both,
    }
    return calls, peak_memory(both, device), input.nbytes


def implementation(name: str) -> AbstractContextManager:
    """Switches the kernels off for the plain formula."""
    return use_kernels(False) if name in (PLAIN, COMPILED) else nullcontext()


def copy_bandwidth(case: Case, device: str, seconds: float) -> float:
    """Bytes a second, read and written, of copying a tensor."""
    source = torch.randn(case.elements, device=device).to(getattr(torch, case.dtype))  # zeros may be faster
    target = torch.empty_like(source)
    times = measure([("copy", lambda: target.copy_(source), nullcontext)], seconds)["copy"]
    return 2 * source.nbytes / times["seconds"]


def shares_of_bandwidth(case: Case, row: dict[str, Any], copied: float) -> dict[str, float]:
    """The bandwidth of what the loss must read and write, as a share of copying."""
    extra = case.reduction == "none"  # the losses, their gradients
    tensors = {"forward": 2 + extra, "backward": 3 + extra}
    shares = {
        f"{part}_bandwidth": count * row["gradient_bytes"] / row[part]["seconds"] / copied
        for part, count in tensors.items()
    }
    return {"copied_bytes_per_second": copied} | shares


def summary(case: Case, row: dict[str, Any], baseline: dict[str, Any]) -> dict[str, str]:
    cells = {"elements": f"{case.elements:,}", "type": case.dtype, "reduction": case.reduction}
    cells |= {f"{part} ms": f"{1e3 * row[part]['seconds']:.3f}" for part in ("forward", "backward", "both")}
    cells[f"both / {BASELINE}"] = f"{row['both']['seconds'] / baseline['both']['seconds']:.2f}"
    cells["memory / gradient"] = f"{row['peak_bytes'] / row['gradient_bytes']:.2f}"
    shares = {part: row.get(f"{part}_bandwidth") for part in ("forward", "backward")}
    return cells | {f"{part} / copy": f"{share:.2f}" for part, share in shares.items() if share is not None}


def by_size(results: dict[str, Any]) -> dict[int, dict[str, float]]:
    """The seconds of forward and backward of each loss, for each number of elements, float32 and summed."""
    seconds: dict[int, dict[str, float]] = {}
    for row in results["rows"]:
        if (row["dtype"], row["reduction"]) == ("float32", "sum"):
            seconds.setdefault(row["elements"], {})[row["loss"]] = row["both"]["seconds"]
    return seconds


def table(results: dict[str, Any]) -> str:
    """The README's table: the time of smooth L1, and that of the others over it."""
    rows = []
    for elements, seconds in by_size(results).items():
        ratios = {name: seconds[name] / seconds[BASELINE] if name in seconds else None for name in LOSSES}
        row = {name: "-" if ratio is None else f"{ratio:.1f}" for name, ratio in ratios.items()}
        rows.append({"elements": f"{elements:,}", **row, BASELINE: f"{1e3 * seconds[BASELINE]:.3f} ms"})
    return markdown(rows)


def draw(results: dict[str, Any], file: Path) -> None:
    """Milliseconds of forward and backward over elements, one line for each loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name in LOSSES:
        points = [(n, 1e3 * seconds[name]) for n, seconds in by_size(results).items() if name in seconds]
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="elements, float32, summed", ylabel="ms, forward and backward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
