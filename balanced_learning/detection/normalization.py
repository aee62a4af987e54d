"""Batch norm of a backbone that was trained on other images: its statistics stay, its scale and shift are trained."""

from torch import nn


class FrozenStatisticsBatchNorm2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` that always uses its running statistics, which never change.

    Weight and bias are trained, unlike those of torchvision's ``FrozenBatchNorm2d``. The keys of the state dict are
    those of ``BatchNorm2d``, so that its weights can be loaded. ``SyncBatchNorm.convert_sync_batchnorm`` would make an
    ordinary batch norm of it.

    Example:
        >>> FrozenStatisticsBatchNorm2d(64).train().training
        False
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats=True)
        self.train()

    def train(self, mode: bool = True) -> "FrozenStatisticsBatchNorm2d":
        """Stays in evaluation mode."""
        return super().train(mode=False)
