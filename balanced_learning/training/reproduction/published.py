"""The tables as data: what each row trains, and what was published of it."""

import math
import sys
from dataclasses import dataclass
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from balanced_learning.training.errors import UserError, shown
from balanced_learning.training.recipe import Recipe

NUMBERS = {"paper": (1, 2, 3, 4, 5, 6), "modern": (1, 3)}  # of the tables, by family of recipes

_TEXTS, _LISTS = {"title", "split"}, {"metrics", "notes", "rows"}
_ROW_TEXTS = {"name", "label", "recipe"}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: without spaces, for the command line.
        label: as in the table.
        recipe: what it trains.
        published: by metric, in percent.
        baseline: the row that it is compared with, if any.
        takes_proposals: whether its detector is the second stage alone.
        note: that of the recipe, if any.
    """

    name: str
    label: str
    recipe: str
    published: dict[str, float]
    baseline: str | None
    takes_proposals: bool
    note: str


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        number: in the paper.
        family: of recipes, ``"paper"`` or ``"modern"``.
        title: what it is about.
        split: of COCO, that the published numbers are of.
        metrics: that are measured, named as in ``metrics.jsonl``.
        notes: what is not as in the paper.
        rows: from the top.
    """

    number: int
    family: str
    title: str
    split: str
    metrics: tuple[str, ...]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def stem(self) -> str:
        """The name of its files, without their endings."""
        return f"table_{self.number}" + ("" if self.family == "paper" else f"_{self.family}")


def read_table(number: int, family: str = "paper", folder: Any = None) -> Table:
    """Reads a table of the library, or of another folder.

    Raises:
        UserError: for a table that there is not or that is none, with its first fault by name.
    """
    if number not in NUMBERS[family]:
        has = " and ".join(map(str, NUMBERS[family]))
        raise UserError(f"--table {number}: of the {family} family there are {has} alone")
    file = f"{family}_{number}.toml"
    folder = folder or resources.files("balanced_learning.training.reproduction") / "tables"
    try:
        content = tomllib.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    _check_keys(file, content, _TEXTS | _LISTS, {"published_metrics"})
    for key in _TEXTS:
        _check_text(file, key, content[key])
    for key in (_LISTS & content.keys()) | ({"published_metrics"} & content.keys()):
        if not isinstance(content[key], list):
            raise UserError(f"{file}: {key} must be a list, got {shown(content[key])}")
    metrics, notes = tuple(content["metrics"]), tuple(content["notes"])
    for key, texts in (("metrics", metrics), ("notes", notes)):
        for text in texts:
            _check_text(file, key, text)
    published = content.get("published_metrics", content["metrics"])
    if odd := [name for name in published if name not in metrics]:
        raise UserError(f"{file}: published_metrics: {shown(odd[0])} is none of the metrics")
    rows: list[Row] = []
    for each in content["rows"]:
        rows.append(_read_row(file, each, published, [row.name for row in rows]))
    _check_baselines(file, rows)
    return Table(number, family, content["title"], content["split"], metrics, notes, tuple(rows))


def _read_row(file: str, content: Any, metrics: list[str], before: list[str]) -> Row:
    if not isinstance(content, dict):
        raise UserError(f"{file}: a row must be a table, got {shown(content)}")
    at = f"{file}: row {shown(content.get('name'))}"
    _check_keys(at, content, _ROW_TEXTS | {"published"}, {"baseline"})
    for key in (*_ROW_TEXTS, *({"baseline"} & content.keys())):
        _check_text(at, key, content[key])
    if content["name"] in before or len(content["name"].split()) != 1:
        raise UserError(f"{at}: name must be a word that no other row has")
    values = content["published"]
    if not isinstance(values, list) or len(values) != len(metrics):
        raise UserError(f"{at}: published must be {len(metrics)} numbers ({', '.join(metrics)}), got {shown(values)}")
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"{at}: published must be numbers, got {shown(value)}")
    try:
        recipe = Recipe.read(content["recipe"])
    except UserError as error:
        raise UserError(f"{at}: {error}") from None
    published = dict(zip(metrics, map(float, values), strict=True))
    return Row(
        name=content["name"],
        label=content["label"],
        recipe=content["recipe"],
        published=published,
        baseline=content.get("baseline"),
        takes_proposals=recipe.settings.get("model") == "libra_fastrcnn",
        note=recipe.note,
    )


def _check_keys(at: str, content: dict[str, Any], needed: set[str], optional: set[str]) -> None:
    if unknown := sorted(content.keys() - needed - optional):
        raise UserError(f"{at}: there is no key {shown(unknown[0])}")
    if missing := sorted(needed - content.keys()):
        raise UserError(f"{at}: {missing[0]} is missing")


def _check_text(at: str, key: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{at}: {key} must be a text, got {shown(value)}")


def _check_baselines(file: str, rows: list[Row]) -> None:
    names = {row.name for row in rows}
    for row in rows:
        if row.baseline is not None and (row.baseline not in names or row.baseline == row.name):
            raise UserError(f"{file}: row {row.name!r}: baseline {row.baseline!r} is no other row")
