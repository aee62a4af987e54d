"""Balanced L1 in decimal arithmetic, one error at a time."""

import math
from decimal import Context, Decimal, localcontext

import torch
from torch import Tensor


def paper(errors: Tensor, alpha: float = 0.5, gamma: float = 1.5, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss and slope of each error: equations 8 and 6 at x / beta, in 120 digits, as float64 on the CPU."""
    pairs = [_paper(x, alpha, gamma, beta) for x in errors.flatten().tolist()]
    values, slopes = torch.tensor(pairs, dtype=torch.float64, device="cpu").reshape(-1, 2).T
    return values.reshape(errors.shape), slopes.reshape(errors.shape)


def _paper(x: float, alpha: float, gamma: float, beta: float) -> tuple[float, float]:
    with localcontext(Context(prec=120)):
        a, g, u = Decimal(alpha), Decimal(gamma), abs(Decimal(x)) / Decimal(beta)
        b = (g / a).exp() - 1
        if u < 1:
            log = (b * u + 1).ln()
            value, slope = a / b * (b * u + 1) * log - a * u, a * log
        else:
            value, slope = g * u + g / b - a, g
        return float(Decimal(beta) * value), math.copysign(float(slope), x)
