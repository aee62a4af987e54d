"""Balanced L1 of the error x = input - target, its slope and its curvature in x, element by element in plain PyTorch.

The arguments are float32 or float64, of one shape; :func:`.balanced_l1_loss` has the equations, b is
``exp(gamma / alpha) - 1``. Autograd, forward-mode AD and function transforms can differentiate ``loss`` and ``slope``.

On a CPU a new tensor costs more than the arithmetic that fills it, so operations are in place wherever no derivative
needs the value before; and :func:`torch.where` and :func:`torch.log1p` cost as much as ten others, so complementary
parts are added and a logarithm is corrected instead.
"""

import math

import torch
from torch import Tensor


def loss(input: Tensor, target: Tensor, alpha: float, gamma: float, beta: float) -> Tensor:
    """Equation 8, rescaled: beta L_1(|x| / beta)."""
    b_per_beta = math.expm1(gamma / alpha) / beta
    size = _size_and_sign(input, target)[0]
    losses = _above(size, beta).mul_(gamma)
    z = _at_most(size, beta).mul_(b_per_beta)
    del size  # here and below, the memory of one tensor more
    return losses.add_(_integral(z).div_(b_per_beta), alpha=alpha)


def slope(input: Tensor, target: Tensor, alpha: float, gamma: float, beta: float) -> Tensor:
    """Equation 6, with the sign of x: alpha ln(b |x| / beta + 1) up to |x| = beta, where it reaches gamma."""
    size, sign = _size_and_sign(input, target)
    z = _at_most(size, beta).mul_(math.expm1(gamma / alpha) / beta)
    del size
    return _log1p(z).mul_(sign).mul_(alpha)


def curvature(input: Tensor, target: Tensor, alpha: float, gamma: float, beta: float) -> Tensor:
    """The derivative of the slope: alpha b / (b |x| + beta) for |x| < beta, then 0."""
    b = math.expm1(gamma / alpha)
    size = (input - target).abs()
    return torch.where(size >= beta, 0, alpha * b / (b * size + beta))  # NaN of NaN


def _integral(z: Tensor) -> Tensor:
    """(1 + z) ln(1 + z) - z, the integral of ln(1 + t) for t from 0 to z >= 0, to full precision also near z = 0.

    The terms cancel where z is small. Up to z_0 they are therefore summed as a series in s = z / (z + 2), in which
    ln(1 + z) = 2 atanh(s); beyond z_0, with w = 1 + (z - z_0) / (1 + z_0), the integral grows by
    (z - z_0) ln(1 + z_0) + (1 + z_0) (w ln(w) - (w - 1)).
    """
    s_0 = torch.finfo(z.dtype).eps ** (1 / 9)  # there the first omitted term, s^10 / 11, falls below the rounding
    z_0 = 2 * s_0 / (1 - s_0)

    near = _at_most(z, z_0)
    s = near / (near + 2)
    ss = s * s
    p = (ss / 9).add_(1 / 7)
    p = (p * ss).add_(1 / 5)
    p = (p * ss).add_(1 / 3)
    p = p * ss
    del ss
    series = near * (p * s).add_(p).add_(s)
    del near, s, p

    beyond = _above(z, z_0)
    w = (beyond / (1 + z_0)).add_(1)
    growth = (w * w.log()).sub_(w - 1)
    return series.add_(beyond, alpha=math.log1p(z_0)).add_(growth, alpha=1 + z_0)


def _log1p(z: Tensor) -> Tensor:
    """ln(1 + z), the logarithm of w = 1 + z corrected for the rounding of w."""
    w = z + 1
    return w.log().sub_((w - 1).sub_(z) / w)


def _size_and_sign(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """|x| and the sign of x, never 0: by :func:`torch.abs`, whose slope at 0 is 0, the loss had no curvature there."""
    x = input - target
    sign = torch.copysign(x.new_ones(()), x)
    return x.mul_(sign), sign


# At a tie each of the two has half the derivative, together they have the whole. A NaN has one, not so with clamp.
def _at_most(x: Tensor, bound: float) -> Tensor:
    return torch.minimum(x, x.new_full((), bound))


def _above(x: Tensor, bound: float) -> Tensor:
    return torch.maximum(x - bound, x.new_zeros(()))
