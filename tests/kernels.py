"""The comparison with the plain formula in float64, for the tests of the ops and of the numbers they give."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from balanced_learning import balanced_l1_loss, use_kernels

REDUCTIONS = ("none", "mean", "sum")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 3e-6, torch.float64: 1e-13}  # 2 units, if half


def needs_gpu(test: Callable) -> Callable:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def formula(*args, **kwargs) -> Tensor:
    with use_kernels(False):
        return balanced_l1_loss(*args, **kwargs)


def gradients(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], grad: Tensor, **kwargs) -> list[Tensor]:
    """The result, and the gradients of input, target and, if there is one, weight, from the gradient of the result."""
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    input, target, *weight = tensors
    result = function(input, target, weight=weight[0] if weight else None, **kwargs)
    return [result.detach(), *torch.autograd.grad(result, tensors, grad.to(result))]


def assert_agree(tensors: tuple[Tensor, ...], **kwargs) -> None:
    """The implementation in use agrees with the formula in float64, from a random incoming gradient."""
    dtype = tensors[0].dtype
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors)) if kwargs["reduction"] == "none" else ()
    grad = torch.randn(shape).to(tensors[0])
    actual = gradients(balanced_l1_loss, tensors, grad, **kwargs)
    expected = gradients(formula, tuple(tensor.double() for tensor in tensors), grad, **kwargs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, dtype)


def assert_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """A result has the type, and is as near to one in float64 as the type allows."""
    assert ours.dtype == dtype
    size = theirs.abs().mean().item() if theirs.numel() else 0.0
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of the smallest numbers there are
    torch.testing.assert_close(
        ours.double(), theirs.to(dtype).double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size + spacing
    )
