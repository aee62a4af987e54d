"""Checkpoints: plain tensors and numbers, written whole or not at all, and refused by name when they do not fit."""

import pickle
from pathlib import Path
from typing import Any

import torch

from errors import UserError


def save(path: Path, parts: dict[str, Any], epoch: int, made_for: dict[str, Any]) -> None:
    """Writes beside the file, then renames: the last checkpoint survives a full disk or a killed process.

    Args:
        path: of the checkpoint.
        parts: by name, what has a ``state_dict``: a model, an optimizer, ...
        epoch: the one just ended.
        made_for: plain values that whoever loads it must agree with.

    Raises:
        UserError: if it cannot be written.
    """
    unfinished = path.with_suffix(".unfinished")
    content = {name: part.state_dict() for name, part in parts.items()}
    try:
        torch.save({**content, "epoch": epoch, "made_for": made_for}, unfinished)
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error}); the last checkpoint is untouched") from None


def load(path: Path, parts: dict[str, Any], made_for: dict[str, Any]) -> int:
    """Loads the state of the parts and returns the epoch they are of.

    Raises:
        UserError: if the file is no checkpoint, or one that does not fit.
    """
    content = _read(path)
    if not isinstance(content, dict) or not {*parts, "epoch", "made_for"} <= content.keys():
        raise UserError(f"{path}: not a checkpoint of this script")
    for name, value in made_for.items():
        found = content["made_for"].get(name, False)  # a part that came later is off in older checkpoints
        if found != value:
            raise UserError(f"{path}: a checkpoint of another run: {name} is {found} there and {value} here")
    for name, part in parts.items():
        try:
            part.load_state_dict(content[name])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path}: does not fit the {name} that these options make, those of args.json do: {reason}"
            ) from None
    return content["epoch"]


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a checkpoint ({reason})") from None
