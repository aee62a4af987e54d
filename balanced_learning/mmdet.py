"""Drop-in forms, with mmdetection's names and arguments, for those who copied its three files of Libra R-CNN.

They are this library's own parts, and differ from mmdetection's where these do. Importing this module, which nothing
else here does, also puts them in the place of mmdetection's: in the registries of mmdetection 3 (or its fork
onedl-mmdetection), where that can be imported. A configuration asks for it with
``custom_imports = dict(imports=["balanced_learning.mmdet"])``. Elsewhere they are plain classes that need torch alone.
"""

import warnings
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import losses
from .pyramid import BalancedFeaturePyramid
from .samplers import IoUBalancedSampler

__all__ = ["BFP", "BalancedL1Loss", "InstanceBalancedPosSampler", "IoUBalancedNegSampler"]

_EPS = torch.finfo(torch.float32).eps
_CONVS = {"theta": "theta.conv", "phi": "phi.conv", "g": "g.conv", "out": "conv_out.conv"}  # here and in mmdetection


class BalancedL1Loss(losses.BalancedL1Loss):
    """:func:`~balanced_learning.balanced_l1_loss` with the arguments of mmdetection's ``BalancedL1Loss``.

    For ``beta=1.0`` the two are the same function. For another beta this is the paper's loss rescaled, continuous in
    value and slope; mmdetection's formula, by which Libra RetinaNet was trained, is not, and has no counterpart here.
    ``loss_weight`` multiplies the result.

    Example:
        >>> loss = BalancedL1Loss(loss_weight=2.0)
        >>> loss(torch.full((3, 4), 2.0), torch.zeros(3, 4), weight=torch.tensor([1.0, 1.0, 0.0]), avg_factor=8)
        tensor(5.1572)
    """

    def __init__(
        self,
        alpha: float = 0.5,
        gamma: float = 1.5,
        beta: float = 1.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(alpha, gamma, beta, reduction)
        self.loss_weight = loss_weight

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            pred (Tensor[N, ...]): boxes of any number of parameters, or anything else of floating-point type.
            target (Tensor[N, ...]): what they should be, of the same shape.
            weight (Tensor, optional): factors, of the shape of ``pred`` or without its last dimension: one a box.
            avg_factor (float or Tensor, optional): with ``"mean"``, what the sum is divided by, instead of the number
                of elements. Ignored with ``"none"``, an error with ``"sum"``.
            reduction_override (str, optional): takes the place of ``reduction`` in this call.

        Returns:
            Tensor: a scalar, or with ``"none"`` the loss of each element. An empty input gives 0, with a graph.
        """
        if pred.shape != target.shape:
            raise ValueError(f"target must have the shape of pred, {list(pred.shape)}, got {list(target.shape)}")
        if weight is not None and pred.dim() > 1 and weight.shape == pred.shape[:-1]:
            weight = weight.unsqueeze(-1)
        reduction = reduction_override or self.reduction
        divisor: float | Tensor = 1
        if avg_factor is not None and reduction == "sum":
            raise ValueError(f"avg_factor must be None where reduction is 'sum', got {avg_factor}")
        if avg_factor is not None and reduction == "mean":
            reduction = "sum"
            divisor = avg_factor + _EPS  # as in mmdetection, so that no boxes and a factor of 0 give 0
        settings = {"alpha": self.alpha, "gamma": self.gamma, "beta": self.beta}
        loss = losses.balanced_l1_loss(pred, target, **settings, weight=weight, reduction=reduction)
        return self.loss_weight * loss / divisor

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, loss_weight={self.loss_weight}"


class BFP(BalancedFeaturePyramid):
    """:class:`~balanced_learning.BalancedFeaturePyramid` with the arguments of mmdetection's ``BFP``.

    State dicts have mmdetection's keys (``refine.conv_out.conv.weight``); those of the balanced feature pyramid load,
    too. It starts as mmdetection's has since 2.12, the non-local block as the identity.

    Args:
        in_channels (int): channels of every map.
        num_levels (int): number of maps.
        refine_level (int): index of the level whose size the average has; 0 is the finest.
        refine_type (str, optional): ``None``, ``"conv"`` or ``"non_local"``.
        conv_cfg, norm_cfg, init_cfg: only ``None``, as in the configurations of Libra R-CNN.
    """

    def __init__(
        self,
        in_channels: int,
        num_levels: int,
        refine_level: int = 2,
        refine_type: str | None = None,
        conv_cfg: None = None,
        norm_cfg: None = None,
        init_cfg: None = None,
    ) -> None:
        if not isinstance(in_channels, int):
            raise TypeError(f"in_channels must be one whole number, for all levels, got {in_channels!r}")
        if not 0 <= refine_level < num_levels:
            raise ValueError(f"refine_level must be from 0 to num_levels - 1 = {num_levels - 1}, got {refine_level}")
        if refine_type not in (None, "conv", "non_local"):
            raise ValueError(f"refine_type must be None, 'conv' or 'non_local', got {refine_type!r}")
        for name, value in (("conv_cfg", conv_cfg), ("norm_cfg", norm_cfg), ("init_cfg", init_cfg)):
            if value is not None:
                raise ValueError(f"{name} must be None, as in the configurations of Libra R-CNN, got {value!r}")
        super().__init__(in_channels, refine_level=refine_level, refine=refine_type)
        self.num_levels = num_levels
        self.refine_type = refine_type
        self.register_load_state_dict_pre_hook(partial(_rename, {theirs: ours for ours, theirs in _CONVS.items()}))
        self.register_state_dict_post_hook(partial(_rename, _CONVS))

    def forward(self, inputs: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Takes a tuple or list of maps, finest first, and returns a tuple."""
        if not isinstance(inputs, list | tuple) or len(inputs) != self.num_levels:
            got = f"{type(inputs).__name__} of {len(inputs)}"
            raise ValueError(f"inputs must be a tuple of num_levels={self.num_levels} maps, got {got}")
        return super().forward(tuple(inputs))


def _rename(names: dict[str, str], module: BFP, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Gives the convolutions of the non-local block other names, in a copy that is being loaded or was just made."""
    for key in list(state_dict):
        for old, new in names.items():
            if key.startswith(f"{prefix}refine.{old}."):
                state_dict[f"{prefix}refine.{new}.{key.rpartition('.')[2]}"] = state_dict.pop(key)


class _PlainSampler:
    def __init__(self, num: int, pos_fraction: float, **kwargs: Any) -> None:
        """In the place of mmdetection's base class, whose ``sample`` it has not: takes its settings, and needs none."""


def _base_of_samplers() -> Any:
    """The class that mmdetection's samplers derive from, or one in its place where mmdetection cannot be imported."""
    try:
        # All of it, and before: a class of its own that came later would find its name taken, and stop the import.
        models = import_module("mmdet.models")
        if getattr(models.__spec__, "_initializing", False):
            raise ImportError("it is importing balanced_learning.mmdet itself; leave that to custom_imports")
        import_module("mmdet.registry")
        return import_module("mmdet.models.task_modules.samplers").RandomSampler
    except Exception as error:  # of any kind: it asserts the version of mmcv, which loads a compiled library
        if not (isinstance(error, ModuleNotFoundError) and error.name == "mmdet"):
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"mmdet cannot be used, so these are not registered: {__all__} ({reason})", stacklevel=3)
        return _PlainSampler


_Sampler: Any = _base_of_samplers()


class IoUBalancedNegSampler(_Sampler):
    """mmdetection's sampler of negatives, equally from bins of IoU, by :class:`~balanced_learning.IoUBalancedSampler`.

    In mmdetection's order, the share ``1 - floor_fraction`` comes first, by bins, from the negatives above the floor,
    then the rest from those below it, then what is still short from all that are left. Otherwise than there, bins end
    where the negatives end, not at the largest IoU of all boxes; the last one is closed; a call changes no setting; the
    generator is torch's, of the device. Exactly as many as wanted are drawn, or all where there are fewer.

    With mmdetection 3 it derives from its ``RandomSampler``, for ``sample()``; else a ``CombinedSampler`` calls it, on
    anything that has ``gt_inds`` (0 background, -1 ignored, 1 + index of a ground truth) and ``max_overlaps``.

    Args:
        num (int), pos_fraction (float), **kwargs: for the base class alone.
        floor_thr (float): the floor, in [0, 1): negatives below it are in no bin; with 0, those of IoU 0. -1: none.
        floor_fraction (float): the share that comes from below the floor. In [0, 1].
        num_bins (int): number of bins.
    """

    def __init__(
        self,
        num: int,
        pos_fraction: float,
        floor_thr: float = -1,
        floor_fraction: float = 0,
        num_bins: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(num, pos_fraction, **kwargs)
        if not (floor_thr == -1 or 0 <= floor_thr < 1):
            raise ValueError(f"floor_thr must be -1 or in [0, 1), got {floor_thr}")
        IoUBalancedSampler(num_bins=num_bins, floor_fraction=floor_fraction)  # for its errors
        self.floor_thr = floor_thr
        self.floor_fraction = floor_fraction
        self.num_bins = num_bins

    def _sample_neg(self, assign_result: Any, num_expected: int, **kwargs: Any) -> Tensor:
        """Indices of the negatives drawn, int64 and ascending."""
        ious, negative = assign_result.max_overlaps, assign_result.gt_inds == 0
        above = negative & (ious > 0 if self.floor_thr == 0 else ious >= self.floor_thr)
        chosen = torch.zeros_like(negative)
        for candidates, share, bins, floor in (
            (above, 1 - self.floor_fraction, self.num_bins, max(self.floor_thr, 0.0)),
            (negative & ~above, 1, 1, 0.0),
            (negative, 1, 1, 0.0),
        ):
            num = min(int(num_expected * share), num_expected - int(chosen.sum()))
            if num > 0:
                indices = (candidates & ~chosen).nonzero().flatten()
                zeros = torch.zeros_like(indices)
                sampler = IoUBalancedSampler(num, 0.0, num_bins=bins, max_iou=None, floor_iou=floor)
                _, (mask,) = sampler([zeros], [ious[indices]], [zeros])
                chosen[indices[mask]] = True
        return chosen.nonzero().flatten()


class InstanceBalancedPosSampler(_Sampler):
    """mmdetection's sampler of positives, as many of each ground truth, as far as it has them.

    Otherwise than there, shares are equal, with at least one for each ground truth while the number allows, no positive
    is drawn twice, and exactly as many as wanted are drawn, or all where there are fewer. Arguments, base class and
    ``assign_result`` are those of :class:`IoUBalancedNegSampler`, without its last three.
    """

    def _sample_pos(self, assign_result: Any, num_expected: int, **kwargs: Any) -> Tensor:
        """Indices of the positives drawn, int64 and ascending."""
        indices = (assign_result.gt_inds > 0).nonzero().flatten()
        groups = assign_result.gt_inds[indices].long()
        (mask,), _ = IoUBalancedSampler(num_expected, 1.0)([groups], [torch.zeros_like(groups).float()], [groups])
        return indices[mask]


if _Sampler is not _PlainSampler:
    _registry = import_module("mmdet.registry")
    for _cls in (BalancedL1Loss, BFP, IoUBalancedNegSampler, InstanceBalancedPosSampler):
        _kind = _registry.MODELS if issubclass(_cls, torch.nn.Module) else _registry.TASK_UTILS
        _kind.register_module(name=_cls.__name__, module=_cls, force=True)
