"""IoU-balanced negatives and instance-balanced positives.

:class:`IoUBalancedSampler` holds the settings and draws for all images of a batch at once: by the compiled op where
there is one (see :func:`~balanced_learning.use_kernels`), otherwise in a fixed number of tensor operations, whatever
the batch, that wait for the device once.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from . import _ops


@dataclass(frozen=True)
class IoUBalancedSampler:
    r"""Chooses the boxes that an image contributes to the training loss, section 3.1 of Libra R-CNN.

    **Negatives** (equations 1 and 2): the interval ``[floor_iou, max_iou]`` is cut into K = ``num_bins`` equal bins. Of
    the N negatives wanted, :math:`\lfloor N / K \rfloor` are drawn from each bin, uniformly: one of the :math:`M_k`
    candidates of bin k is drawn with the probability :math:`p_k = \frac{N}{K} \cdot \frac{1}{M_k}`. What is short,
    because a bin holds too few or N is no multiple of K, is drawn uniformly from the candidates not yet taken. IoU 0
    belongs to the first bin; the last one is closed and also holds what lies above ``max_iou``.

    **Positives**: every ground truth contributes the same number, as far as it has that many.

    Settings cannot be changed by a call or by assignment; use :func:`dataclasses.replace`. All randomness comes from
    torch's generator of the device the tensors are on, so :func:`torch.manual_seed` fixes the draw: on the same device
    with the same implementation (see :func:`~balanced_learning.backend_info`). Another device or implementation,
    compiled code and another version of this library draw otherwise from the same seed.

    A call waits for the device once, to learn of NaNs. The compiled op needs 12 bytes of memory a candidate, or 28 with
    ``instance_balanced``; on CUDA it is two kernels, or three without ``max_iou``, for up to 32 images. Without it, a
    call is a number of tensor operations that does not depend on the batch.

    Args:
        batch_size_per_image (int): boxes to choose in an image.
        positive_fraction (float): the share of them, rounded down, that positives may take. In [0, 1].
        num_bins (int): number of bins, K in the paper.
        max_iou (float, optional): where the last bin ends: the IoU below which a candidate is a negative. ``None``: the
            largest IoU of all candidates of the image, positives included, which is what mmdetection does; with a
            ground truth among the candidates that is 1, so bins are empty and two bins are random sampling.
        floor_iou (float): where the first bin begins. Candidates below it are in no bin.
        floor_fraction (float): with ``floor_iou > 0``, the share of N, rounded to the nearest number, that is drawn
            from below it; the bins share the rest. In [0, 1].
        instance_balanced (bool): whether positives are shared equally by the ground truths (with at least one for each,
            if the quota allows) or drawn uniformly.
        max_negatives_per_positive (float, optional): at most this many negatives for each positive chosen (and for one
            where there is none). The image may then contribute fewer boxes. mmdetection calls it ``neg_pos_ub``.

    Example:
        >>> sampler = IoUBalancedSampler(batch_size_per_image=4, positive_fraction=0.5)
        >>> labels = torch.tensor([0, 0, 0, 0, 7, 0, -1])
        >>> ious = torch.tensor([0.0, 0.0, 0.2, 0.4, 0.9, 0.0, 0.5])
        >>> matched_idxs = torch.zeros(7, dtype=torch.int64)
        >>> positive_masks, negative_masks = sampler([labels], [ious], [matched_idxs])
        >>> positive_masks[0].nonzero().flatten()
        tensor([4])
        >>> negative_masks[0][2:4]  # one from each of the three bins
        tensor([True, True])
    """

    batch_size_per_image: int = 512
    positive_fraction: float = 0.25
    _: KW_ONLY
    num_bins: int = 3
    max_iou: float | None = 0.5
    floor_iou: float = 0.0
    floor_fraction: float = 0.0
    instance_balanced: bool = True
    max_negatives_per_positive: float | None = None

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size_per_image", 0), ("num_bins", 1)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= lowest):
                raise ValueError(f"{name} must be a whole number of at least {lowest}, got {value!r}")
        for name in ("positive_fraction", "floor_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.floor_iou < 1:
            raise ValueError(f"floor_iou must be in [0, 1), got {self.floor_iou}")
        if self.max_iou is not None and not self.floor_iou < self.max_iou <= 1:
            raise ValueError(f"max_iou must be above floor_iou={self.floor_iou} and at most 1, got {self.max_iou}")
        if self.max_negatives_per_positive is not None and not self.max_negatives_per_positive >= 0:
            raise ValueError(f"max_negatives_per_positive must be at least 0, got {self.max_negatives_per_positive}")

    def __call__(
        self, labels: Sequence[Tensor], ious: Sequence[Tensor], matched_idxs: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Draws the boxes of each image of a batch.

        Args:
            labels (list[Tensor[M]]): one int64 tensor an image: -1 = ignored, 0 = negative, > 0 = positive.
            ious (list[Tensor[M]]): IoU of each box with the ground truth it was matched to.
            matched_idxs (list[Tensor[M]]): int64, index of that ground truth. Used for positives only.

        Returns:
            tuple[list[Tensor[M]], list[Tensor[M]]]: bool masks of the positives and of the negatives chosen. Exactly
            as many as wanted, or all candidates where there are fewer.

        Raises:
            TypeError: for a tensor of a wrong type.
            ValueError: for lists of different length, tensors of different shape, or a NaN among the IoUs.
        """
        _check_batch(labels, ious, matched_idxs)
        if not labels:
            return [], []
        wide = torch.float64 if any(image.dtype == torch.float64 for image in ious) else torch.float32
        ious = [image.to(wide) for image in ious]  # so that an edge between bins is where it is in every type
        if _ops.uses_kernels(labels[0]):
            positives, negatives, has_nan = _ops.iou_balanced_sample(
                labels,
                ious,
                matched_idxs,
                self.batch_size_per_image,
                self._num_positives,
                self.instance_balanced,
                self.num_bins,
                self.max_iou,
                self.floor_iou,
                self.floor_fraction,
                self.max_negatives_per_positive,
            )
        else:
            positives, negatives, has_nan = self._draw(labels, ious, matched_idxs)
        if any(has_nan.tolist()):
            raise _nan_error(ious)
        return positives, negatives

    @property
    def _num_positives(self) -> int:
        """The number wanted of an image."""
        return int(self.batch_size_per_image * self.positive_fraction)

    def _draw(self, *batch: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Draws as :func:`_ops.iou_balanced_sample`, in tensor operations over the T candidates of all B images."""
        sizes = [len(image) for image in batch[0]]
        labels, ious, matched_idxs = (torch.cat(list(column)) for column in batch)  # [T]
        image = _image_of_each(sizes, labels.device)
        positive, negative = labels > 0, labels == 0
        num_positives = torch.zeros(len(sizes), dtype=torch.int64, device=labels.device)  # [B]
        num_positives = num_positives.index_add(0, image, positive.long()).clamp(max=self._num_positives)
        num_negatives = self.batch_size_per_image - num_positives
        if self.max_negatives_per_positive is not None:
            limit = self.max_negatives_per_positive * num_positives.clamp(min=1).double()
            num_negatives = torch.minimum(num_negatives.double(), limit).long()  # rounded down

        # Of negatives: the bin each belongs to, and how many are first drawn from it. -1 is below the floor.
        bins = iou_bins(ious, self.floor_iou, self._ceiling(ious, image, len(sizes)), self.num_bins)
        floor_fraction = self.floor_fraction if self.floor_iou > 0 else 0.0
        num_below = (num_negatives.double() * floor_fraction).round().long()
        per_bin = (num_negatives - num_below) // self.num_bins
        quota = torch.where(bins < 0, num_below[image], per_bin[image])

        # Then they are drawn in order of priority: the ground truths take turns; bins go before what fills up.
        kind = 3 * image + torch.where(positive, 0, torch.where(negative, 1, 2))
        group = matched_idxs if self.instance_balanced else torch.zeros_like(matched_idxs)
        part = _pack(kind, torch.where(positive, group, bins + 1))
        turn = random_position(part, part)
        priority = torch.where(positive, turn * self.instance_balanced, (turn >= quota).long())
        position = random_position(_pack(kind, priority), kind)
        chosen = position < torch.where(positive, num_positives[image], num_negatives[image])
        positives, negatives = ((chosen & label).split(sizes) for label in (positive, negative))
        return list(positives), list(negatives), ious.isnan().any()[None]

    def _ceiling(self, ious: Tensor, image: Tensor, num_images: int) -> float | Tensor:
        """The end of the last bin; without ``max_iou``, for each of the candidates."""
        if self.max_iou is not None:
            return self.max_iou
        return ious.new_zeros(num_images).scatter_reduce(0, image, ious, "amax")[image]


def _image_of_each(sizes: list[int], device: torch.device) -> Tensor:
    """The index of the image of each candidate, without waiting for the device: [2, 3] -> [0, 0, 1, 1, 1]."""
    repeats = torch.tensor(sizes, device="cpu").to(device, non_blocking=True)
    return torch.arange(len(sizes), device=device).repeat_interleave(repeats, output_size=sum(sizes))


def _pack(high: Tensor, low: Tensor) -> Tensor:
    """One number to sort by, first by ``high``. [T], [T] -> [T]"""
    return (high << 40) + low


def random_position(key: Tensor, group: Tensor) -> Tensor:
    """The position of each element among those of its group, by key, and in random order where that is the same.

    Args:
        key (Tensor[T]): int64. Sorting by it must bring those of a group together.
        group (Tensor[T]): int64.

    Returns:
        Tensor[T]: int64.

    Example:
        >>> random_position(torch.tensor([71, 30, 70]), torch.tensor([7, 3, 7]))
        tensor([1, 0, 0])
    """
    order = torch.randperm(key.numel(), device=key.device)
    order = order[key[order].argsort(stable=True)]
    group = group[order]
    index = torch.arange(key.numel(), device=key.device)
    is_first = torch.ones_like(group, dtype=torch.bool)
    is_first[1:] = group[1:] != group[:-1]
    first = torch.where(is_first, index, 0).cummax(dim=0).values
    return torch.empty_like(order).index_copy(0, order, index - first)


def iou_bins(ious: Tensor, floor: float, ceiling: float | Tensor, num_bins: int) -> Tensor:
    """The bin of each IoU: ``[floor, ceiling]`` in ``num_bins`` equal parts, closed below, the last one open above.

    Args:
        ious (Tensor[M]): any floating-point type.
        floor (float): where bin 0 begins; -1 is returned for what lies below.
        ceiling (float or Tensor[M]): where the last bin would end. What lies above is in it too.
        num_bins (int): number of bins.

    Returns:
        Tensor[M]: int64, -1 to ``num_bins - 1``.
    """
    edges = [floor + (ceiling - floor) * k / num_bins for k in range(num_bins)]
    return sum((ious >= edge for edge in edges), start=torch.full_like(ious, -1, dtype=torch.int64))


def _check_batch(labels: Sequence[Tensor], ious: Sequence[Tensor], matched_idxs: Sequence[Tensor]) -> None:
    lists = {"labels": labels, "ious": ious, "matched_idxs": matched_idxs}
    for name, tensors in lists.items():
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(f"{name} must be a list with one tensor an image, got {type(tensors).__name__}")
        if len(tensors) != len(labels):
            raise ValueError(f"{name} must have one tensor for each of the {len(labels)} images, got {len(tensors)}")
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}] must be a tensor, got {type(tensor).__name__}")
            if tensor.dim() != 1 or tensor.shape != labels[i].shape:
                raise ValueError(
                    f"{name}[{i}] must have the shape [M] of labels[{i}], {list(labels[i].shape)}, "
                    f"got {list(tensor.shape)}"
                )
            if tensor.device != labels[0].device:
                raise ValueError(f"{name}[{i}] must be on the device of labels[0], got {tensor.device}")
            if name == "ious" and not tensor.is_floating_point():
                raise TypeError(f"{name}[{i}] must be of a floating-point type, got {tensor.dtype}")
            if name != "ious" and tensor.dtype != torch.int64:
                raise TypeError(f"{name}[{i}] must be int64, got {tensor.dtype}")


def _nan_error(ious: Sequence[Tensor]) -> ValueError:
    i, indices = next((i, image.isnan().nonzero()) for i, image in enumerate(ious) if image.isnan().any())
    return ValueError(f"ious[{i}] has a NaN at index {int(indices[0])}")
