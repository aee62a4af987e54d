"""The options of the training program that a reproduction passes on, and the settings that follow from them."""

import os
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch

from balanced_learning.training.command_line import read_command_line
from balanced_learning.training.config import Config, images_per_step
from balanced_learning.training.errors import UserError
from balanced_learning.training.flags import make_parser
from balanced_learning.training.settings import flag_of

# Settings that this program decides, or that would make something else of a run than a row.
_OWN = {
    *("recipe", "list_recipes", "model", "seed", "data_path", "proposals", "dump_proposals", "output_dir", "resume"),
    *("start_epoch", "test_only", "check_data", "dry_run", "replay"),
}


def given_settings(options: Sequence[str]) -> dict[str, Any]:
    """The settings that options give, by name.

    Raises:
        UserError: for what the training program does not take.
    """
    return vars(_parser().parse_args(list(options)))


def checked_options(options: Sequence[str]) -> list[str]:
    """The options; of a small detector also its backbone, for which some rows have another one.

    Raises:
        UserError: for what the training program does not take, or what is not to be passed on.
    """
    given = given_settings(options)
    if own := sorted(_OWN & given.keys()):
        raise UserError(f"-- {flag_of(own[0])}: is not for this program to pass on; see its own options")
    return [*options, *(["--backbone", "resnet50"] if given.get("small") and "backbone" not in given else [])]


def count_gpus(options: Sequence[str]) -> int:
    """The processes of a run: one on each GPU, or one on another device."""
    device = given_settings(options).get("device", "auto")
    return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1


def settle(words: Sequence[str], processes: int) -> tuple[Config, int]:
    """The settings of a command line for so many processes, and the images of a step of all of them.

    Raises:
        UserError: for what cannot be.
    """
    with _announced(processes):
        with redirect_stderr(StringIO()):  # the program says it, too
            config, _ = read_command_line(_parser().parse_args(list(words)))
        return config, images_per_step(config)


def _parser() -> ArgumentParser:
    parser = make_parser()
    parser.error = _refuse  # type: ignore[method-assign,assignment]
    return parser


def _refuse(message: str) -> None:
    raise UserError(f"options of the training program, behind --: {message}")


@contextmanager
def _announced(processes: int) -> Iterator[None]:
    """Lets settings follow from the number of processes, as they will in each of them."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = f"{processes}"
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
        if before is not None:
            os.environ["WORLD_SIZE"] = before
