"""What is measured of a detector: its weights, some training images, and their batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.config import Config, images_per_step
from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.dataset import DetectionDataset
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.data.proposals import ProposalFile
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.errors import UserError, printable
from balanced_learning.training.model import make_model
from balanced_learning.training.reporting.progress import Progress
from balanced_learning.training.weights import choose_labels


def detector_and_images(
    config: Config, checkpoint: Checkpoint | None, batches: int = 1
) -> tuple[Any, DetectionDataset]:
    """Builds the detector that a configuration asks for and finds training images that have boxes, to measure it on.

    Returns:
        The detector in evaluation mode, on the device of the configuration, with the weights of the checkpoint if there
        is one, and the images of :func:`images_to_measure`.
    """
    device = distributed.start(config.run.device, config.run.dist_url)
    train, _ = read_splits(config)
    labels = choose_labels(config, train, checkpoint)
    if checkpoint:
        checkpoint.check_data(train, iterations=None)
    detector = make_model(config, labels, checkpoint and checkpoint.averaged())
    return detector.to(device).eval(), images_to_measure(config, train, labels, batches)


def images_to_measure(config: Config, train: Split, labels: Labels, batches: int) -> DetectionDataset:
    """As many batches of training images that have boxes, with their targets, spread evenly over the data; or all.

    Raises:
        UserError: if there is none.
    """
    positions = train.has_boxes().nonzero()[0]
    if not len(positions):
        raise UserError(f"{train.json_file}: no image has a box")
    data = config.data
    return DetectionDataset(
        train,
        labels.label_of,
        positions[evenly_spaced(len(positions), batches * config.training.batch_size)],
        proposals=ProposalFile.open(data.proposals) if data.proposals else None,
        max_proposals=data.max_proposals,
    )


def evenly_spaced(number: int, count: int) -> np.ndarray:
    """So many of the positions below a number, spread evenly, int64; or all."""
    count = min(count, number)
    return np.arange(count) * number // count


def origin_of_weights(config: Config, checkpoint: Checkpoint | None, warm_up_steps: int = 0) -> str:
    """Says how far the weights of a detector are trained, beside what is measured of it."""
    if checkpoint:
        position, epochs = checkpoint.position, checkpoint.config.training.epochs
        return f"weights of {printable(checkpoint.path)}, after {position.epoch} of {epochs} epochs"
    start = f"weights of --weights {printable(config.model.weights)}" if config.model.weights else ""
    if warm_up_steps:
        images = warm_up_steps * images_per_step(config)
        return f"{start or 'a detector'} after a warm-up of {warm_up_steps} steps, {images} images"
    return f"{start}, not trained on these images" if start else "an untrained detector, whose errors say little"


def batches_to_measure(
    title: str, config: Config, model: nn.Module, dataset: DetectionDataset
) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Yields the images of a data set and their targets batch by batch, on the device of the model, with progress."""
    device, size = next(model.parameters()).device, config.training.batch_size
    starts = range(0, len(dataset), size)
    batches = ([dataset[i] for i in range(start, min(start + size, len(dataset)))] for start in starts)
    for samples in Progress(title, config.run.print_freq).over(batches, len(starts), images=size):
        images = [image.to(device) for image, _ in samples]
        targets = [
            {key: value.to(device) for key, value in target.items() if isinstance(value, Tensor)}
            for _, target in samples
        ]
        yield images, targets
