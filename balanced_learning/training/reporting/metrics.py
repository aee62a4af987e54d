"""``metrics.jsonl``, a row an epoch, and what else a run leaves as JSON."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from balanced_learning import backend_info
from balanced_learning.training import distributed
from balanced_learning.training.config import Config
from balanced_learning.training.errors import UserError, printable
from balanced_learning.training.files import reason_of, write_text
from balanced_learning.training.opening import open_file


def write_config(path: Path, config: Config) -> None:
    """Writes the settings of a run, its command, and the versions that it runs with."""
    values = config.plain() | {
        "world_size": distributed.world_size(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": backend_info(),
        "threads": torch.get_num_threads(),
    }
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows of all epochs."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of all epochs; none where there is no file.

    Raises:
        UserError: if the file cannot be read, or a line of it is no row.
    """
    try:
        with open_file(path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read ({reason_of(error)})") from None
    return [_row(path, number, line) for number, line in enumerate(lines, 1)]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (RecursionError, ValueError):
        row = None
    numbers = isinstance(row, dict) and all(value is None or type(value) in (int, float) for value in row.values())
    if not numbers or type(row.get("epoch")) is not int or row["epoch"] < 0:
        shown = printable(line[:60].decode(errors="replace"))
        raise UserError(f"{printable(path)}: line {number} is not the row of an epoch: {shown}")
    return row
