"""The proposals of an RPN for every image of a data set, in a file to train a Fast R-CNN on."""

import hashlib
import json
import socket
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from balanced_learning.detection.proposals import first_stage
from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.config import Config
from balanced_learning.training.data.batching import DetectionLoader, OneByOne
from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.dataset import DetectionDataset
from balanced_learning.training.data.proposal_writer import ProposalWriter, begin, finish
from balanced_learning.training.data.proposals import NOT_DONE
from balanced_learning.training.data.splits import read_splits
from balanced_learning.training.errors import SharedError
from balanced_learning.training.exchange import Exchange
from balanced_learning.training.inference import detect
from balanced_learning.training.model import make_model, prepare
from balanced_learning.training.optimization import Precision
from balanced_learning.training.reporting.progress import Progress
from balanced_learning.training.signals import StopSignals
from balanced_learning.training.weights import choose_labels


def dump(config: Config, path: Path, checkpoint: Checkpoint | None, precision: Precision, signals: StopSignals) -> None:
    """Writes the proposals of the first stage that the settings name, for all images of their data.

    Raises:
        UserError, Stopped: as :func:`dump_proposals`.
    """
    together = signals.deferred() if distributed.world_size() > 1 else nullcontext()  # where they ask each other
    with together:
        splits = read_splits(replace(config, run=replace(config.run, limit_batches=None)))
        labels = choose_labels(config, splits[0], checkpoint)
        model = make_model(config, labels, checkpoint and checkpoint.averaged()).eval()
        if not config.model.is_rpn:
            first_stage(model)
        signals.stop_together()
        dump_proposals(
            prepare(model, config.model, precision.device),
            precision,
            path,
            splits,
            signals,
            settings=vars(config.model) | vars(config.conventions),
            workers=config.data.workers,
            max_unreadable=config.data.max_unreadable,
            print_freq=config.run.print_freq,
            limit=model.rpn.post_nms_top_n(),
        )


def dump_proposals(
    model: nn.Module,
    precision: Precision,
    path: Path,
    splits: Sequence[Split],
    signals: StopSignals,
    *,
    settings: Mapping[str, Any],
    workers: int,
    max_unreadable: int,
    print_freq: int = 20,
    limit: int = 2000,
) -> None:
    """Writes what an RPN proposes for every image, each by itself and as it is; all processes call it.

    What was done before the program was stopped or killed is kept, and the same call goes on with it: with the same
    weights, settings and images. An image that cannot be read has no proposals.

    Args:
        model: an RPN alone, on its device.
        precision: of its forward pass.
        path: of the file. It is there when all is done.
        splits: the images.
        signals: which end it between two images.
        settings: plain values of what the proposals depend on beside the weights, such as the size of the images.
        workers: loader processes.
        max_unreadable: images that may turn out to be so.
        print_freq: images between reports.
        limit: the most proposals of an image.

    Raises:
        UserError: if the file is there already or cannot be written, for proposals that are no boxes, or if too many
            images cannot be read.
        Stopped: after a signal.
    """
    if len(set(distributed.gather(socket.gethostname()))) > 1:  # where each would write whole pages, not its rows alone
        raise SharedError(f"{path}: cannot be written by processes on several machines; start them on one")
    unfinished = distributed.in_main(
        lambda: begin(path, splits, limit, _digest(model, [dict(settings), limit, str(precision.dtype)], splits))
    )
    exchange = Exchange(signals, max_unreadable)
    with signals.deferred(), ProposalWriter(unfinished) as writer:
        distributed.barrier()  # all have seen what is left before anybody goes on
        distributed.say(f"{unfinished}: {_done(writer)}")
        for split in splits:
            where = f"in the proposals of {split.name}; the same command goes on with {unfinished}"
            left = writer.left(split)
            image_ids = list(left)
            images = _images(split, image_ids)
            shares = OneByOne(len(images), rank=distributed.rank(), world_size=distributed.world_size())
            loader = DetectionLoader(images, shares, workers, precision.device)
            progress = Progress(f"proposals of {split.name}", print_freq, is_main=distributed.is_main())

            def hear(batch: Any, where: str = where) -> None:
                exchange.tell(batch.unreadable if batch else [])
                exchange.stop_if_asked(where)

            own = {image_ids[i] for i in shares.indices}
            for image_id, found in detect(model, loader, precision, progress, hear):
                writer.put(left[image_id], found["boxes"].numpy(), found["scores"].numpy())
                own.remove(image_id)
            exchange.finish()
            exchange.stop_if_asked(where)
            for image_id in own:  # it cannot be read
                writer.put(left[image_id], np.zeros((0, 4)), np.zeros(0))
    distributed.barrier()
    distributed.in_main(lambda: finish(unfinished, path))
    distributed.say(f"{path}: proposals for all images")


def _images(split: Split, image_ids: list[int]) -> DetectionDataset:
    positions = [split.columns.position(image_id) for image_id in image_ids]
    return DetectionDataset(split, dict.fromkeys(split.categories, 1), positions, unreadable="leave out")


def _digest(model: nn.Module, settings: list[Any], splits: Sequence[Split]) -> str:
    """Eight digits of whatever the proposals follow from."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    for split in splits:
        digest.update(split.name.encode())
        for column in (split.columns.image_ids, split.columns.widths, split.columns.heights):
            digest.update(column.tobytes())
    return digest.hexdigest()[:8]


def _done(writer: ProposalWriter) -> str:
    counts = writer.index[2]
    return f"{(counts != NOT_DONE).sum():,} of {len(counts):,} images are done"
