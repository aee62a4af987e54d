"""How alike the maps of a pyramid are: linear centered kernel alignment."""

import torch
from torch import Tensor


class LinearCKA:
    r"""Linear centered kernel alignment between L descriptions of the same positions, collected batch by batch.

    Of two of them, N x C matrices X and Y whose columns have the mean 0, it is
    :math:`\|Y^\top X\|_F^2 / (\|X^\top X\|_F \, \|Y^\top Y\|_F)`: 1 if one is a rotation and scaling of the other, and
    0 if no channel of the one says anything, linearly, of a channel of the other. By chance alone it is about C / N
    (for channels that are independent), so there should be many more positions than channels.

    Reference:
        Simon Kornblith, Mohammad Norouzi, Honglak Lee, Geoffrey Hinton: Similarity of Neural Network Representations
        Revisited. ICML 2019. https://arxiv.org/abs/1905.00414
    """

    def __init__(self) -> None:
        self._origin: Tensor | None = None  # somewhere near the means, so that squares around it hardly cancel
        self._count = 0
        self._sum = self._products = torch.zeros((), dtype=torch.float64)

    def add(self, descriptions: Tensor) -> None:
        """Takes N more positions, [N, L, C]."""
        if not len(descriptions):
            return
        x = descriptions.double()
        if self._origin is None:
            self._origin = x[0]
        x = (x - self._origin).flatten(1)
        self._count += len(x)
        self._sum = self._sum + x.sum(dim=0)
        self._products = self._products + x.T @ x

    def result(self) -> Tensor:
        """Of each description with each, [L, L]; NaN for one that is the same at all positions."""
        if self._origin is None:
            return torch.zeros(0, 0)
        parts = self._origin.shape  # [L, C]
        covariance = self._products - self._sum[:, None] * self._sum / self._count
        shared = covariance.square().unflatten(0, parts).unflatten(2, parts).sum(dim=(1, 3))
        size = shared.diagonal().sqrt()
        return (shared / (size[:, None] * size)).float().cpu()
