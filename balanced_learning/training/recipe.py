"""Recipes: settings as data, a TOML file each, the library's in ``recipes/``."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from balanced_learning.training.config import Config, setting_fields
from balanced_learning.training.errors import UserError, shown
from balanced_learning.training.flags import as_flag, given_settings, make_parser
from balanced_learning.training.opening import open_file

_KEYS = ("base", "about", "note")


@dataclass(frozen=True)
class Recipe:
    """The settings of a recipe, those of its base included.

    Attributes:
        settings: by their names.
        about: the recipe in a line; a recipe without it is a base for others.
        note: what whoever uses it must know.
    """

    settings: dict[str, Any]
    about: str = ""
    note: str = ""

    @classmethod
    def read(cls, name: str) -> "Recipe":
        """Reads a recipe of the library, by its name, or a TOML file.

        Its tables are those of :class:`~balanced_learning.training.config.Config`, and its values are checked as flags
        are. The key ``base`` names another recipe, or a file beside it, whose settings it takes over.

        Raises:
            UserError: for an unknown name, a file that is no recipe, a key, table or setting that does not exist, a bad
                value, and for bases that lead in a circle.
        """
        return _read(name, ())


def list_recipes() -> str:
    """A line for each recipe of the library, but for those that are only a base for others."""
    abouts = {name: Recipe.read(name).about for name in sorted(_library())}
    width = max(map(len, abouts))
    return "\n".join(f"{name:{width}}  {about}" for name, about in abouts.items() if about)


def _read(name: str, above: tuple[str, ...]) -> Recipe:
    source = f"--recipe {name}"
    if name in above:
        raise UserError(f"{source}: its bases lead in a circle, {' > '.join([*above, name])}")
    content = _content(name, source)
    texts = {key: content.pop(key) for key in _KEYS if key in content}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{source}: {key} must be a text, got {shown(text)}")
    base = Recipe({})
    if "base" in texts:
        own, beside = _library(), Path(name).parent / texts["base"]
        is_beside = name not in own and texts["base"] not in own
        base = _read(str(beside) if is_beside else texts["base"], (*above, name))
    return Recipe(base.settings | _settings(content, source), texts.get("about", ""), texts.get("note", base.note))


def _content(name: str, source: str) -> dict[str, Any]:
    own = _library()
    try:
        if name in own:
            text = own[name].read_text(encoding="utf-8")
        else:
            with open_file(Path(name)) as file:
                text = file.read().decode()
        return tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"{source}: no such file, nor a recipe that --list-recipes lists") from None
    except (OSError, RecursionError, ValueError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None


def _library() -> dict[str, Any]:
    """The files of the library's recipes by their names, such as ``paper/rpn_r50_1x``."""

    def walk(folder: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for entry in folder.iterdir():
            if entry.is_dir():
                yield from walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".toml"):
                yield prefix + entry.name.removesuffix(".toml"), entry

    return dict(walk(resources.files("balanced_learning.training") / "recipes", ""))


def _settings(content: dict[str, Any], source: str) -> dict[str, Any]:
    parser = make_parser()

    def refuse(message: str) -> None:
        raise UserError(f"{source}: {message}")

    parser.error = refuse  # type: ignore[method-assign,assignment]
    words = [word for table, values in content.items() for word in _table_as_flags(source, table, values)]
    return given_settings(parser.parse_args(words))


def _table_as_flags(source: str, table: str, values: Any) -> list[str]:
    groups = {group.name: {each.name for each in fields(group.type)} for group in fields(Config)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise UserError(f"{source}: {table!r} is none of its keys, {', '.join(_KEYS)}, and no table")
    if table not in groups:
        raise UserError(f"{source}: {table!r} is none of its tables, {', '.join(groups)}")
    words: list[str] = []
    for key, value in values.items():
        if key not in groups[table]:
            raise UserError(f"{source}: [{table}] has no setting {key!r}")
        setting = setting_fields()[key]
        is_switch = isinstance(setting.default, bool)
        takes_list = setting.metadata["arguments"].get("nargs") == "*"
        if isinstance(value, bool) != is_switch or isinstance(value, list) != takes_list:
            wanted = "true or false" if is_switch else "a list" if takes_list else "one value"
            raise UserError(f"{source}: [{table}] {key} must be {wanted}, got {value!r}")
        if any(isinstance(each, str) and each.startswith("-") for each in (value if takes_list else [value])):
            raise UserError(f"{source}: [{table}] {key} must not be a flag, got {value!r}")
        words += as_flag(key, value)
    return words
