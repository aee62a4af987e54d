"""Batches of images of similar shape, shared by the processes, and the loaders of them."""

import math
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from balanced_learning.training import distributed, randomness
from balanced_learning.training.config import Config
from balanced_learning.training.data.augmentation import augmentation
from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.dataset import DetectionDataset, Sample, Target
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.data.left_out import count_in_words
from balanced_learning.training.errors import UserError

Batch = tuple[list[Tensor], list[Target]]


class AspectRatioBatchSampler(Sampler[list[int]]):
    """Shuffled batches of images of similar shape, so that little is padded. Every image comes once an epoch.

    Images are grouped by width / height in steps of a ``group_factor``-th of an octave, from 1/2 to 2; what does not
    fill a batch of its group forms mixed batches. A ``group_factor`` of 0 separates portrait from landscape, a negative
    one nothing. The order follows from seed and epoch alone. Of several processes each takes its share, padded to equal
    length.

    Args:
        ratios: width / height of each image.
        batch_size: images of a batch.
        group_factor, seed, rank, world_size: see above.

    Attributes:
        epoch (int): the epoch to shuffle for, 0 at first.
    """

    def __init__(
        self, ratios: np.ndarray, batch_size: int, *, group_factor: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        steps = range(-group_factor, group_factor + 1)  # none, if negative
        edges = [2 ** (step / max(1, group_factor)) for step in steps]
        self.groups = np.searchsorted(edges, ratios, side="right").tolist()
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = randomness.generator(self.seed, "order", self.epoch)
        order = torch.randperm(len(self.groups), generator=generator).tolist()
        order = list(islice(cycle(order), math.ceil(len(order) / self.world_size) * self.world_size))
        batches: list[list[int]] = []
        open_batches: dict[int, list[int]] = {}
        for index in order[self.rank :: self.world_size]:
            batch = open_batches.setdefault(self.groups[index], [])
            batch.append(index)
            if len(batch) == self.batch_size:
                batches.append(open_batches.pop(self.groups[index]))
        rest = [index for batch in open_batches.values() for index in batch]
        batches += [rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size)]
        return (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())

    def __len__(self) -> int:
        return math.ceil(math.ceil(len(self.groups) / self.world_size) / self.batch_size)


class DetectionLoader(DataLoader):
    """A loader of lists of images and lists of targets, which raises the errors that its processes return.

    Its processes start anew with every epoch, so that they learn of it.
    """

    dataset: DetectionDataset

    def __init__(self, dataset: DetectionDataset, workers: int, device: torch.device, **options: Any) -> None:
        pin_memory = device.type == "cuda"
        super().__init__(dataset, num_workers=workers, pin_memory=pin_memory, collate_fn=_as_lists, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Shuffles and augments for this epoch from the next iteration on."""
        self.dataset.epoch = self.batch_sampler.epoch = epoch  # type: ignore[union-attr]


def make_loaders(
    config: Config, device: torch.device, train: Split, val: Split, labels: Labels
) -> tuple[DetectionLoader, DetectionLoader]:
    """The loaders of this process's share of the images to train on, and of those to evaluate.

    Raises:
        UserError: if there is nothing to train on.
    """
    seed = config.training.seed
    positions = np.arange(len(train.images)) if config.data.keep_empty else np.flatnonzero(train.has_boxes())
    if not len(positions):
        why = count_in_words(train.causes)
        raise UserError(f"{train.json_file}: no image has a box to train on" + (f"; there are {why}" if why else ""))
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = AspectRatioBatchSampler(
        train.columns.widths[positions] / train.columns.heights[positions],
        config.training.batch_size,
        group_factor=config.data.aspect_ratio_group_factor,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    train_set = DetectionDataset(train, labels.label_of, positions, augmentation(config.data.data_augmentation), seed)
    val_set = DetectionDataset(val, labels.label_of)
    share = range(rank, len(val_set), world_size)  # no padding: nothing is evaluated twice
    workers = config.data.workers
    return (
        DetectionLoader(train_set, workers, device, batch_sampler=batches),
        DetectionLoader(val_set, workers, device, sampler=share),
    )


def _as_lists(samples: list[Sample] | UserError) -> Batch | UserError:
    if isinstance(samples, UserError):
        return samples
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
