"""From the size of one level of a pyramid to that of another: maxima of windows, or nearest neighbors."""

import torch
import torch.nn.functional as F
from torch import Size, Tensor


def resize(x: Tensor, size: Size, halvings: int) -> Tensor:
    """A new map of this size: adaptive max pooling if it is this many levels coarser, else nearest neighbors.

    Args:
        x (Tensor): map, shape [N, C, H, W].
        size (Size): height and width to reach.
        halvings (int): how many levels coarser they are; negative, or zero, if they are finer, or the same.
    """
    if halvings <= 0:
        return F.interpolate(x, list(size), mode="nearest")
    step = 2**halvings
    if all(_is_known(old == step * new) for old, new in zip(x.shape[-2:], size, strict=True)):
        return F.max_pool2d(x, step)  # the same windows, faster
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        rows, columns = (_windows(x, dim, size[dim - 2], step) for dim in (2, 3))
        return x[:, :, rows].max(3).values[..., columns].max(4).values
    return F.adaptive_max_pool2d(x, list(size))


def _is_known(condition: bool | torch.SymBool | Tensor) -> bool:
    """Whether it holds; what an export or a trace leaves open counts as no."""
    return isinstance(condition, bool) and condition


def _windows(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """The positions that adaptive pooling takes maxima of, along one dimension: int64 [size, step + 1].

    The length of a window would not be constant; so all have the longest, and end by repeating their last position.
    """
    length = x.shape[dim]
    halves = length <= step * size
    if isinstance(halves, Tensor):  # of the example that torch.jit traces
        halves = bool(halves)
    torch._check(halves, lambda: "an export needs levels that halve, rounding up")
    window = torch.arange(size, device=x.device)
    first, last = window * length // size, ((window + 1) * length - 1) // size
    positions = torch.arange(step + 1, device=x.device) + first[:, None]
    return torch.minimum(positions, last[:, None])
