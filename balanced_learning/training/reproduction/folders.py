"""What the folder of a run tells: how far it is, with which settings, and what came out."""

import json
import math
import os
from pathlib import Path
from typing import Any

from balanced_learning.training.checkpoint import NEWEST, PREVIOUS
from balanced_learning.training.config import setting_fields
from balanced_learning.training.errors import UserError, shown
from balanced_learning.training.files import write_text
from balanced_learning.training.flags import as_typed
from balanced_learning.training.reproduction.plan import Job, maker_file, read_maker
from balanced_learning.training.run import epochs_since_best

# Settings that change no result, or only in its rounding. Of the batch, the images of a step count.
FREE = {
    *("device", "workers", "max_unreadable", "strict_data", "max_skipped_steps", "output_dir", "resume", "dist_url"),
    *("checkpoint_steps", "checkpoint_minutes", "print_freq", "tensorboard", "coco_backend", "dump_proposals"),
    *("eval_interval", "channels_last", "compile", "use_deterministic_algorithms", "batch_size", "accumulation_steps"),
}
_COUNTS = ("epochs", "batch_size", "accumulation_steps", "world_size")
_PATHS = ("data_path", "proposals")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the epochs of a run; none where there is no run.

    Raises:
        UserError: for a file that holds something else.
    """
    file = folder / "metrics.jsonl"
    rows = [_parsed(file, line) for line in _text(file).splitlines()]
    for row in rows:
        if not isinstance(row, dict) or type(row.get("epoch")) is not int:
            raise UserError(f"{file}: a line must be the row of an epoch, got {shown(row)}")
    return rows


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run, and what it ran with; none where there is no run.

    Raises:
        UserError: for a file that holds something else.
    """
    file = folder / "args.json"
    text = _text(file)
    content = _parsed(file, text) if text else {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: must have settings by name, got {shown(content)}")
    for name in (*_COUNTS, "patience") if content else ():
        if type(content.get(name)) is not int and not (name == "patience" and content.get(name) is None):
            raise UserError(f"{file}: {name} must be a whole number, got {shown(content.get(name))}")
    return content


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def _parsed(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: is no JSON ({error})") from None


def is_finished(job: Job) -> bool:
    """Whether there is nothing left to do for a job, whatever settings that was done with."""
    return has_finished(job.folder) if job.dumps is None else read_maker(job.dumps) is not None


def has_finished(folder: Path) -> bool:
    """Whether the run of a folder is over."""
    rows, there = read_rows(folder), read_settings(folder)
    if not rows or not there:
        return False
    patience, waited = there.get("patience"), epochs_since_best(rows)
    is_patience_over = patience is not None and waited is not None and waited >= patience
    return is_patience_over or rows[-1]["epoch"] + 1 >= there.get("epochs", math.inf)


def check_settings(job: Job) -> None:
    """Keeps what was done with other settings from being taken for a job, or gone on with.

    Raises:
        UserError: if there is such a thing; names the setting and the place.
    """
    if told := difference(job):
        raise UserError(f"{job.dumps or job.folder}: {told}; name another --output-dir, or remove it")


def difference(job: Job) -> str | None:
    """The first setting of what is there already that is not as the job has it, in words."""
    if job.dumps:
        there = read_maker(job.dumps) or {}
    else:
        has_begun = is_finished(job) or any((job.folder / name).exists() for name in (NEWEST, PREVIOUS))
        there = read_settings(job.folder) if has_begun else {}
    if not there:
        return None
    images = there["batch_size"] * there["accumulation_steps"] * there["world_size"]
    if images != job.images_per_step:  # before the learning rate, which follows from it
        return f"was made with {images} images a step, not {job.images_per_step}"
    here = json.loads(json.dumps(job.config.plain()))
    for name in (name for name in here if name not in FREE):
        before = there.get(name, setting_fields()[name].default)
        is_path = name in _PATHS and before and here[name]
        if not (_is_same_place(before, here[name], there, here) if is_path else before == here[name]):
            return f"was made with {as_typed(name, before)}, and is asked for with {as_typed(name, here[name])}"
    return None


def _is_same_place(before: str, here: str, there: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether two paths are one, or lie in the same place beside a folder of runs that was moved."""
    seen = [os.path.relpath(path, of["output_dir"]) for path, of in ((before, there), (here, settings))]
    return os.path.realpath(before) == os.path.realpath(here) or seen[0] == seen[1]


def note_maker(job: Job) -> None:
    """Notes which RPN is about to make proposals. They get their name when all of them are there."""
    if job.dumps:
        write_text(maker_file(job.dumps), json.dumps(read_settings(job.folder), indent=2) + "\n")
