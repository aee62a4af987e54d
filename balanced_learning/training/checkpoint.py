"""Checkpoints that explain themselves: plain tensors and numbers, written whole or not at all."""

import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from balanced_learning import backend_info
from balanced_learning.detection.normalization import FrozenStatisticsBatchNorm2d
from balanced_learning.training.config import Config, images_per_step, setting_fields
from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError, printable, shown, warn
from balanced_learning.training.files import write_whole
from balanced_learning.training.restoring import check_tensors, is_plain, load_state
from balanced_learning.training.state_dicts import read_tensors

NEWEST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"  # the last two of a run, in its folder
BEST = "checkpoint_best.pth"  # the one with the highest AP, or AR1000 of proposals
NORM_EPS = 1e-5  # torchvision's default of frozen batch norm
_FROZEN_NORMS = (FrozenBatchNorm2d, FrozenStatisticsBatchNorm2d)

Row = dict[str, float | int | None]


@dataclass(frozen=True)
class Position:
    """How far a run is.

    Attributes:
        epoch: the one being trained, counted from 0; the number of epochs when all are done.
        step: steps of the optimizer done in it, from 0 to ``iterations``; if all are, its evaluation is due.
        iterations: steps of an epoch.
        images_per_step: of all processes together.
        sums: the epoch's sums so far of each process: of the losses over its images, and ``images``, their number.
        history: the rows of ``metrics.jsonl`` of the epochs before.
        skipped_steps: those of the epoch that were left out.
        seconds: that the epoch has taken.

    Raises:
        ValueError: for what no run can have come to; names the attribute.
    """

    epoch: int
    step: int
    iterations: int
    images_per_step: int
    sums: list[dict[str, float]]
    history: list[Row]
    skipped_steps: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        lowest = {"epoch": 0, "step": 0, "iterations": 1, "images_per_step": 1, "skipped_steps": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value < 2**63:
                raise ValueError(f"{name} must be a whole number of at least {low}, got {shown(value)}")
        if self.step > self.iterations:
            raise ValueError(f"step must be at most the {self.iterations} of an epoch, got {self.step}")
        if self.skipped_steps > self.step:
            raise ValueError(f"skipped_steps must be at most the {self.step} that are done, got {self.skipped_steps}")
        if type(self.seconds) is not float or not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds must be a number of at least 0, got {shown(self.seconds)}")
        _check_rows("sums", self.sums, (float,))
        _check_rows("history", self.history, (float, int, type(None)))
        if self.step and not 1 <= len(self.sums) <= self.images_per_step:
            raise ValueError(f"sums must be those of 1 to {self.images_per_step} processes, got {len(self.sums)}")
        for row in self.sums:
            if row and not 0 <= row.get("images", -1) < math.inf:
                raise ValueError(f"sums must tell of images, got {shown(row)}")
        epochs = [row.get("epoch") for row in self.history]
        if epochs != list(range(self.epoch - len(epochs), self.epoch)) or len(epochs) > self.epoch:
            raise ValueError(f"history must be of the epochs up to {self.epoch - 1}, got {shown(epochs)}")


def _check_rows(name: str, rows: Any, kinds: tuple[type, ...]) -> None:
    if not isinstance(rows, list):
        raise ValueError(f"{name} must be a list, got {shown(rows)}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{name}[{i}] must be a dict, got {shown(row)}")
        for key, value in row.items():
            if type(key) is not str or type(value) not in kinds:
                raise ValueError(f"{name}[{i}] must have names and numbers, got {shown(key)}: {shown(value)}")


_POSITION = [field.name for field in fields(Position)]
_ABOUT = {"config", "categories", "category_ids", "num_classes", "norm_eps", "versions", *_POSITION}


@dataclass(frozen=True)
class Checkpoint:
    """A run that can go on.

    Attributes:
        path: the file.
        config: the settings of the run.
        labels: of its model.
        position: how far it is.
        norm_eps: epsilon of the model's frozen batch norm, which follows from the weights that it started from.
        states: by name, the state of the model, the optimizer, ..., until they are restored.
        fault: of a step that was left out, what it takes to repeat it.
    """

    path: Path
    config: Config
    labels: Labels
    position: Position
    norm_eps: float
    states: dict[str, Any]
    fault: dict[str, Any] | None = None

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Reads a checkpoint.

        Raises:
            UserError: if the file cannot be read, is damaged, or is no checkpoint of these programs.
        """
        source = printable(path)
        content = read_tensors(path, source)
        if not cls.is_one(content):
            raise UserError(f"{source}: not a checkpoint of these programs")
        return cls.of(path, content)

    @classmethod
    def to_continue(cls, path: Path) -> "Checkpoint":
        """Reads the checkpoint that a run is to go on from: the one before it, if it is damaged.

        Raises:
            UserError: as :meth:`load`, if neither can be read.
        """
        try:
            return cls.load(path)
        except UserError as error:
            previous = path.with_name(PREVIOUS)
            if path.name != NEWEST or not previous.exists():
                raise
            try:
                older = cls.load(previous)
            except UserError as other:
                raise UserError(f"{error}; nor is there one before it: {other}") from None
            warn(f"{error}; going on from {printable(previous)}, the one before it")
            return older

    @classmethod
    def newest(cls, folder: Path) -> "Checkpoint | None":
        """The newest whole checkpoint of the run in a folder, or ``None`` if there is no run yet.

        Raises:
            UserError: if there are only damaged ones.
        """
        if not any(os.path.lexists(folder / name) for name in (NEWEST, PREVIOUS)):
            return None
        return cls.to_continue(folder / NEWEST)

    @staticmethod
    def is_one(content: Any) -> bool:
        """Whether the content of a file is a checkpoint of these programs."""
        return isinstance(content, dict) and content.keys() >= _ABOUT | {"model"}

    @classmethod
    def of(cls, path: Path, content: dict[str, Any]) -> "Checkpoint":
        """The checkpoint with this content.

        Raises:
            UserError: if its settings or another entry cannot be read.
        """
        source = printable(path)
        config = _config(source, content["config"])
        try:
            position = Position(**{name: content[name] for name in _POSITION})
            if (position.epoch, bool(position.step)) > (config.training.epochs, False):
                raise ValueError(f"epoch must be one of the {config.training.epochs}, got {position.epoch}")
            if len(position.history) != position.epoch - config.run.start_epoch:
                raise ValueError(f"history must be of the epochs from {config.run.start_epoch} to {position.epoch - 1}")
            labels = _labels(content)
            norm_eps = content["norm_eps"]
            if type(norm_eps) is not float or not 0 <= norm_eps < math.inf:
                raise ValueError(f"norm_eps must be a number of at least 0, got {shown(norm_eps)}")
            if not isinstance(content["versions"], dict):
                raise ValueError(f"versions must be a dict, got {shown(content['versions'])}")
            for name in {"model", "ema"} & content.keys():
                check_tensors(content[name])
            sizes = [tensor.shape[0] for tensor in content["model"].values() if tensor.dim()]
            if not any(size and size % labels.num_classes == 0 for size in sizes):
                raise ValueError(f"num_classes is {labels.num_classes}, and its model has no output of as many")
            if "fault" in content:
                _check_fault(content["fault"], labels.num_classes)
        except ValueError as error:
            raise UserError(f"{source}: cannot be read: its {error}") from None
        states = {name: state for name, state in content.items() if name not in _ABOUT}
        return cls(path, config, labels, position, norm_eps, states, states.pop("fault", None))

    def restore(self, parts: dict[str, Any]) -> None:
        """Loads the states of the parts by their names, and lets go of them.

        Raises:
            UserError: if there is none of that name, or one that does not fit.
        """
        for name, part in parts.items():
            if name not in self.states:
                raise UserError(f"{printable(self.path)}: holds no {name}")
            try:
                load_state(part, self.states.pop(name))
            except ValueError as error:
                raise UserError(
                    f"{printable(self.path)}: does not fit the {name} that its own settings make: {error}"
                ) from None

    def averaged(self) -> "Checkpoint":
        """The same with the moving average of the weights in their place, if the run kept one: what it evaluates."""
        states = dict(self.states)
        average = states.pop("ema", None)
        if average is not None:
            states["model"] = {str(k).removeprefix("module."): v for k, v in average.items() if k != "n_averaged"}
        return replace(self, states=states)

    def check_data(self, split: Split, config: Config | None = None, iterations: int | None = None) -> None:
        """Compares the data of the run with those of another one, and how they are batched.

        Args:
            split: the images to train on.
            config: the settings of the other run, if it trains.
            iterations: of an epoch of it.

        Raises:
            UserError: if the categories, the images of a step or the iterations are not the same.
        """
        self.labels.check(split, printable(self.path))
        if config is None or config.run.test_only:
            return
        wanted, images = self.position.images_per_step, images_per_step(config)
        if images != wanted:
            raise UserError(
                f"{printable(self.path)}: made with {wanted} images a step; here {_what_fits(wanted, images, config)}"
            )
        if iterations != self.position.iterations:
            raise UserError(
                f"{printable(self.path)}: an epoch had {self.position.iterations} iterations, not {iterations}: the "
                "images to train on are not the same"
            )


def save(
    path: Path,
    parts: dict[str, Any],
    *,
    config: Config,
    labels: Labels,
    position: Position,
    fault: dict[str, Any] | None = None,
    previous: Path | None = None,
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        path: of the checkpoint.
        parts: by name, what has a ``state_dict``: a model, an optimizer, ...
        config, labels, position: see :class:`Checkpoint`.
        fault: what repeats a step that was left out, if it is kept of one.
        previous: keeps the checkpoint that this one replaces.

    Raises:
        UserError: if it cannot be written. Those that are there are left alone.
    """
    content = {
        **{name: part.state_dict() for name, part in parts.items()},
        **{name: getattr(position, name) for name in _POSITION},
        "config": config.plain(),
        "categories": labels.names,
        "category_ids": labels.category_ids,
        "num_classes": labels.num_classes,
        "norm_eps": _norm_eps(parts),
        "versions": backend_info(),
    }
    if fault:
        content["fault"] = fault
    write_whole(path, lambda file: torch.save(content, file), previous=previous)


def save_newest(path: Path, parts: dict[str, Any], **about: Any) -> None:
    """As :func:`save`, and keeps the checkpoint that it replaces as ``checkpoint_previous.pth``."""
    save(path, parts, **about, previous=path.with_name(PREVIOUS))


def _what_fits(wanted: int, images: int, config: Config) -> str:
    """How many images a step takes here, and the flags with which as many processes take as many as wanted."""
    batch_size, accumulation_steps = config.training.batch_size, config.training.accumulation_steps
    processes = images // (batch_size * accumulation_steps)
    here = f"-b {batch_size}" + (f" --accumulation-steps {accumulation_steps}" if accumulation_steps > 1 else "")
    here = f"{processes} processes of {here} make {images}" if processes > 1 else f"{here} of one process make {images}"
    each, rest = divmod(wanted, processes)
    if rest:
        return f"{here}: the number of processes must divide {wanted}"
    fitting = max(size for size in range(1, batch_size + 1) if each % size == 0)
    flags = [f"-b {fitting}"] if fitting != batch_size else []
    if each // fitting != accumulation_steps:
        flags.append(f"--accumulation-steps {each // fitting}")
    return f"{here}: pass {' '.join(flags)}"


def _labels(content: dict[str, Any]) -> Labels:
    names, ids, num_classes = content["categories"], content["category_ids"], content["num_classes"]
    if type(num_classes) is not int or not 1 <= num_classes < 2**31:
        raise ValueError(f"num_classes must be a whole number of at least 1, got {shown(num_classes)}")
    for entry, values, kind in (("categories", names, str), ("category_ids", ids, int)):
        if not isinstance(values, dict):
            raise ValueError(f"{entry} must be a dict, got {shown(values)}")
        for label, value in values.items():
            if type(label) is not int or not 0 < label < num_classes or type(value) is not kind:
                raise ValueError(
                    f"{entry} must have a {kind.__name__} for labels from 1 to {num_classes - 1}, got "
                    f"{shown(label)}: {shown(value)}"
                )
    if names.keys() != ids.keys() or len(set(ids.values())) < len(ids):
        raise ValueError("category_ids must have an id of its own for each of the categories")
    return Labels(names, ids, num_classes)


def _check_fault(fault: Any, num_classes: int) -> None:
    kinds = {"cause": str, "rank": int, "images": list, "targets": list}
    if not isinstance(fault, dict) or any(type(fault.get(name)) is not kind for name, kind in kinds.items()):
        raise ValueError(f"fault must have {', '.join(kinds)}, got {shown(fault)}")
    if not 1 <= len(fault["images"]) == len(fault["targets"]):
        raise ValueError("fault must have a target for each of its images")
    for i, (image, target) in enumerate(zip(fault["images"], fault["targets"], strict=True)):
        if not isinstance(target, dict) or type(target.get("image_id")) is not int:
            raise ValueError(f"fault must have a target with an image_id at {i}, got {shown(target)}")
        boxes: Any = target.get("boxes")
        labels: Any = target.get("labels")
        if not all(map(is_plain, (image, boxes, labels))):
            raise ValueError(f"fault must have tensors of an image, its boxes and its labels at {i}")
        shapes = (image.dim(), image.shape[:1], boxes.shape, labels.dim())
        types = (image.dtype, boxes.dtype, labels.dtype)
        if shapes != (3, (3,), (labels.numel(), 4), 1) or types != (torch.float32, torch.float32, torch.int64):
            raise ValueError(f"fault has an image of {list(image.shape)} and boxes of {list(boxes.shape)} at {i}")
        if ((labels < 1) | (labels >= num_classes)).any():
            raise ValueError(f"fault has labels beyond its classes at {i}")
        proposals: Any = target.get("proposals", boxes)  # of a Fast R-CNN
        if not is_plain(proposals) or proposals.dtype != torch.float32 or proposals.shape[1:] != (4,):
            raise ValueError(f"fault has proposals that are no boxes at {i}")


def set_norm_eps(model: nn.Module, eps: float) -> None:
    """Gives an epsilon to all batch norm whose statistics are frozen."""
    for module in model.modules():
        if isinstance(module, _FROZEN_NORMS):
            module.eps = eps


def _norm_eps(parts: dict[str, Any]) -> float:
    modules = (module for part in parts.values() if isinstance(part, nn.Module) for module in part.modules())
    return next((module.eps for module in modules if isinstance(module, _FROZEN_NORMS)), NORM_EPS)


def _config(source: str, plain: Any) -> Config:
    if not isinstance(plain, dict):
        raise UserError(f"{source}: its settings cannot be read: they are {shown(plain)}, not a dict")
    known = setting_fields()
    for name in plain:
        if name not in known:
            raise UserError(f"{source}: made by a version that has a setting {shown(name)}, which this one has not")
    paths = {name for name, setting in known.items() if setting.metadata["arguments"].get("type") is Path}
    try:
        return Config.of({k: Path(v) if k in paths and isinstance(v, str) else v for k, v in plain.items()})
    except ValueError as error:
        raise UserError(f"{source}: its settings cannot be read: {error}") from None
