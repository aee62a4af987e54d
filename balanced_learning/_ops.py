"""Balanced L1 and sampling as ops of torch: schema, shapes, derivatives, autocast, vmap.

The ops are defined whether or not there is a binary with kernels for them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backend, _balanced_l1, _torch_private

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


def uses_kernels(*tensors: Tensor | None) -> bool:
    """Tells whether kernels compute a function of the tensors, all on one device, and not plain PyTorch.

    Not where the formula is taken apart, and not where torch compiles for a GPU: there it makes one kernel of the
    formula and what is around it. (What it makes of it on the CPU is slower than ours.) Samples are then drawn by
    tensor operations, too.
    """
    device = next(tensor.device for tensor in tensors if tensor is not None)
    if not _backend.enabled or _is_taken_apart(tensors):
        return False
    if torch.compiler.is_compiling():
        return _CPU_KERNELS and device.type == "cpu"
    return _backend.has_kernels(device)


def _is_taken_apart(tensors: Sequence[Tensor | None]) -> bool:
    """Tells whether function transforms or forward-mode AD need operations that they know."""
    if _torch_private.are_transforms_active():
        return True
    return _torch_private.is_forward_mode_active() and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def balanced_l1(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: float,
    gamma: float,
    beta: float,
    reduction: str,
    *,
    kernels: bool,
) -> Tensor:
    """Computes balanced L1 of tensors of one type, on one device, whose shapes broadcast.

    By the kernels, or in plain PyTorch: the tensors are then float32 or float64.
    """
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
    if weight is not None:
        weight = weight.expand_as(input)
    function: Callable[..., Tensor]
    if kernels:
        function = _forward_op if torch.compiler.is_compiling() else _Fused.apply
    elif torch.compiler.is_compiling() or _is_taken_apart((input, target, weight)):
        function = _plain
    else:
        function = _Plain.apply
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


def _plain(
    input: Tensor, target: Tensor, weight: Tensor | None, alpha: float, gamma: float, beta: float, reduction: int
) -> Tensor:
    """Computes what the forward op does, in operations that can be differentiated."""
    losses = _balanced_l1.loss(input, target, alpha, gamma, beta)
    return _reduce(losses if weight is None else losses * weight, reduction)


def _plain_backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    alpha: float,
    gamma: float,
    beta: float,
    reduction: int,
) -> Tensor:
    """Computes what the backward op does, in operations that can be differentiated."""
    gradients = _balanced_l1.slope(input, target, alpha, gamma, beta) * _share(grad, reduction, input.numel())
    return gradients if weight is None else gradients * weight


def _fused(*args: Any) -> Tensor:
    return _call(_forward_op, _plain, *args)


def _fused_backward(*args: Any) -> Tensor:
    return _call(_backward_op, _plain_backward, *args)


def _call(op: Callable[..., Tensor], plain: Callable[..., Tensor], *args: Any) -> Tensor:
    """Calls the op; where nothing is differentiated, past the Python that would only find that out.

    Where there are tangents, of which the op knows nothing, it calls the plain function.
    """
    if _torch_private.is_forward_mode_active() and _is_taken_apart(args[:-4]):
        return plain(*_widened(args[:-4]), *args[-4:]).to(args[0].dtype)
    if torch.is_grad_enabled():
        return op(*args)
    with _torch_private.below_autograd():
        return op(*args)


def _widened(tensors: Sequence[Any]) -> list[Any]:
    """Half types as float32, in which everything is computed; a weight may be None."""
    return [
        None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-4])
    ctx.parameters = inputs[-4:]


def _derivative(loss: Callable[..., Tensor], loss_backward: Callable[..., Tensor]) -> Callable:
    """Makes the backward of a balanced L1 from two functions that can be differentiated: itself and its gradient."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight = ctx.saved_tensors
        *function, reduction = ctx.parameters
        needs_input, needs_target, needs_weight, *_ = ctx.needs_input_grad
        grad_input = grad_weight = None
        if needs_input or needs_target:
            grad_input = loss_backward(grad, input, target, weight, *function, reduction)
        if needs_weight:
            of, *wide = _widened((grad, input, target))
            losses = loss(*wide, None, *function, _NONE)
            grad_weight = (losses * _share(of, reduction, losses.numel())).to(input.dtype)
        return grad_input, _negative(grad_input, needs_target), grad_weight, None, None, None, None

    return backward


