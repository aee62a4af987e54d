"""The last words of a run: what came out, and what to do with it."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from balanced_learning.training.checkpoint import BEST, NEWEST
from balanced_learning.training.config import Config
from balanced_learning.training.evaluation import key_metric


def next_steps(config: Config, rows: list[dict[str, Any]], programs: Path, images: Path) -> str:
    """Says what the best epoch reached and where to look at it, then commands to go on with.

    Args:
        config: the settings of the run.
        rows: the metrics of its epochs.
        programs: the folder of the programs.
        images: the folder of images to detect in.
    """
    folder = config.run.output_dir
    checkpoint, row = folder / NEWEST, rows[-1]
    if (folder / BEST).exists():  # not where a run went on in a new folder and grew no better
        checkpoint = folder / BEST
        key = key_metric(row)
        row = max((row for row in rows if row.get(key) is not None), key=lambda row: row[key])
    names = dict.fromkeys([key_metric(row), "AP", "AP50"])
    reached = ", ".join(f"{name} {100 * row[name]:.1f}" for name in names if row.get(name) is not None)
    pictures = f"{folder / 'curves.png'} and evaluation_{row['epoch']:02}.png"
    commands: dict[str, list[str | Path]] = {}
    model = config.model
    if not model.is_fast_rcnn:
        commands["to detect in images"] = ["predict.py", checkpoint, images]
    if model.is_rpn:
        flags: list[str | Path] = ["--resume", checkpoint, "--dump-proposals", folder / "proposals.npy"]
        commands["to write its proposals for Fast R-CNN"] = ["train_torchvision_libra.py", *flags]
    if not (model.is_rpn or model.is_fast_rcnn):
        commands["to learn which part can help"] = ["imbalance_report.py", "--resume", checkpoint]
    if model.sampler and not (model.is_rpn or model.is_retinanet):
        commands["to see what is sampled"] = ["plot_sampling.py", "--resume", checkpoint]
    if model.pyramid:
        commands["to see what the pyramid adds"] = ["plot_pyramid.py", "--resume", checkpoint]
    if config.data.data_path is None:
        flags = ["--recipe", "shapes", "--data-path", "FOLDER"]
        commands["to train on your own data"] = ["train_torchvision_libra.py", *flags]
    width = max(map(len, commands), default=0) + 1
    lines = [f"done: {reached or 'not evaluated'} after epoch {row['epoch']}; look at {pictures}"]
    lines += [f"{title + ':':{width}} {_as_typed(programs, words)}" for title, words in commands.items()]
    return "\n".join(lines)


def _as_typed(programs: Path, words: list[str | Path]) -> str:
    program, *words = words
    return shlex.join([_short(sys.executable), _short(programs / program), *map(str, words)])


def _short(path: str | Path) -> str:
    """The path from the current folder, if it is below."""
    relative = os.path.relpath(path)
    return f"{path}" if relative.startswith("..") else relative
