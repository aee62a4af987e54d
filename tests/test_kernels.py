"""The numbers that the loss computes: against the formula in float64, decimal arithmetic, and themselves."""

import math

import pytest
import torch
import torch.nn.functional as F

from balanced_learning import balanced_l1_loss
from tests.kernels import DTYPES, REDUCTIONS, assert_agree, gradients, needs_gpu
from tests.reference.balanced_l1 import paper

CHUNKS = (1023, 1024, 1025, 2047, 2049, 70001)  # what a thread or a block sums, give or take one


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("numel", [0, 1, 7, *CHUNKS])
def test_agree_with_the_formula(device: str, dtype: torch.dtype, reduction: str, weighted: bool, numel: int) -> None:
    tensors = tuple(torch.randn(numel).to(device, dtype) for _ in range(2 + weighted))
    assert_agree(tensors, beta=0.3, reduction=reduction)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("alpha", [0.1, 0.5, 50.0])
@pytest.mark.parametrize("beta", [1.0, 1 / 9])
def test_accuracy(device: str, alpha: float, beta: float) -> None:
    x = torch.cat([10 ** torch.linspace(-8, 6, 3000), torch.linspace(0.01, 1.2, 3000)])
    values, slopes = paper(x, alpha, 1.5, beta)
    for sign in (1, -1):
        errors = (sign * x).to(device).requires_grad_()
        losses = balanced_l1_loss(errors, torch.zeros_like(errors), alpha=alpha, beta=beta, reduction="none")
        (gradients,) = torch.autograd.grad(losses.sum(), errors)
        assert (losses.double().cpu() / values - 1).abs().max() < 2e-6
        assert (gradients.double().cpu() / (sign * slopes) - 1).abs().max() < 2e-6


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_never_negative(device: str, dtype: torch.dtype) -> None:
    x = (10 ** torch.linspace(-20, 4, 10_000)).to(device, dtype)
    assert (balanced_l1_loss(x, torch.zeros_like(x), reduction="none") >= 0).all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_any_magnitude(device: str, magnitude: float) -> None:
    x = torch.tensor([magnitude], device=device)
    for beta in (1e-20, 1.0, 1e20):
        loss, grad, _ = gradients(balanced_l1_loss, (x, 0 * x), torch.ones(1), beta=beta, reduction="none")
        value, slope = paper(torch.tensor(magnitude), beta=beta)
        assert loss.item() == pytest.approx(value.item(), rel=2e-6, abs=1e-44)
        assert grad.item() == pytest.approx(slope.item(), rel=2e-6, abs=1e-44)


@pytest.mark.usefixtures("implementation")
def test_tend_to_smooth_l1(device: str) -> None:
    tensors, grad = tuple(torch.randn(2, 3000, device=device)), torch.randn(())
    ours = gradients(balanced_l1_loss, tensors, grad, alpha=1e6, gamma=1.0)
    theirs = gradients(lambda x, t, weight: F.smooth_l1_loss(x, t), tensors, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-9)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(device: str, dtype: torch.dtype) -> None:
    nan, inf = math.nan, math.inf
    input = torch.tensor([nan, inf, -inf, inf, 0.0], device=device, dtype=dtype)
    target = torch.tensor([0.0, 0.0, 0.0, inf, nan], device=device, dtype=dtype)
    losses, slopes, _ = gradients(balanced_l1_loss, (input, target), torch.ones(5), reduction="none")
    assert losses.tolist() == pytest.approx([nan, inf, inf, nan, nan], nan_ok=True)
    assert slopes.tolist() == pytest.approx([nan, 1.5, -1.5, nan, nan], nan_ok=True)


@pytest.mark.usefixtures("implementation")
def test_sum_of_many(device: str) -> None:
    x = torch.full((3_000_001,), 0.3, device=device)
    expected = paper(x[0])[0].item() * x.numel()
    assert balanced_l1_loss(x, torch.zeros_like(x), reduction="sum").item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("kernels")
def test_the_same_bits_in_every_run(device: str) -> None:
    input, target = torch.randn(2, 1_000_001, device=device)
    before = torch.get_num_threads()
    try:
        sums = set()
        for threads in (1, 2, 3, before, before):
            torch.set_num_threads(threads)
            sums.add(balanced_l1_loss(input, target, reduction="sum").item())
    finally:
        torch.set_num_threads(before)
    assert len(sums) == 1


@needs_gpu
@pytest.mark.usefixtures("kernels")
def test_no_synchronization() -> None:
    input, target = torch.randn(2, 10_000, device="cuda")
    input.requires_grad_()
    balanced_l1_loss(input, target).backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        balanced_l1_loss(input, target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.usefixtures("kernels")
def test_current_stream() -> None:
    input, target = torch.randn(2, 1 << 22, device="cuda")
    expected = balanced_l1_loss(input, target)
    late = torch.zeros_like(input)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(input)
        result = balanced_l1_loss(late, target)
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


@needs_gpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    assert_agree(tuple(torch.randn(2, 10_000, device="cuda:1")), reduction="mean")
    assert torch.cuda.current_device() == 0
