"""The CUDA kernels of the loss, run on the CPU, against the kernels for the CPU and the formula.

Forward, and backward without a weight, both kinds do the same operations on each float32 or float64 element: to the
bit, where nothing fuses a multiplication with an addition. Elsewhere they round in another order.
"""

import itertools
import math
import re

import pytest
import torch
from torch import Tensor

from balanced_learning import _ops
from tests.cuda_emulation.build import CSRC
from tests.kernels import DTYPES, assert_agree

pytestmark = pytest.mark.usefixtures("ops")

_SOURCE = (CSRC / "cuda_packs.cuh").read_text()
CONSTANTS = {name: int(value) for name, value in re.findall(r"constexpr \w+ (k\w+) = (\d+);", _SOURCE)}
THREADS = CONSTANTS["kThreads"]
FUNCTION = (0.5, 1.5, 0.3)
NONE = 0


def sizes(dtype: torch.dtype) -> list[int]:
    """Those at the edges of packs and blocks, and some of several blocks."""
    pack = 16 // dtype.itemsize
    edges = [edge + n for edge in (pack, THREADS, THREADS * pack) for n in (-1, 0, 1)]
    return [0, 1, *edges, 3 * THREADS * pack + 5, 9 * THREADS * pack + pack - 1]


def slices(n: int, dtype: torch.dtype, count: int, offset: int) -> tuple[Tensor, ...]:
    """Random tensors that end with their memory, and begin so many elements after an aligned address."""
    return tuple(torch.randn(n + offset).to(dtype)[offset:] for _ in range(count))


def assert_elements_agree(
    dtype: torch.dtype, input: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor
) -> None:
    emulated, host = (
        (
            ops.balanced_l1(input, target, weight, *FUNCTION, NONE),
            ops.balanced_l1_backward(grad, input, target, weight, *FUNCTION, NONE),
        )
        for ops in (torch.ops.emulated, torch.ops.host)
    )
    # Two roundings to float, or one to a half type of what differs by much less than it resolves.
    info = torch.finfo(dtype)
    tolerances = (0.0, 2 * info.eps if weight is not None else 0.0) if dtype.itemsize > 2 else (info.eps, info.eps)
    for ours, theirs, rtol in zip(emulated, host, tolerances, strict=True):
        atol = info.smallest_normal * info.eps if rtol else 0.0
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_elements_are_those_of_the_cpu(dtype, weighted):
    for n, offset in zip(sizes(dtype), itertools.cycle([0, 1, 0, 3]), strict=False):
        input, target, grad, weight = slices(n, dtype, 4, offset)
        assert_elements_agree(dtype, input, target, weight if weighted else None, grad)
        assert_elements_agree(dtype, input, target.clone(), weight if weighted else None, grad)  # aligned, or not so


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_gives_what_it_gives_on_the_cpu(dtype):
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    numbers = [math.nan, math.inf, info.max, 1.0, 0.3, info.smallest_normal, info.smallest_normal / 2, least, 0.0]
    numbers = torch.tensor(numbers + [-x for x in numbers], dtype=dtype)
    input, target = numbers.repeat_interleave(len(numbers)), numbers.repeat(len(numbers))
    assert_elements_agree(dtype, input, target, None, torch.ones_like(input))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "reduction", ["sum", *(pytest.param(r, marks=pytest.mark.many_threads) for r in ("mean", "none"))]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_agree_with_the_formula(monkeypatch, dtype, reduction, weighted):
    monkeypatch.setattr(_ops, "uses_kernels", lambda *tensors: _ops._backend.enabled)
    monkeypatch.setattr(_ops, "_forward_op", torch.ops.emulated.balanced_l1.default)
    monkeypatch.setattr(_ops, "_backward_op", torch.ops.emulated.balanced_l1_backward.default)
    for n, offset in zip(sizes(dtype), itertools.cycle([0, 1]), strict=False):
        assert_agree(slices(n, dtype, 2 + weighted, offset), beta=0.3, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_have_the_same_bits_in_any_order_of_threads(dtype):
    tensors = slices(9 * THREADS * 16 // dtype.itemsize + 1, dtype, 3, 0)
    sums = {torch.ops.emulated.balanced_l1(*tensors, *FUNCTION, 2).item() for _ in range(4)}
    assert len(sums) == 1


@pytest.mark.many_threads
def test_a_sum_of_more_than_a_grid_takes_at_once():
    at_once = THREADS * CONSTANTS["kMaxBlocks"] * CONSTANTS.get("kPacksToSum", 1)
    tensors = (*slices(at_once + 3, torch.float32, 2, 1), None, *FUNCTION, 2)
    expected = torch.ops.host.balanced_l1(*tensors).item()
    assert torch.ops.emulated.balanced_l1(*tensors).item() == pytest.approx(expected, rel=1e-6)
