"""Balanced L1 of an error x = input - target, its slope and its curvature, in plain PyTorch.

Autograd, forward-mode AD and function transforms can differentiate all three. :func:`.balanced_l1_loss` has the
equations; b is ``exp(gamma / alpha) - 1``, the errors are float32 or float64.

Sums of complementary parts stand for :func:`torch.where` and a corrected logarithm for :func:`torch.log1p`: on a CPU
each of the two takes as long as ten other operations.
"""

import math

import torch
from torch import Tensor


def loss(x: Tensor, alpha: float, gamma: float, beta: float) -> Tensor:
    """Equation 8, rescaled: beta L_1(|x| / beta)."""
    b_per_beta = math.expm1(gamma / alpha) / beta
    size = x * _sign(x)
    inlier = _integral(_at_most(size, beta) * b_per_beta) / b_per_beta * alpha
    return inlier + gamma * _above(size, beta)


def slope(x: Tensor, alpha: float, gamma: float, beta: float) -> Tensor:
    """Equation 6, with the sign of x: alpha ln(b |x| / beta + 1) up to |x| = beta, where it reaches gamma."""
    sign = _sign(x)
    return alpha * sign * _log1p(_at_most(x * sign, beta) * (math.expm1(gamma / alpha) / beta))


def curvature(x: Tensor, alpha: float, gamma: float, beta: float) -> Tensor:
    """The derivative of the slope: alpha b / (b |x| + beta) for |x| < beta, then 0."""
    b = math.expm1(gamma / alpha)
    size = x.abs()
    return torch.where(size < beta, alpha * b / (b * size + beta), 0)


def _integral(z: Tensor) -> Tensor:
    """(1 + z) ln(1 + z) - z, the integral of ln(1 + t) for t from 0 to z >= 0, to full precision also near z = 0.

    The terms cancel where z is small. Up to z_0 they are therefore summed as a series in s = z / (z + 2), in which
    ln(1 + z) = 2 atanh(s); beyond z_0, with w = 1 + (z - z_0) / (1 + z_0), the integral grows by
    (z - z_0) ln(1 + z_0) + (1 + z_0) (w ln(w) - (w - 1)).
    """
    s_0 = torch.finfo(z.dtype).eps ** (1 / 9)  # there the first omitted term, s^10 / 11, falls below the rounding
    z_0 = 2 * s_0 / (1 - s_0)
    return _series(_at_most(z, z_0)) + _growth(_above(z, z_0), z_0)


def _series(z: Tensor) -> Tensor:
    s = z / (z + 2)
    ss = s * s
    return z * (s + (1 + s) * (ss * (1 / 3 + ss * (1 / 5 + ss * (1 / 7 + ss / 9)))))


def _growth(beyond: Tensor, z_0: float) -> Tensor:
    w = beyond / (1 + z_0) + 1
    return math.log1p(z_0) * beyond + (1 + z_0) * (w * w.log() - (w - 1))


def _log1p(z: Tensor) -> Tensor:
    """ln(1 + z), the logarithm of w = 1 + z corrected for the rounding of w."""
    w = z + 1
    return w.log() + (z - (w - 1)) / w


def _sign(x: Tensor) -> Tensor:
    """1 or -1, never 0: with :func:`torch.abs`, whose slope at 0 is 0, the loss would have no curvature there."""
    return torch.copysign(x.new_ones(()), x)


# At a tie each of the two has half the derivative, together they have the whole. A NaN has one, not so with clamp.
def _at_most(x: Tensor, bound: float) -> Tensor:
    return torch.minimum(x, x.new_tensor(bound))


def _above(x: Tensor, bound: float) -> Tensor:
    return torch.maximum(x - bound, x.new_zeros(()))
