"""Whether a value is one that the flag of a setting could have made, for values that come from elsewhere."""

import argparse
from dataclasses import Field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from balanced_learning.training.errors import shown

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


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
