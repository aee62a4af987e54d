"""The tables as data: what each row trains, and what was published of it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from balanced_learning.training.errors import UserError
from balanced_learning.training.recipe import Recipe

NUMBERS = {"paper": (1, 2, 3, 4, 5, 6), "modern": (1, 3)}  # of the tables, by family of recipes
STUDY = "study"  # the table, and its family: each part alone, on any data, of which nothing is published


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: without spaces, for the command line.
        label: as in the table.
        recipe: what it trains.
        published: by metric, in percent; of the study there is nothing.
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
        number: in the paper, or ``"study"``.
        family: of recipes, ``"paper"``, ``"modern"`` or ``"study"``.
        title: what it is about.
        split: of the data, that the published numbers are of.
        metrics: that are measured, named as in ``metrics.jsonl``.
        notes: what is not as in the paper.
        rows: from the top.
    """

    number: int | str
    family: str
    title: str
    split: str
    metrics: tuple[str, ...]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def stem(self) -> str:
        """The name of its files, without their endings."""
        return f"table_{self.number}" + (f"_{self.family}" if self.family == "modern" else "")


def read_table(number: int | str, family: str = "paper") -> Table:
    """Reads a table of a family of recipes by its number in the paper, or the study.

    Raises:
        UserError: for one that the family does not have.
    """
    stem = f"{family}_{number}"
    if number == STUDY and family == "paper":  # by default
        family = stem = STUDY
    elif number not in NUMBERS[family]:
        has = " and ".join(map(str, NUMBERS[family]))
        raise UserError(f"--table {number}: of the {family} family there are {has} alone")
    file = resources.files("balanced_learning.training.reproduction") / "tables" / f"{stem}.toml"
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    metrics, notes = tuple(content["metrics"]), tuple(content["notes"])
    published = content.get("published_metrics", metrics)
    rows = tuple(_read_row(row, published) for row in content["rows"])
    return Table(number, family, content["title"], content["split"], metrics, notes, rows)


def _read_row(row: dict[str, Any], metrics: Sequence[str]) -> Row:
    recipe = Recipe.read(row["recipe"])
    return Row(
        name=row["name"],
        label=row["label"],
        recipe=row["recipe"],
        published=dict(zip(metrics, row["published"], strict=True)) if "published" in row else {},
        baseline=row.get("baseline"),
        takes_proposals=recipe.settings.get("model") == "libra_fastrcnn",
        note=recipe.note,
    )
