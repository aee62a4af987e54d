"""The balanced feature pyramid: every level strengthened by the same, balanced, semantic features."""

from functools import reduce

import torch
from torch import Tensor, nn

from ._features import Features, Neck, levels_of, like
from .refinement import ConvRefine, NonLocal
from .resizing import resize


class BalancedFeaturePyramid(Neck):
    r"""Balanced feature pyramid (BFP), section 3.2 of Libra R-CNN.

    The maps of all levels are resized to the size of one, averaged (equation 3), refined, resized back and added to
    each level:

    .. math::
        C = \frac{1}{L} \sum_{l=1}^{L} \text{resize}(C_l, \text{size of } C_r), \qquad
        P_l = C_l + \text{resize}(\text{refine}(C), \text{size of } C_l)

    Going to a coarser level is adaptive max pooling, to a finer one nearest-neighbour interpolation.

    Args:
        in_channels (int): channels of every map.
        refine_level (int): index r of the level whose size the average has; 0 is the finest. The paper's is P4.
        refine (str, optional): ``"non_local"``, the paper's: :class:`~balanced_learning.refinement.NonLocal`;
            ``"conv"``: a 3 x 3 convolution and ReLU; ``None``: the average itself, without parameters.
        init (str): ``"zero"``: the non-local block starts as the identity (later mmdetection); ``"xavier"``: all
            convolutions start from Xavier's uniform distribution, as the published weights did. For ``"conv"``, which
            has no residual and would stay at zero, ``"zero"`` stands for Kaiming's normal distribution.

    Shape:
        A list, tuple or dict of two or more maps :math:`(N, C, H_l, W_l)`, finest first, of any sizes; the output has
        the same container, keys, order and shapes.

    Export:
        :func:`torch.export.export` (not strict, as by default), :func:`torch.jit.trace` and :func:`torch.onnx.export`
        take the pyramid, also behind a backbone; :func:`torch.jit.script` does not. Exported or traced for any size,
        from an example with more than one position a side at every level, it takes levels that halve and round up, as
        those of an FPN do (a trace and ONNX Runtime do not check it); maxima are then gathered rather than pooled. In
        ONNX, of operator set 14 or later, the attention holds its matrix, and at a few sizes another nearest neighbor
        than PyTorch's is taken for the levels that are coarser than the refined one. torch.fx sees the refinement, and
        calls what is before and after it as two functions.

    Raises:
        TypeError: if the maps come in another container.
        ValueError: for wrong arguments, fewer than two maps, a ``refine_level`` beyond them, or a map of another shape.

    Reference:
        Jiangmiao Pang, Kai Chen, Jianping Shi, Huajun Feng, Wanli Ouyang, Dahua Lin:
        Libra R-CNN: Towards Balanced Learning for Object Detection. https://arxiv.org/abs/1904.02701

    Example:
        >>> import torch
        >>> bfp = BalancedFeaturePyramid(in_channels=16, refine_level=1)
        >>> features = {str(i): torch.rand(1, 16, side, side) for i, side in enumerate((32, 16, 7))}
        >>> {name: tuple(level.shape) for name, level in bfp(features).items()}
        {'0': (1, 16, 32, 32), '1': (1, 16, 16, 16), '2': (1, 16, 7, 7)}
    """

    def __init__(
        self, in_channels: int = 256, *, refine_level: int = 2, refine: str | None = "non_local", init: str = "zero"
    ) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        if refine_level < 0:
            raise ValueError(f"refine_level must be at least 0, got {refine_level}")
        if refine not in ("non_local", "conv", None):
            raise ValueError(f"refine must be 'non_local', 'conv' or None, got {refine!r}")
        if init not in ("zero", "xavier"):
            raise ValueError(f"init must be 'zero' or 'xavier', got {init!r}")
        self.in_channels = in_channels
        self.refine_level = refine_level
        self.refine: nn.Module
        if refine == "non_local":
            self.refine = NonLocal(in_channels, init=init)
        elif refine == "conv":
            self.refine = ConvRefine(in_channels, init=init)
        else:
            self.refine = nn.Identity()

    def forward(self, features: Features) -> Features:
        balanced = _integrate(features, self.in_channels, self.refine_level)
        refined = self.refine(balanced).to(balanced.dtype)
        return _strengthen(features, refined, self.refine_level)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, refine_level={self.refine_level}"


# torch.fx cannot trace what depends on the number of maps and on their shapes: it calls these functions as they are.
@torch.fx.wrap
def _integrate(features: Features, channels: int, refine_level: int) -> Tensor:
    """The mean of all levels at the size of one."""
    levels = levels_of(features)
    _check(levels, channels, refine_level)
    size = levels[refine_level].shape[-2:]
    resized = (x if i == refine_level else resize(x, size, refine_level - i) for i, x in enumerate(levels))
    return reduce(torch.add, (x / len(levels) for x in resized))  # a sum could overflow in float16


@torch.fx.wrap
def _strengthen(features: Features, refined: Tensor, refine_level: int) -> Features:
    """The levels, each with the refined map added at its size."""
    levels = levels_of(features)
    finer, coarser = levels[:refine_level], levels[refine_level + 1 :]
    # Finer levels are added to the resized map in place: they are too large to hold it and the sum.
    outputs = [resize(refined, x.shape[-2:], i - refine_level).add_(x) for i, x in enumerate(finer)]
    outputs.append(levels[refine_level] + refined)
    outputs += [x + resize(refined, x.shape[-2:], i) for i, x in enumerate(coarser, 1)]
    return like(features, outputs)


def _check(levels: list[Tensor], channels: int, refine_level: int) -> None:
    if len(levels) < 2:
        raise ValueError(f"features must hold two maps or more, got {len(levels)}")
    if refine_level >= len(levels):
        raise ValueError(f"refine_level={refine_level} needs more maps than the {len(levels)} in features")
    for i, level in enumerate(levels):
        if level.dim() != 4 or level.shape[1] != channels or level.shape[0] != levels[0].shape[0]:
            raise ValueError(
                f"features must be maps of shape [{levels[0].shape[0]}, {channels}, H, W], "
                f"got {list(level.shape)} at level {i}"
            )
