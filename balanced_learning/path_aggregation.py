"""The bottom-up path of PAFPN."""

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from ._features import Features, Neck, levels_of, like


class PathAggregation(Neck):
    r"""The bottom-up path of PAFPN, which brings what the fine levels see to the coarse ones in few steps.

    Behind a feature pyramid network with the maps :math:`P_1` (finest) to :math:`P_L`:

    .. math::
        S_1 = P_1, \quad S_{l+1} = P_{l+1} + \text{down}_l(S_l), \qquad N_1 = S_1, \quad N_{l+1} = \text{out}_l(S_{l+1})

    where down is a 3 x 3 convolution of stride 2, and out one of stride 1. This is mmdetection's form: the reference
    has a ReLU after each convolution, and its down reads :math:`N_l`. Before a
    :class:`~balanced_learning.BalancedFeaturePyramid`, it is the Balanced PAFPN of table 5 of Libra R-CNN.

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
        >>> features = {str(i): torch.rand(1, 16, side, side) for i, side in enumerate((26, 13, 7))}
        >>> {name: tuple(level.shape) for name, level in path(features).items()}
        {'0': (1, 16, 26, 26), '1': (1, 16, 13, 13), '2': (1, 16, 7, 7)}
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
        levels = _checked_levels(features, self.in_channels, self.num_levels)
        sums = [levels[0]]
        for i, down in enumerate(self.down, 1):
            sums.append(levels[i] + down(sums[-1]))
        outputs = sums[:1] + [out(total).to(total.dtype) for out, total in zip(self.out, sums[1:], strict=True)]
        return _with_coarser(features, outputs)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, num_levels={self.num_levels}"


# torch.fx cannot trace what depends on the number of maps and on their shapes: it calls these functions as they are.
@torch.fx.wrap
def _checked_levels(features: Features, channels: int, num_levels: int) -> list[Tensor]:
    levels = levels_of(features)
    if len(levels) < num_levels:
        raise ValueError(f"features must hold num_levels={num_levels} maps or more, got {len(levels)}")
    batch = levels[0].shape[0]
    for i, level in enumerate(levels):
        fits = level.dim() == 4 and level.shape[0] == batch and level.shape[1] == channels
        if not fits or (i > 0 and not _is_half(level.shape[2:], levels[i - 1].shape[2:])):
            raise ValueError(
                f"features must be maps of shape [{batch}, {channels}, H, W], each half as high and wide, "
                f"rounded up, as the one before, got {list(level.shape)} at level {i}"
            )
    return levels


@torch.fx.wrap
def _with_coarser(features: Features, outputs: list[Tensor]) -> Features:
    """The outputs, and every second position of the last one for each map beyond them, in the container."""
    outputs = list(outputs)
    while len(outputs) < len(features):
        outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
    return like(features, outputs)


def _is_half(size: Size, whole: Size) -> bool:
    """Whether each side is half of the other's, rounded up. In this form, export can tell for sides as 8h and 16h."""
    return all(0 <= 2 * side - other <= 1 for side, other in zip(size, whole, strict=True))
