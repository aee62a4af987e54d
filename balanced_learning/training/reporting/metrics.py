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
from balanced_learning.training.files import write_text


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
