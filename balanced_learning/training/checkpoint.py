"""Checkpoints that explain themselves: plain tensors and numbers, written whole or not at all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from balanced_learning import backend_info
from balanced_learning.training import distributed
from balanced_learning.training.config import Config, setting_fields
from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError
from balanced_learning.training.state_dicts import read_tensors

NORM_EPS = 1e-5  # torchvision's default of frozen batch norm
_TYPES = {"epoch": int, "iterations": int, "categories": dict, "category_ids": dict, "num_classes": int}
_KEYS = {"model", "config", "versions", *_TYPES}


@dataclass(frozen=True)
class Checkpoint:
    """A run after an epoch.

    Attributes:
        path: the file.
        config: the settings of the run.
        labels: of its model.
        epoch: the one just ended.
        iterations: of an epoch, on each process.
        norm_eps: epsilon of the model's frozen batch norm, which follows from the weights that it started from.
        states: by name, the state of the model, the optimizer, ...
    """

    path: Path
    config: Config
    labels: Labels
    epoch: int
    iterations: int
    norm_eps: float
    states: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Reads a checkpoint.

        Raises:
            UserError: if the file cannot be read or is no checkpoint of these programs.
        """
        content = read_tensors(path, str(path))
        if not cls.is_one(content):
            raise UserError(f"{path}: not a checkpoint of these programs")
        return cls.of(path, content)

    @staticmethod
    def is_one(content: Any) -> bool:
        """Whether the content of a file is a checkpoint of these programs."""
        return isinstance(content, dict) and content.keys() >= _KEYS

    @classmethod
    def of(cls, path: Path, content: dict[str, Any]) -> "Checkpoint":
        """The checkpoint with this content.

        Raises:
            UserError: if its settings or another entry cannot be read.
        """
        try:
            config = _config(path, content["config"])
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{path}: its settings cannot be read ({error})") from None
        # Earlier versions did not save norm_eps, and had no other weights of detectors than torchvision's.
        content = {"norm_eps": 0.0 if config.model.weights else NORM_EPS, **content}
        for name, expected in {**_TYPES, "norm_eps": float}.items():
            if not isinstance(content[name], expected):
                raise UserError(f"{path}: its {name} cannot be read: {content[name]!r:.60}")
        labels = Labels(content["categories"], content["category_ids"], content["num_classes"])
        states = {name: state for name, state in content.items() if name not in _KEYS - {"model"} | {"norm_eps"}}
        return cls(path, config, labels, content["epoch"], content["iterations"], content["norm_eps"], states)

    def restore(self, parts: dict[str, Any]) -> None:
        """Loads the states of the parts by their names.

        Raises:
            UserError: if there is none of that name, or one that does not fit.
        """
        for name, part in parts.items():
            try:
                part.load_state_dict(self.states[name])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{self.path}: does not fit the {name} that its own settings make: {reason}") from None

    def check_data(self, split: Split, iterations: int | None) -> None:
        """Compares the data of the run with those of another one.

        Args:
            split: the images to train on.
            iterations: of an epoch, on each process; ``None`` where nothing is trained.

        Raises:
            UserError: if the categories or the iterations are not the same.
        """
        self.labels.check(split, self.path)
        if iterations not in (None, self.iterations):
            raise UserError(
                f"{self.path}: an epoch had {self.iterations} iterations, not {iterations}: the images to train on or "
                "the number of processes (torchrun --nproc-per-node) are not the same"
            )


def save(path: Path, parts: dict[str, Any], *, config: Config, labels: Labels, epoch: int, iterations: int) -> None:
    """Writes a checkpoint beside the file, then renames it: the last one survives a full disk or a killed process.

    Args:
        path: of the checkpoint.
        parts: by name, what has a ``state_dict``: a model, an optimizer, ...
        config, labels, epoch, iterations: see :class:`Checkpoint`.

    Raises:
        UserError: if it cannot be written.
    """
    content = {
        **{name: part.state_dict() for name, part in parts.items()},
        "epoch": epoch,
        "iterations": iterations,
        "config": config.plain(),
        "categories": labels.names,
        "category_ids": labels.category_ids,
        "num_classes": labels.num_classes,
        "norm_eps": _norm_eps(parts),
        "versions": backend_info(),
    }
    unfinished = path.with_suffix(".unfinished")
    try:
        torch.save(content, unfinished)
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); the last checkpoint is untouched") from None


def make_folder(folder: Path) -> None:
    """Makes an output folder.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be written ({error.strerror})") from None


def prepare_folder(config: Config, checkpoint: Checkpoint | None) -> None:
    """Makes the output folder, in the main process.

    Raises:
        UserError: if it cannot be written, or holds the checkpoint of another run than that of ``checkpoint``, or of a
            later epoch.
    """
    if not distributed.is_main():
        return
    folder = config.run.output_dir
    make_folder(folder)
    existing = folder / "checkpoint.pth"
    if not existing.exists() or config.run.test_only:
        return
    if checkpoint is None or checkpoint.path.resolve().parent != folder.resolve():
        raise UserError(f"--output-dir {folder}: holds {existing.name}; --resume {existing}, or name another")
    if checkpoint.path.name != existing.name and Checkpoint.load(existing).epoch > checkpoint.epoch:
        raise UserError(f"--resume {checkpoint.path}: {existing} is of a later epoch; name another --output-dir")


def _norm_eps(parts: dict[str, Any]) -> float:
    modules = (module for part in parts.values() if isinstance(part, nn.Module) for module in part.modules())
    return next((module.eps for module in modules if isinstance(module, FrozenBatchNorm2d)), NORM_EPS)


def _config(path: Path, plain: dict[str, Any]) -> Config:
    known = setting_fields()
    for name in plain:
        if name not in known:
            raise UserError(f"{path}: made by a version that has a setting {name!r}, which this one has not")
    paths = {name for name, setting in known.items() if setting.metadata["arguments"].get("type") is Path}
    return Config.of({k: Path(v) if k in paths and v is not None else v for k, v in plain.items()})
