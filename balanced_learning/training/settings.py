"""A setting: a field of a configuration with the arguments of its flag, and the values that it takes."""

import argparse
import math
from collections.abc import Callable
from dataclasses import Field, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from balanced_learning.training.errors import shown

MODEL, COURSE, FREE = "model", "course", "free"

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def setting(default: Any, help: str, *aliases: str, binds: str = FREE, **arguments: Any) -> Any:
    """A field with a default, and the arguments of its flag beside those that follow from name and default.

    ``binds`` says which uses of a checkpoint it must agree with: ``MODEL`` settings decide what the weights mean,
    ``COURSE`` settings how the training goes on.
    """
    metadata = {"help": help, "aliases": aliases, "binds": binds, "arguments": arguments}
    return field(default=default, metadata=metadata)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """Returns a parser of finite numbers from ``low`` to ``high``."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"must be a {whole}number, got {text!r}") from None
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    return parse


positive, not_negative, amount, above_zero = number(int, 1), number(int, 0), number(float, 0), number(float, 1e-6)


def name_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


def flag_of(name: str) -> str:
    """The flag of a setting: ``--min-size`` of ``min_size``."""
    return f"--{name.replace('_', '-')}"


def check_value(setting: Field, value: Any) -> None:
    """Compares a value with the type of a setting, and with the choices and the bounds of its flag.

    Raises:
        ValueError: if it is another; names the setting.
    """
    if get_origin(setting.type) is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{setting.name} must be a list of whole numbers, got {shown(value)}")
        for each in value:
            _check_one(setting, get_args(setting.type)[0], each)
        return
    kinds = get_args(setting.type) or (setting.type,)
    if value is None and (setting.default is None or NoneType in kinds):
        return
    _check_one(setting, next(kind for kind in kinds if kind is not NoneType), value)


def _check_one(setting: Field, kind: Any, value: Any) -> None:
    arguments = setting.metadata["arguments"]
    of_kind = isinstance(value, Path) if kind is Path else type(value) in ({int, float} if kind is float else {kind})
    if not of_kind:
        raise ValueError(f"{setting.name} must be {_WORDS[kind]}, got {shown(value)}")
    if "choices" in arguments and value not in arguments["choices"]:
        raise ValueError(
            f"{setting.name} must be one of {', '.join(map(str, arguments['choices']))}, got {shown(value)}"
        )
    if kind in (str, Path) and "\0" in str(value):
        raise ValueError(f"{setting.name} must not have a zero byte in it, got {shown(str(value))}")
    if kind in (int, float) and "type" in arguments:
        try:
            arguments["type"](str(value))
        except (argparse.ArgumentTypeError, ValueError) as error:  # ValueError: more digits than Python reads
            raise ValueError(f"{setting.name} {error}") from None
