"""The flags of the settings: a parser of them, and values written as flags."""

import argparse
from dataclasses import Field, fields
from typing import Any

from balanced_learning.training.config import Config, setting_fields
from balanced_learning.training.settings import flag_of


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """A parser whose result holds only the flags that are given."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--recipe", metavar="NAME|FILE", help="settings in TOML, below the flags; without data: shapes")
    parser.add_argument("--list-recipes", action="store_true", help="print the names of the library's recipes, and end")
    for group in fields(Config):
        arguments = parser.add_argument_group(group.name)
        for setting in fields(group.type):  # type: ignore[arg-type]
            _add_flag(arguments, setting)
    return parser


def _add_flag(group: Any, setting: Field) -> None:
    aliases = setting.metadata["aliases"]
    flags = [*(a for a in aliases if len(a) == 2), flag_of(setting.name), *(a for a in aliases if len(a) > 2)]
    default = "" if setting.default is None else f" (default: {_shown(setting.default)})"
    arguments = {"dest": setting.name, "help": setting.metadata["help"] + default, **setting.metadata["arguments"]}
    if isinstance(setting.default, bool):
        arguments["action"] = argparse.BooleanOptionalAction
    group.add_argument(*flags, **arguments)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, tuple) else f"{default}"


def as_flag(name: str, value: Any) -> list[str]:
    """The words that give a setting this value on the command line."""
    if isinstance(setting_fields()[name].default, bool) and isinstance(value, bool):
        return [flag_of(name) if value else flag_of(name).replace("--", "--no-", 1)]
    values = value if isinstance(value, list | tuple) else [value]
    return [flag_of(name), *map(str, values)]


def as_typed(name: str, value: Any) -> str:
    """A setting as one would type it."""
    if value is None:
        return "--weights-backbone none" if name == "weights_backbone" else f"no {flag_of(name)}"
    return " ".join(as_flag(name, value))


def given_settings(given: argparse.Namespace) -> dict[str, Any]:
    """The settings among parsed flags, by name."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(given).items()
        if name in setting_fields()
    }
