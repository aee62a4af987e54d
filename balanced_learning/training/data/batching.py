"""Batches of images of similar shape, shared by the processes, and the loaders of them."""

import math
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from balanced_learning.training import distributed, randomness
from balanced_learning.training.config import Config
from balanced_learning.training.data.augmentation import augmentation
from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.dataset import Batch, DetectionDataset, Share
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.data.left_out import count_in_words
from balanced_learning.training.data.loader_processes import ignore_signals, loading
from balanced_learning.training.data.proposals import ProposalFile
from balanced_learning.training.errors import UserError

T = TypeVar("T")


class AspectRatioBatchSampler(Sampler[Share]):
    """A process's shares of shuffled batches of images of similar shape. Every image comes once an epoch.

    Images are grouped by width / height in steps of a ``group_factor``-th of an octave, from 1/2 to 2; what does not
    fill a batch of its group forms mixed batches. A ``group_factor`` of 0 separates portrait from landscape, a negative
    one nothing. The batches and their order follow from seed and epoch alone, however many processes share them.

    Of every batch each process takes a contiguous share, of which no two differ by more than an image. So all have the
    same number of steps. Where a batch has fewer images than there are processes, those left without one get the first
    image as a filler, which is to weigh nothing: ``DistributedDataParallel`` needs all of them in every step.

    Args:
        ratios: width / height of each image.
        images_per_step: images of a batch, for all processes together.
        group_factor, seed, rank, world_size: see above.
        limit: steps after which an epoch ends.

    Attributes:
        epoch (int): the epoch to shuffle for, 0 at first.
        start (int): the step to begin it at, 0 at first.
    """

    def __init__(
        self,
        ratios: np.ndarray,
        images_per_step: int,
        *,
        group_factor: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
    ) -> None:
        steps = range(-group_factor, group_factor + 1)  # none, if negative
        edges = [2 ** (step / max(1, group_factor)) for step in steps]
        self.groups = np.searchsorted(edges, ratios, side="right").tolist()
        self.images_per_step = images_per_step
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = self.start = 0
        self.iterations = math.ceil(len(self.groups) / images_per_step)
        if limit is not None:
            self.iterations = min(self.iterations, limit)

    def __len__(self) -> int:
        """Steps of an epoch that begins at its first."""
        return self.iterations

    def __iter__(self) -> Iterator[Share]:
        batches = self._batches()
        for step in range(self.start, len(self)):
            batch = batches[step]
            share = share_of(batch, self.rank, self.world_size)
            yield Share(share or batch[:1], len(batch), step, is_filler=not share)

    def _batches(self) -> list[list[int]]:
        generator = randomness.generator(self.seed, "order", self.epoch)
        batches: list[list[int]] = []
        open_batches: dict[int, list[int]] = {}
        for index in torch.randperm(len(self.groups), generator=generator).tolist():
            batch = open_batches.setdefault(self.groups[index], [])
            batch.append(index)
            if len(batch) == self.images_per_step:
                batches.append(open_batches.pop(self.groups[index]))
        rest = [index for _, batch in sorted(open_batches.items()) for index in batch]
        batches += [rest[i : i + self.images_per_step] for i in range(0, len(rest), self.images_per_step)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class OneByOne(Sampler[Share]):
    """A process's images of an evaluation, which takes them in turns and none twice."""

    def __init__(self, count: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, count, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Share]:
        return (Share([index], images=1, step=step) for step, index in enumerate(self.indices))


class DetectionLoader(DataLoader):
    """A loader of batches, which raises the errors that its processes return.

    Its processes start anew with every epoch, so that they learn of it, and end with the iteration, wherever it stops.
    """

    dataset: DetectionDataset

    def __init__(
        self, dataset: DetectionDataset, shares: AspectRatioBatchSampler | OneByOne, workers: int, device: torch.device
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=shares,  # type: ignore[arg-type]
            num_workers=workers,
            pin_memory=device.type == "cuda",
            collate_fn=_unchanged,
            worker_init_fn=ignore_signals,
            multiprocessing_context="fork" if workers else None,  # others import torch for seconds in every epoch
        )

    def __iter__(self) -> Generator[Batch, None, None]:  # type: ignore[override]
        with closing(loading(super().__iter__)) as batches:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                yield batch

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Shuffles and augments for this epoch from the next iteration on, which begins at the step ``start``."""
        self.dataset.epoch = self.batch_sampler.epoch = epoch  # type: ignore[union-attr]
        self.batch_sampler.start = start  # type: ignore[union-attr]


def share_of(batch: list[T], rank: int, world_size: int) -> list[T]:
    """The contiguous part of a batch that belongs to a process; the first ones have one more where it does not divide.

    Example:
        >>> [share_of([1, 2, 3, 4, 5], rank, 3) for rank in range(3)]
        [[1, 2], [3, 4], [5]]
    """
    each, more = divmod(len(batch), world_size)
    first = rank * each + min(rank, more)
    return batch[first : first + each + (rank < more)]


def make_loaders(
    config: Config,
    device: torch.device,
    train: Split,
    val: Split,
    labels: Labels,
) -> tuple[DetectionLoader, DetectionLoader]:
    """The loaders of this process's share of the images to train on, and of those to evaluate.

    With a file of proposals, targets have those of their image.

    Raises:
        UserError: if there is nothing to train on, or the file cannot be read or lacks an image.
    """
    data, seed = config.data, config.training.seed
    proposals = ProposalFile.open(data.proposals) if data.proposals else None
    positions = np.arange(len(train.images)) if data.keep_empty else np.flatnonzero(train.has_boxes())
    if not len(positions):
        why = count_in_words(train.causes)
        raise UserError(f"{train.json_file}: no image has a box to train on" + (f"; there are {why}" if why else ""))
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = AspectRatioBatchSampler(
        train.columns.widths[positions] / train.columns.heights[positions],
        config.training.batch_size * config.training.accumulation_steps * world_size,
        group_factor=data.aspect_ratio_group_factor,
        seed=seed,
        rank=rank,
        world_size=world_size,
        limit=config.run.limit_batches,
    )
    train_set = DetectionDataset(
        train,
        labels.label_of,
        positions,
        augmentation(data.data_augmentation),
        seed,
        "raise" if data.strict_data else "replace",
        proposals,
        data.max_proposals,
    )
    val_set = DetectionDataset(
        val,
        labels.label_of,
        unreadable="raise" if data.strict_data else "leave out",
        proposals=proposals,
        max_proposals=data.max_proposals,
    )
    images = OneByOne(len(val_set), rank=rank, world_size=world_size)
    return (
        DetectionLoader(train_set, batches, data.workers, device),
        DetectionLoader(val_set, images, data.workers, device),
    )


def _unchanged(batch: Any) -> Any:
    return batch
