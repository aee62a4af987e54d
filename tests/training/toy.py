"""Runs that take a tenth of a second: a toy for a detector, noise for images, no pictures; also in parallel."""

import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from balanced_learning.training import dry_run
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.config import Config
from balanced_learning.training.reporting import reports
from examples import train_torchvision_libra
from tests.training.ports import keep_port
from tests.training.small import fingerprint

TOY = ["-j", "0", "--device", "cpu", "--lr", "0.05", "--warmup-iters", "0"]


def write_noise(root: Path, train: int = 6, val: int = 3) -> Path:
    """Writes data in COCO layout: images of noise of one size, with ids from 1 on, those to train on first."""
    draw = np.random.default_rng(0)
    ids = iter(range(1, 1000))
    for name, count in (("train2017", train), ("val2017", val)):
        (root / name).mkdir(parents=True)
        numbers = [next(ids) for _ in range(count)]
        for i in numbers:
            Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8)).save(root / name / f"{i}.png")
        boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [2, 3, 10 + i % 7, 9]} for i in numbers]
        content = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 32, "height": 24} for i in numbers],
            "annotations": [box | {"area": 90, "iscrowd": 0} for box in boxes],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return root


class Body(nn.Sequential):
    """Outside torch.nn, as the backbones of detectors are: of others torch 2.11 compiles nothing."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


class Toy(nn.Module):
    """Learns the widths of boxes, by chance more or less, through batch norm; ``before`` sees each step's images."""

    before: Callable[["Toy", list[Tensor], list[dict[str, Any]]], object] | None = None
    offset = 0.0  # of the loss, once

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Body(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, images: list[Tensor], targets: list[dict[str, Any]] | None = None) -> Any:
        if self.training and self.before:
            type(self).before(self, images, targets)
        found = self.head(self.backbone(torch.stack(images)).mean((2, 3)).float())
        if not self.training:
            corners = torch.stack([torch.zeros(2), torch.full((2,), 9.0)]).flatten()
            return [
                {"boxes": corners[None] + row.abs().sum(), "scores": row[:1].sigmoid(), "labels": torch.ones(1)}
                for row in found
            ]
        widths = torch.stack([target["boxes"][0, 2] for target in targets]) / 32
        chance = torch.rand_like(widths) + 0.5
        loss = (found[:, 0] - widths).square() + self.offset
        self.offset = 0.0
        return {"loss_width": loss.mean(), "loss_chance": (chance * found[:, 1].square()).mean()}


def make_toy(config: Config, labels: Any, checkpoint: Any) -> Toy:
    """In place of the program's ``make_model``."""
    torch.manual_seed(config.training.seed)
    toy = Toy()
    if checkpoint:
        checkpoint.restore({"model": toy})
    return toy


def put_toy_in(patch: Callable[[Any, str, Any], object]) -> None:
    """Puts the toy in place of what takes long."""
    patch(train_torchvision_libra, "make_model", make_toy)
    patch(train_torchvision_libra, "evaluate_detections", fingerprint)
    patch(train_torchvision_libra, "detections_per_image", lambda _: 1)
    patch(dry_run, "load_detector", lambda file: make_toy(Config.of({"lr": 0.1}), None, Checkpoint.load(file)).eval())
    patch(train_torchvision_libra, "save_evaluation", lambda *_: None)
    patch(reports, "save_curves", lambda *_: None)


def toy_options(folder: Path, patch: Callable[[Any, str, Any], object], *more: object, train: int = 6) -> list[Any]:
    """The flags of two epochs of the toy on noise in the folder, in which it is put in place of what takes long."""
    put_toy_in(patch)
    return ["--data-path", write_noise(folder / "data", train), *TOY, "--epochs", 2, *more]


def at_steps(*numbers: int, do: Callable[..., object]) -> Callable[..., None]:
    """For ``Toy.before``: calls ``do`` in these steps of the process, counted from 0, whenever they are tried."""
    steps: list[list[int]] = []

    def before(toy: Toy, images: list[Tensor], targets: list[dict[str, Any]]) -> None:
        ids = [target["image_id"] for target in targets]
        if not steps or steps[-1] != ids:
            steps.append(ids)
        if len(steps) - 1 in numbers:
            do(toy, images, targets)

    return before


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def state_of(file: Path) -> dict[str, Any]:
    """What a checkpoint holds, but for the settings and the clock."""
    content = torch.load(file, weights_only=True)
    history = [{k: v for k, v in row.items() if "second" not in k} for row in content["history"]]
    kept = {k: v for k, v in content.items() if k not in ("config", "seconds", "versions")}
    return kept | {"history": history}


def assert_same(one: Any, other: Any, at: str = "") -> None:
    """Bit by bit."""
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, at
        assert torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0)), at
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for name in one:
            assert_same(one[name], other[name], f"{at}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), at
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{at}[{i}]")
    else:
        assert one == other or (one != one and other != other), at


class Outcome(NamedTuple):
    """How a process ended; a negative code is that of a signal."""

    code: int | None
    out: str
    err: str


def run_processes(world_size: int, folder: Path, work: Callable[..., object], *given: Any) -> list[Outcome]:
    """Calls ``work(*given)`` in each of some processes, which can meet as those that torchrun starts."""
    folder.mkdir(parents=True, exist_ok=True)
    server = multiprocessing.get_context("forkserver")  # has torch already when it forks them
    server.set_forkserver_preload([__name__])
    with keep_port() as kept:
        processes = []
        for rank in range(world_size):
            meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": kept.getsockname()[1]}
            processes.append(server.Process(target=_work, args=(folder, rank, meeting, work, *given)))
            processes[-1].start()
        for process in processes:
            process.join(600)
            if process.exitcode is None:
                process.kill()
                process.join()
    said = [[(folder / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(world_size)]
    return [Outcome(process.exitcode, *texts) for process, texts in zip(processes, said, strict=True)]


def _work(folder: Path, rank: int, meeting: dict[str, Any], work: Callable[..., object], *given: Any) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in meeting.items()}}
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loaders
    put_toy_in(setattr)
    try:
        work(*given)
    finally:
        sys.stdout.flush()


def start(options: list[Any], before: Callable[..., object] | None = None) -> None:
    """Runs the program, in a process of its own or in this one."""
    Toy.before = before
    try:
        train_torchvision_libra.main([str(option) for option in options])
    finally:
        Toy.before = None


def spoil_image(_: Toy, images: list[Tensor], __: Any) -> None:
    images[0][:, 5, 5] = math.nan


def spoil_target(_: Toy, __: Any, targets: list[dict[str, Any]]) -> None:
    targets[0]["boxes"][:, 2] = math.inf


def spoil_loss(toy: Toy, *_: Any) -> None:
    toy.offset = math.nan  # of which no gradient knows


def stumble(*_: Any) -> None:
    raise ValueError("ious[0] has a NaN at index 3")  # as the sampler does


def spoil_gradient(toy: Toy, *_: Any) -> None:
    def spoil(gradient: Tensor) -> Tensor:
        handle.remove()
        return gradient * math.inf

    handle = toy.head.bias.register_hook(spoil)
