"""How long runs take: from the number of images, and a throughput that is told or measured."""

import math
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any, NamedTuple

import torch
from torch import Tensor

from balanced_learning.training import distributed
from balanced_learning.training.config import Config
from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.shapes import shapes_dataset
from balanced_learning.training.data.splits import NAMES
from balanced_learning.training.model import build_model, prepare
from balanced_learning.training.optimization import Precision, make_optimizer, update
from balanced_learning.training.reproduction.folders import read_rows
from balanced_learning.training.reproduction.plan import Job
from balanced_learning.training.step import Losses

NUM_CLASSES, BOXES_PER_IMAGE = 91, 7  # as COCO has them
ASPECT_RATIO = 4 / 3

# What the time of a step depends on. Losses and samplers cost too little to be measured one by one.
_COSTLY = {
    *("model", "backbone", "pyramid", "path_aggregation", "refine", "small", "min_size", "max_size", "norm"),
    *(
        "fpn_channels",
        "anchor_size",
        "box_batch_size_per_image",
        "trainable_backbone_layers",
        "batch_size",
        "accumulation_steps",
        "amp",
        "channels_last",
        "compile",
    ),
}


class Images(NamedTuple):
    """The number of images to train on, and to evaluate."""

    train: int
    val: int


COCO = Images(117_266, 5_000)  # train2017 has 118,287, of which so many have boxes that are no crowds


@dataclass(frozen=True)
class Throughput:
    """Images a second, of all processes together."""

    training: float
    evaluation: float


def count_images(config: Config) -> Images:
    """The images that a run trains on and evaluates; without data COCO's, or those that a small detector has drawn.

    Raises:
        UserError: for data that cannot be read.
    """
    data, model = config.data, config.model
    if data.data_path is None:
        drawn = shapes_dataset.__kwdefaults__ or {}
        counts = [drawn[name] for name in Images._fields] if model.small else COCO
        return Images(*(min(count, data.limit or count) for count in counts))
    with redirect_stderr(StringIO()):  # what is wrong with the data, each run says
        train, val = (
            read_split(data.data_path, name, limit=data.limit, resized=(model.min_size, model.max_size))
            for name in NAMES
        )
    return Images(len(train.images) if data.keep_empty else int(train.has_boxes().sum()), len(val.images))


def estimate_hours(job: Job, images: Images, throughput: Throughput) -> float:
    """The hours that are left of a job, without the start of the program."""
    limit = job.config.run.limit_batches
    train, val = images
    if job.dumps:
        return (train + val) / throughput.evaluation / 3600
    if limit:
        train, val = min(train, limit * job.images_per_step), min(val, limit * job.processes)
    rows = read_rows(job.folder)
    training = job.config.training
    epochs = max(0, training.epochs - (rows[-1]["epoch"] + 1 if rows else 0))
    evaluations = math.ceil(epochs / training.eval_interval)
    return (epochs * train / throughput.training + evaluations * val / throughput.evaluation) / 3600


class Measured:
    """Throughputs, measured once for all jobs whose detectors take equally long.

    Args:
        device: to measure on, by name.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(distributed.find_device(device))
        on_gpu = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name(self.device) if on_gpu else f"{self.device.type.upper()}"
        self._known: dict[Any, Throughput] = {}

    def of(self, job: Job) -> Throughput:
        """The throughput of a job, if each of its processes is as fast as one on this device."""
        config = job.config
        key = tuple((name, value) for name, value in config.values().items() if name in _COSTLY)
        if key not in self._known:
            self._known[key] = _measure(config, self.device)
        one = self._known[key]
        return Throughput(one.training * job.processes, one.evaluation * job.processes)


def _measure(config: Config, device: torch.device) -> Throughput:
    """Times some steps on random images, with random weights that do not change."""
    detector = prepare(build_model(config, NUM_CLASSES), config.model, device)
    for norm in (module for module in detector.modules() if hasattr(module, "running_var")):
        norm.running_var.fill_(4.0)  # so that float16 holds the maps of a hundred layers of random weights, too
    precision = Precision(config.training.amp, device)
    optimizer = make_optimizer(detector, replace(config.training, lr=0.0))
    losses_of = Losses(detector)
    images = [torch.rand(3, *_size(config), device=device) for _ in range(config.training.batch_size)]
    targets = [_target(config, device) for _ in images]

    def train() -> None:
        optimizer.zero_grad()
        with precision():
            losses = losses_of(images, targets)
        precision.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        update(detector, optimizer, precision, config.training.clip_grad_norm)

    @torch.no_grad()
    def evaluate() -> None:
        with precision():
            detector(images[:1], targets[:1])

    training = len(images) / _seconds(train, device)
    detector.eval()
    return Throughput(training, 1 / _seconds(evaluate, device))


def _size(config: Config) -> tuple[int, int]:
    """Height and width of most images, after resizing."""
    return config.model.min_size, min(config.model.max_size, round(config.model.min_size * ASPECT_RATIO))


def _target(config: Config, device: torch.device) -> dict[str, Tensor]:
    def boxes(count: int) -> Tensor:
        height, width = _size(config)
        corner = torch.rand(count, 2, device=device) * 0.7
        scale = torch.tensor([width, height, width, height], device=device)
        return torch.cat([corner, corner + 0.02 + 0.25 * torch.rand_like(corner)], 1) * scale

    labels = torch.randint(1, NUM_CLASSES, (BOXES_PER_IMAGE,), device=device)
    return {"boxes": boxes(BOXES_PER_IMAGE), "labels": labels, "proposals": boxes(config.data.max_proposals)}


def _seconds(step: Any, device: torch.device) -> float:
    """The mean time of some steps, behind a first one."""
    repeats = 10 if device.type != "cpu" else 2
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return sum(times[1:]) / repeats