def _double_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiates the backward op, linear in grad and in weight; in input it has the curvature of the loss."""
    dtype = grad_output.dtype
    grad_output, grad, input, target, weight = _widened((grad_output, *ctx.saved_tensors))
    *function, reduction = ctx.parameters
    needs_grad, needs_input, needs_target, needs_weight, *_ = ctx.needs_input_grad
    grad_grad = grad_input = grad_weight = None
    if needs_grad:
        grad_grad = _reduce(_fused_backward(grad_output, input, target, weight, *function, _NONE), reduction).to(dtype)
    share = _share(grad, reduction, input.numel())
    if needs_input or needs_target:
        grad_input = grad_output * share * _balanced_l1.curvature(input, target, *function)
        grad_input = (grad_input if weight is None else grad_input * weight).to(dtype)
    if needs_weight:
        grad_weight = (_fused_backward(grad_output, input, target, None, *function, _NONE) * share).to(dtype)
    return grad_grad, grad_input, _negative(grad_input, needs_target), grad_weight, None, None, None, None


class _Fused(torch.autograd.Function):
    """The forward op with its backward, for eager mode: what is registered for the op would take twice the time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _fused(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_derivative(_fused, _fused_backward))


class _Plain(torch.autograd.Function):
    """The formula, of which autograd would save every step: this saves the inputs alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _plain(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_derivative(_plain, _plain_backward))


def _negative(grad_input: Tensor | None, needed: bool) -> Tensor | None:
    """The gradient of target."""
    return -grad_input if needed and grad_input is not None else None


def _reduce(values: Tensor, reduction: int, batch_dims: int = 0) -> Tensor:
    """Reduces each element of a batch; the mean of nothing is 0."""
    if reduction == _NONE:
        return values
    values = values.unsqueeze(-1)  # so that there is a dimension to sum
    total = values.sum(tuple(range(batch_dims, values.dim())))
    return _share(total, reduction, values.shape[batch_dims:].numel())


def _share(grad: Tensor, reduction: int, numel: int) -> Tensor:
    """The part of a gradient, or of a sum, that each of the numel elements of a mean has."""
    return grad / max(numel, 1) if reduction == _MEAN else grad


def _vmap_forward(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    tensors = _batched(inputs[:-4], in_dims, info.batch_size)
    losses = _forward_op(*tensors, *inputs[-4:-1], _NONE)
    return _reduce(losses, inputs[-1], batch_dims=1), 0


def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    grad, input, *others = _batched(inputs[:-4], in_dims, info.batch_size)
    grad = _share(grad, inputs[-1], input.shape[1:].numel())
    grad = grad.reshape(grad.shape + (1,) * (input.dim() - grad.dim())).expand_as(input)
    return _backward_op(grad, input, *others, *inputs[-4:-1], _NONE), 0


def _batched(tensors: tuple[Any, ...], dims: tuple[int | None, ...], batch_size: int) -> list[Any]:
    """The tensors with the batch dimension first; weight may be None."""
    return [
        None if tensor is None else tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, dims, strict=False)
    ]


for _op, _fake, _backward, _vmap in (
    (_forward_op, _forward_fake, _derivative(_fused, _fused_backward), _vmap_forward),
    (_backward_op, _backward_fake, _double_backward, _vmap_backward),
):
    torch.library.register_fake(_op, _fake, lib=_library)
    torch.library.register_autograd(_op, _backward, setup_context=_setup_context, lib=_library)
    torch.library.register_vmap(_op, _vmap, lib=_library)
torch.library.register_fake(_sample_op, _sample_fake, lib=_library)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(_forward_op, _device, torch.float32, lib=_library)
