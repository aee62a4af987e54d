"""Balanced L1: a box regression loss that promotes the gradients of inliers."""

import math

import torch
from torch import Tensor, nn

from . import _ops

# Beyond these, b = exp(gamma / alpha) - 1 or another factor nears the largest float32. The paper has ratios of 2 to 5.
_MAX_GAMMA_OVER_ALPHA, _MAX_FACTOR = 80.0, 1e38


def balanced_l1_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    gamma: float = 1.5,
    beta: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Balanced L1 loss, equations 6 to 9 of Libra R-CNN.

    It is defined by its gradient. With :math:`x = \text{input} - \text{target}`,

    .. math::
        \frac{\partial L}{\partial |x|} = \begin{cases}
            \alpha \, \ln(b |x| / \beta + 1) & |x| < \beta \\
            \gamma                        & \text{otherwise}
        \end{cases}
        \qquad b = e^{\gamma / \alpha} - 1

    so that the loss is :math:`L(x) = \beta \, L_1(|x| / \beta)` with

    .. math::
        L_1(u) = \begin{cases}
            \frac{\alpha}{b} (b u + 1) \, \ln(b u + 1) - \alpha u & u < 1 \\
            \gamma u + \gamma / b - \alpha                     & \text{otherwise}
        \end{cases}

    The paper has :math:`\beta = 1`. For another beta this is its exact rescaling, continuous in value and slope, and
    not mmdetection's formula, whose slope is neither the paper's nor continuous.

    Args:
        input (Tensor[...]): predictions, of any shape and floating-point type.
        target (Tensor[...]): what they should be, of the same shape or broadcastable.
        alpha (float): how much inliers count; a smaller alpha raises their gradients. > 0.
        gamma (float): upper bound of the gradient, reached by outliers. > 0.
        beta (float): the error, in the units of ``input``, that divides inliers from outliers. > 0.
        weight (Tensor[...], optional): factors of the elements, broadcastable to them, applied before the reduction.
        reduction (str): ``"none"``, ``"mean"`` or ``"sum"``.

    Returns:
        Tensor: a scalar, or with ``"none"`` the loss of each element. Computed and summed in float32 (float64 for
        float64 inputs); its type is the one :func:`torch.nn.functional.smooth_l1_loss` returns. Empty inputs give 0,
        with a graph, for ``"mean"`` and ``"sum"``. NaN and infinity propagate.

    Raises:
        TypeError: if ``input``, ``target`` or ``weight`` is not a tensor, or ``input`` or ``target`` not of a
            floating-point type.
        ValueError: if alpha, gamma or beta is not finite and > 0, if gamma / alpha is above 80, or one of alpha, gamma,
            beta, b / beta and alpha beta / b above 1e38 (there float32 would overflow), if ``reduction`` is unknown,
            if the shapes do not broadcast or the devices differ.

    Reference:
        Jiangmiao Pang, Kai Chen, Jianping Shi, Huajun Feng, Wanli Ouyang, Dahua Lin:
        Libra R-CNN: Towards Balanced Learning for Object Detection. https://arxiv.org/abs/1904.02701

    Example:
        >>> input = torch.tensor([0.0, 0.5, 3.0], requires_grad=True)
        >>> balanced_l1_loss(input, torch.zeros(3), reduction="sum").backward()
        >>> input.grad  # 0, 0.5 ln(19.1 x 0.5 + 1), gamma
        tensor([0.0000, 1.1777, 1.5000])
    """
    _check_parameters(alpha, gamma, beta, reduction)
    _check_tensors(input, target, weight)

    dtype = torch.promote_types(input.dtype, target.dtype)
    if dtype.itemsize == 2 and not input.is_meta and torch.is_autocast_enabled(input.device.type):
        dtype = torch.float32
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    kernels = _ops.uses_kernels(input, target, weight)
    one_type = input.dtype == target.dtype == dtype and (weight is None or weight.dtype == dtype)
    if kernels and one_type and dtype.itemsize > 1:
        return _ops.balanced_l1(input, target, weight, alpha, gamma, beta, reduction, kernels=True)
    input, target = input.to(compute_dtype), target.to(compute_dtype)
    weight = None if weight is None else weight.to(compute_dtype)
    return _ops.balanced_l1(input, target, weight, alpha, gamma, beta, reduction, kernels=kernels).to(dtype)


class BalancedL1Loss(nn.Module):
    """Module form of :func:`balanced_l1_loss`, which see for the arguments and the equation.

    Example:
        >>> loss = BalancedL1Loss(beta=0.11, reduction="sum")
        >>> loss(torch.zeros(8, 4), torch.zeros(8, 4))
        tensor(0.)
    """

    def __init__(self, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        _check_parameters(alpha, gamma, beta, reduction)
        self.alpha = alpha
        self.gamma = gamma
        self.beta = beta
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return balanced_l1_loss(
            input,
            target,
            alpha=self.alpha,
            gamma=self.gamma,
            beta=self.beta,
            weight=weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, gamma={self.gamma}, beta={self.beta}, reduction={self.reduction!r}"


def _check_parameters(alpha: float, gamma: float, beta: float, reduction: str) -> None:
    for name, value in (("alpha", alpha), ("gamma", gamma), ("beta", beta)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and > 0, got {value}")
    if not _fits_float32(alpha, gamma, beta):
        raise ValueError(
            f"gamma / alpha must be at most {_MAX_GAMMA_OVER_ALPHA:g}, and alpha, gamma, beta, b / beta and "
            f"alpha beta / b, with b = exp(gamma / alpha) - 1, at most {_MAX_FACTOR:g}; "
            f"got gamma={gamma}, alpha={alpha}, beta={beta}"
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")


def _fits_float32(alpha: float, gamma: float, beta: float) -> bool:
    if gamma / alpha > _MAX_GAMMA_OVER_ALPHA:
        return False
    b = math.expm1(gamma / alpha)
    return max(alpha, gamma, beta, b / beta) <= _MAX_FACTOR and alpha * beta <= _MAX_FACTOR * b


def _check_tensors(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if tensor is None and name == "weight":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point() and name != "weight":
            raise TypeError(f"{name} must be of a floating-point type, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name} must be on the device of input, {input.device}, got {tensor.device}")
    shape = input.shape if input.shape == target.shape else _broadcast_shape(input.shape, target.shape)
    if shape is None:
        raise ValueError(f"target must broadcast with input of shape {tuple(input.shape)}, got {tuple(target.shape)}")
    if weight is not None and weight.shape != shape and _broadcast_shape(weight.shape, shape) != shape:
        raise ValueError(f"weight must be broadcastable to shape {tuple(shape)}, got {tuple(weight.shape)}")


def _broadcast_shape(*shapes: torch.Size) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None
