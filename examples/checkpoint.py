"""Checkpoints: plain tensors and numbers, written whole or not at all, and refused by name when they do not fit."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from errors import UserError


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes beside the file, then renames: the last checkpoint survives a full disk or a killed process."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    os.replace(unfinished, path)


def read(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint and compares what it says of its model with ``expected``."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint ({(str(error) or type(error).__name__).splitlines()[0]})") from None
    if not isinstance(content, dict) or not {"model", "optimizer", "scheduler", "epoch", "is_for"} <= content.keys():
        raise UserError(f"{path}: not a checkpoint of this script")
    for name, value in expected.items():
        if content["is_for"].get(name) != value:
            raise UserError(
                f"{path}: a checkpoint of another model: {name} is {content['is_for'].get(name)} there and {value} here"
            )
    return content
