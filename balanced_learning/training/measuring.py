"""What is measured of a detector: its weights, some training images, and their batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.config import Config
from balanced_learning.training.data.dataset import DetectionDataset
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
        is one, and as many batches of images with their targets, or all there are, spread evenly over the data.
    """
    device = distributed.start(config.run.device, config.run.dist_url)
    train, _ = read_splits(config)
    labels = choose_labels(config, train, checkpoint)
    if checkpoint:
        checkpoint.check_data(train, iterations=None)
    detector = make_model(config, labels, checkpoint and checkpoint.averaged())
    positions = train.has_boxes().nonzero()[0]
    if not len(positions):
        raise UserError(f"{train.json_file}: no image has a box")
    count = min(batches * config.training.batch_size, len(positions))
    spread = np.arange(count) * len(positions) // count
    data = config.data
    dataset = DetectionDataset(
        train,
        labels.label_of,
        positions[spread],
        proposals=ProposalFile.open(data.proposals) if data.proposals else None,
        max_proposals=data.max_proposals,
    )
    return detector.to(device).eval(), dataset


def origin_of_weights(config: Config, checkpoint: Checkpoint | None) -> str:
    """Says how far the weights of a detector are trained, beside what is measured of it."""
    if checkpoint:
        position, epochs = checkpoint.position, checkpoint.config.training.epochs
        return f"weights of {printable(checkpoint.path)}, after {position.epoch} of {epochs} epochs"
    if config.model.weights:
        return f"weights of --weights {printable(config.model.weights)}, not trained on these images"
    return "an untrained detector, whose errors say little"


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
