"""The last words of a run: what came out, and what to do with it."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from balanced_learning.training.config import Config


def next_steps(config: Config, rows: list[dict[str, Any]], programs: Path, images: Path) -> str:
    """What the best epoch reached and where to look at it, then commands to go on with.

    Args:
        config: the settings of the run.
        rows: the metrics of its epochs.
        programs: the folder of the programs.
        images: the folder of images to detect in.
    """
    folder = config.run.output_dir
    scored = [row for row in rows if row.get("AP") is not None]
    checkpoint = folder / ("checkpoint_best.pth" if scored else "checkpoint.pth")
    best = max(scored, key=lambda row: row["AP"], default=rows[-1])
    reached = ", ".join(f"{name} {100 * best[name]:.1f}" for name in ("AP", "AP50") if best.get(name) is not None)
    pictures = f"{folder / 'curves.png'} and evaluation_{best['epoch']:02}.png"
    commands = {"to detect in images": ("predict.py", checkpoint, images)}
    if config.model.sampler and config.model.model == "libra_fasterrcnn":
        commands["to see what is sampled"] = ("plot_sampling.py", "--resume", checkpoint)
    if config.model.pyramid:
        commands["to see what the pyramid adds"] = ("plot_pyramid.py", "--resume", checkpoint)
    if config.data.data_path is None:
        commands["to train on your own data"] = (
            "train_torchvision_libra.py",
            "--recipe",
            "shapes",
            "--data-path",
            "FOLDER",
        )
    width = max(map(len, commands)) + 1
    lines = [f"done: {reached or 'not evaluated'} after epoch {best['epoch']}; look at {pictures}"]
    lines += [f"{title + ':':{width}} {_as_typed(programs, *words)}" for title, words in commands.items()]
    return "\n".join(lines)


def _as_typed(programs: Path, program: str, *words: object) -> str:
    return shlex.join([_short(sys.executable), _short(programs / program), *map(str, words)])


def _short(path: str | Path) -> str:
    """The path from the current folder, if it is below."""
    relative = os.path.relpath(path)
    return f"{path}" if relative.startswith("..") else relative
