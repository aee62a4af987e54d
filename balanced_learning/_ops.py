"""What is compiled, as ops of torch: schema, shapes, derivatives, autocast, vmap.

The ops are defined whether or not there is a binary with kernels for them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backend

_NONE, _MEAN, _SUM = range(3)
_REDUCTIONS = {"none": _NONE, "mean": _MEAN, "sum": _SUM}

# input, target, weight, and grad where it is one of each element, have one shape, type and device.
_library = torch.library.Library("balanced_learning", "DEF")
_ARGUMENTS = "Tensor input, Tensor target, Tensor? weight, float alpha, float gamma, float beta, int reduction"
_library.define(f"balanced_l1({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.define(f"balanced_l1_backward(Tensor grad, {_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    "iou_balanced_sample(Tensor[] labels, Tensor[] ious, Tensor[] matched_idxs, Tensor seed, int batch_size, "
    "int num_positives, bool instance_balanced, int num_bins, float? max_iou, float floor_iou, float floor_fraction, "
    "float? max_negatives_per_positive) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_backend.load()
_CPU_KERNELS = _backend.has_kernels(torch.device("cpu"))
_forward_op = torch.ops.balanced_learning.balanced_l1.default
_backward_op = torch.ops.balanced_learning.balanced_l1_backward.default
_sample_op = torch.ops.balanced_learning.iou_balanced_sample.default


def serves(tensor: Tensor) -> bool:
    """Whether to call a function of this file for such a tensor, and not plain PyTorch.

    Not for function transforms, which take the formula apart, and not where torch compiles for a GPU, where it makes
    one kernel of the formula and what is around it. (What it makes of it on the CPU is slower than ours.) Samples are
    then drawn by tensor operations, too.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch.compiler.is_compiling():
        return _CPU_KERNELS and tensor.device.type == "cpu"
    return _backend.has_kernels(tensor.device)


def balanced_l1(
    input: Tensor, target: Tensor, weight: Tensor | None, alpha: float, gamma: float, beta: float, reduction: str
) -> Tensor:
    """Balanced L1 of tensors of one type, on one device, whose shapes broadcast."""
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
    if weight is not None:
        weight = weight.expand_as(input)
    function = _forward_op if torch.compiler.is_compiling() else _Eager.apply
    return function(input, target, weight, alpha, gamma, beta, _REDUCTIONS[reduction])


