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


def write_config(path: Path, config: Config) -> None:
    """Writes the settings of a run, its command, and the versions that it runs with."""
    values = config.plain() | {
        "world_size": distributed.world_size(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": backend_info(),
        "threads": torch.get_num_threads(),
    }
    path.write_text(json.dumps(values, indent=2) + "\n")


def write_row(path: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Appends the row of an epoch, in place of one of the same or a later epoch, and returns all rows."""
    rows = [r for r in read_rows(path) if r["epoch"] < row["epoch"]]
    rows.append(row)
    _write_rows(path, rows)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def continue_rows(path: Path, before: Path, epoch: int) -> None:
    """Begins the rows of a run that goes on in another folder with those of ``before``, up to the epoch."""
    if path != before and not path.exists():
        _write_rows(path, [row for row in read_rows(before) if row["epoch"] <= epoch])


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_whole(path: Path, text: str) -> None:
    """Writes beside the file, then renames it, so that it is never half written."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def is_best(rows: list[dict[str, Any]]) -> bool:
    """Whether the last of the rows has a higher AP than all before it."""
    *before, last = [row.get("AP") for row in rows]
    return last is not None and all(ap is None or ap < last for ap in before)
