"""The balanced feature pyramid: every level strengthened by the same, balanced, semantic features."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from .refinement import ConvRefine, NonLocal
from .resizing import resize

Features = TypeVar("Features", list[Tensor], tuple[Tensor, ...], dict[str, Tensor])


class BalancedFeaturePyramid(nn.Module):
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
        :func:`torch.export.export`, not strict as by default, and :func:`torch.onnx.export` with ``dynamo=True`` take
        the pyramid, also behind a backbone. Exported for any size, from an example with more than one position a side
        at every level, it takes levels that halve and round up, as those of an FPN do (ONNX Runtime does not check
        it); maxima are then gathered rather than pooled. In ONNX the attention holds its matrix, and at a few sizes
        another nearest neighbor than PyTorch's is taken for the levels that are coarser than the refined one.

    Raises:
        TypeError: if the maps come in another container.
        ValueError: for wrong arguments, fewer than two maps, a ``refine_level`` beyond them, or a map of another shape.

    Reference:
        Jiangmiao Pang, Kai Chen, Jianping Shi, Huajun Feng, Wanli Ouyang, Dahua Lin:
        Libra R-CNN: Towards Balanced Learning for Object Detection. https://arxiv.org/abs/1904.02701

    Example:
        >>> import torch
        >>> bfp = BalancedFeaturePyramid(in_channels=16, refine_level=1)
        >>> features = {"0": torch.rand(1, 16, 32, 32), "1": torch.rand(1, 16, 16, 16), "2": torch.rand(1, 16, 7, 7)}
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
        levels = _levels_of(features)
        self._check(levels)
        r = self.refine_level
        size = levels[r].shape[-2:]
        resized = (level if i == r else resize(level, size, r - i) for i, level in enumerate(levels))
        balanced = reduce(torch.add, (level / len(levels) for level in resized))  # a sum could overflow in float16
        refined = self.refine(balanced).to(balanced.dtype)
        # Finer levels are added to the resized map in place: they are too large to hold it and the sum.
        outputs = [resize(refined, level.shape[-2:], i - r).add_(level) for i, level in enumerate(levels[:r])]
        outputs.append(levels[r] + refined)
        outputs += [level + resize(refined, level.shape[-2:], i) for i, level in enumerate(levels[r + 1 :], 1)]
        return _like(features, outputs)

    def _check(self, levels: list[Tensor]) -> None:
        if len(levels) < 2:
            raise ValueError(f"features must hold two maps or more, got {len(levels)}")
        if self.refine_level >= len(levels):
            raise ValueError(f"refine_level={self.refine_level} needs more maps than the {len(levels)} in features")
        for i, level in enumerate(levels):
            if level.dim() != 4 or level.shape[1] != self.in_channels or level.shape[0] != levels[0].shape[0]:
                raise ValueError(
                    f"features must be maps of shape [{levels[0].shape[0]}, {self.in_channels}, H, W], "
                    f"got {list(level.shape)} at level {i}"
                )

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, refine_level={self.refine_level}"


class PathAggregation(nn.Module):
    r"""The bottom-up path of PAFPN, which brings what the fine levels see to the coarse ones in few steps.

    Behind a feature pyramid network with the maps :math:`P_1` (finest) to :math:`P_L`:

    .. math::
        S_1 = P_1, \quad S_{l+1} = P_{l+1} + \text{down}_l(S_l), \qquad N_1 = S_1, \quad N_{l+1} = \text{out}_l(S_{l+1})

    where down is a 3 x 3 convolution of stride 2, and out one of stride 1. This is mmdetection's form: the reference
    has a ReLU after each convolution, and its down reads :math:`N_l`. With a :class:`BalancedFeaturePyramid` behind it,
    it is the Balanced PAFPN of table 5 of Libra R-CNN.

    Args:
        in_channels (int): channels of every map.
        num_levels (int): how many maps, from the finest, the path goes through. Those beyond, such as P6, are made
            anew: each takes every second position of the output before it.

    Shape:
        A list, tuple or dict of ``num_levels`` or more maps :math:`(N, C, H_l, W_l)`, finest first, each with half
        the height and width, rounded up, of the one before; the output has the same container, keys, order and shapes.

    Raises:
        TypeError: if the maps come in another container.
        ValueError: for wrong arguments, fewer maps than ``num_levels``, or a map of another shape.

    Reference:
        Shu Liu, Lu Qi, Haifang Qin, Jianping Shi, Jiaya Jia: Path Aggregation Network for Instance Segmentation.
        https://arxiv.org/abs/1803.01534

    Example:
        >>> import torch
        >>> path = PathAggregation(in_channels=16, num_levels=2)
        >>> features = {"0": torch.rand(1, 16, 26, 32), "1": torch.rand(1, 16, 13, 16), "2": torch.rand(1, 16, 7, 8)}
        >>> {name: tuple(level.shape) for name, level in path(features).items()}
        {'0': (1, 16, 26, 32), '1': (1, 16, 13, 16), '2': (1, 16, 7, 8)}
    """

    def __init__(self, in_channels: int = 256, num_levels: int = 4) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        if num_levels < 2:
            raise ValueError(f"num_levels must be at least 2, got {num_levels}")
        self.in_channels = in_channels
        self.num_levels = num_levels
        self.down, self.out = (
            nn.ModuleList(nn.Conv2d(in_channels, in_channels, 3, stride, padding=1) for _ in range(num_levels - 1))
            for stride in (2, 1)
        )
        for conv in (*self.down, *self.out):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Features) -> Features:
        levels = _levels_of(features)
        self._check(levels)
        sums = levels[:1]
        for level, down in zip(levels[1:], self.down, strict=False):
            sums.append(level + down(sums[-1]))
        outputs = sums[:1] + [out(total).to(total.dtype) for out, total in zip(self.out, sums[1:], strict=True)]
        while len(outputs) < len(levels):
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return _like(features, outputs)

    def _check(self, levels: list[Tensor]) -> None:
        if len(levels) < self.num_levels:
            raise ValueError(f"features must hold num_levels={self.num_levels} maps or more, got {len(levels)}")
        batch = levels[0].shape[0]
        for i, level in enumerate(levels):
            fits = level.dim() == 4 and level.shape[:2] == (batch, self.in_channels)
            if not fits or (i > 0 and not _is_half(level.shape[2:], levels[i - 1].shape[2:])):
                raise ValueError(
                    f"features must be maps of shape [{batch}, {self.in_channels}, H, W], each half as high and wide, "
                    f"rounded up, as the one before, got {list(level.shape)} at level {i}"
                )

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, num_levels={self.num_levels}"


def _levels_of(features: Features) -> list[Tensor]:
    if not isinstance(features, list | tuple | Mapping):
        raise TypeError(f"features must be a list, tuple or dict of tensors, got {type(features).__name__}")
    return list(features.values()) if isinstance(features, Mapping) else list(features)


def _like(features: Features, levels: list[Tensor]) -> Features:
    """The levels in a container like that of the features, with the same keys."""
    rebuild: Callable = type(features)
    return rebuild(zip(features, levels, strict=True) if isinstance(features, Mapping) else levels)


def _is_half(size: Size, whole: Size) -> bool:
    """Whether each side is half of the other's, rounded up. In this form, export can tell for sides as 8h and 16h."""
    return all(0 <= 2 * side - other <= 1 for side, other in zip(size, whole, strict=True))