def iou_balanced_sample(
    labels: Sequence[Tensor], ious: Sequence[Tensor], matched_idxs: Sequence[Tensor], *settings: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The masks that :class:`IoUBalancedSampler` returns, and for each image whether there is a NaN among the IoUs.

    There is at least one image, and all IoUs are float32 or all are float64. ``settings`` are those of the op.
    """
    seed = torch.randint(2**63 - 1, (), device=labels[0].device)
    results = _sample_op(labels, ious, matched_idxs, seed, *settings)
    return results[: len(labels)], results[len(labels) : -1], results[-1]


def _sample_fake(labels: Sequence[Tensor], *others: Any) -> list[Tensor]:
    shapes = [*(image.shape for image in labels), *(image.shape for image in labels), (len(labels),)]
    return [labels[0].new_empty(shape, dtype=torch.bool) for shape in shapes]


def _forward_fake(input: Tensor, target: Tensor, weight: Tensor | None, *parameters: Any) -> Tensor:
    return input.new_empty(input.shape if parameters[-1] == _NONE else ())


def _backward_fake(grad: Tensor, input: Tensor, *others: Any) -> Tensor:
    return input.new_empty(input.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-4])
    ctx.parameters = inputs[-4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, target, weight = ctx.saved_tensors
    *function, reduction = ctx.parameters
    needs_input, needs_target, needs_weight, *_ = ctx.needs_input_grad
    grad_input = grad_weight = None
    if needs_input or needs_target:
        grad_input = _call(_backward_op, grad, input, target, weight, *function, reduction)
    if needs_weight:
        losses = _call(_forward_op, input, target, None, *function, _NONE)
        grad_weight = _share(losses * grad, reduction)
    return grad_input, _negative(grad_input, needs_target), grad_weight, None, None, None, None


def _double_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The backward op is linear in grad and in weight, and has the second derivative of the loss in input."""
    grad, input, target, weight = ctx.saved_tensors
    *function, reduction = ctx.parameters
    needs_grad, needs_input, needs_target, needs_weight, *_ = ctx.needs_input_grad
    grad_grad = grad_input = grad_weight = None
    if needs_grad:
        grad_grad = _call(_backward_op, grad_output, input, target, weight, *function, _NONE)
        grad_grad = grad_grad if reduction == _NONE else _total(grad_grad.flatten(), reduction)
    if needs_input or needs_target:
        grad_input = _share(grad_output * grad * _curvature(input - target, *function), reduction)
        grad_input = grad_input if weight is None else grad_input * weight
    if needs_weight:
        gradients = _call(_backward_op, grad_output, input, target, None, *function, _NONE)
        grad_weight = _share(gradients * grad, reduction)
    return grad_grad, grad_input, _negative(grad_input, needs_target), grad_weight, None, None, None, None


class _Eager(torch.autograd.Function):
    """The forward op with its backward, for eager mode: what is registered for the op would take twice the time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _call(_forward_op, *inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


def _call(op: torch._ops.OpOverload, *args: Any) -> Tensor:
    """Calls the op; where nothing is differentiated, past the Python that would only find that out."""
    if torch.is_grad_enabled():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _negative(grad_input: Tensor | None, needed: bool) -> Tensor | None:
    """The gradient of target."""
    return -grad_input if needed and grad_input is not None else None


def _share(gradients: Tensor, reduction: int) -> Tensor:
    """What a mean makes of the gradients of all its elements."""
    return gradients / gradients.numel() if reduction == _MEAN else gradients


def _total(values: Tensor, reduction: int) -> Tensor:
    """The sum or mean of the last dimension; the mean of nothing is 0."""
    total = values.sum(-1)
    return total / max(values.shape[-1], 1) if reduction == _MEAN else total


def _curvature(x: Tensor, alpha: float, gamma: float, beta: float) -> Tensor:
    """The second derivative of the loss of an error x."""
    b = math.expm1(gamma / alpha)
    size = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(size < beta, alpha * b / (b * size + beta), 0).to(x.dtype)


def _vmap_forward(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    *_, reduction = inputs
    tensors = _batched(inputs[:-4], in_dims, info.batch_size)
    losses = _forward_op(*tensors, *inputs[-4:-1], _NONE)
    if reduction != _NONE:
        losses = _total(losses.unsqueeze(-1).flatten(1), reduction)
    return losses, 0


def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    *_, reduction = inputs
    grad, input, *others = _batched(inputs[:-4], in_dims, info.batch_size)
    grad = grad.reshape(grad.shape + (1,) * (input.dim() - grad.dim())).expand_as(input)
    gradients = _backward_op(grad, input, *others, *inputs[-4:-1], _NONE)
    return gradients / input[0].numel() if reduction == _MEAN else gradients, 0


def _batched(tensors: tuple[Any, ...], dims: tuple[int | None, ...], batch_size: int) -> list[Any]:
    """The tensors with the batch dimension first; weight may be None."""
    return [
        None if tensor is None else tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=False)
    ]


for _op, _fake, _derivative, _vmap in (
    (_forward_op, _forward_fake, _backward, _vmap_forward),
    (_backward_op, _backward_fake, _double_backward, _vmap_backward),
):
    torch.library.register_fake(_op, _fake, lib=_library)
    torch.library.register_autograd(_op, _derivative, setup_context=_setup_context, lib=_library)
    torch.library.register_vmap(_op, _vmap, lib=_library)
torch.library.register_fake(_sample_op, _sample_fake, lib=_library)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(_forward_op, _device, torch.float32, lib=_library)
