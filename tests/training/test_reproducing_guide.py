"""The guide to the paper's tables: its commands, its settings and its numbers are those of the recipes and tables."""

import re
import shlex
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from balanced_learning.training.config import Config
from balanced_learning.training.data.proposals import row_type
from balanced_learning.training.recipe import Recipe
from balanced_learning.training.reproduction.plan import make_plan
from balanced_learning.training.reproduction.published import read_table
from examples import reproduce

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "reproducing.md").read_text()
RECIPE_OF = {  # whose settings the rows of the table of families have
    "all": "faster_rcnn_r50_1x",
    "Faster R-CNN": "faster_rcnn_r50_1x",
    "Libra R-CNN": "libra_faster_rcnn_r50_1x",
    "Fast R-CNN": "fast_rcnn_r50_1x",
    "RPN": "rpn_r50_1x",
    "RetinaNet": "retinanet_r50_1x",
    "Libra RetinaNet": "libra_retinanet_r50_1x",
}


def rows_of_families() -> list[tuple[str, str, str, str]]:
    """Of each cell: the recipe, or none, the setting, and the cell with its value, or none where it has words alone."""
    found, recipe = [], ""
    table = re.search(r"^\| of \| .*?\n\n", GUIDE, re.DOTALL | re.MULTILINE)[0]
    for line in table.strip().splitlines()[2:]:
        of, _, flag, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        recipe = RECIPE_OF[of] if of else recipe
        name = flag.strip("`-").replace("-", "_")
        for prefix, cell in zip((f"paper/{recipe}", f"modern/{recipe}", ""), cells, strict=True):
            found.append((prefix, name, cell, cell.split("`")[1] if cell.startswith("`") else ""))
    return found


@pytest.mark.parametrize(("recipe", "name", "cell", "value"), rows_of_families())
def test_it_tells_what_recipes_set(recipe, name, cell, value):
    defaults = Config().values()
    setting = (defaults | (Recipe.read(recipe).settings if recipe else {}))[name]
    if not value:  # the detector's own, in words
        assert setting is None, cell
    elif isinstance(setting, bool):
        assert setting == {"on": True, "off": False}[value]
    elif isinstance(setting, int | float):
        assert setting == pytest.approx(float(Fraction(value)))
    else:
        assert setting == value


def test_it_has_the_published_gains():
    rows = {row.name: row.published["AP"] for row in read_table(1).rows}
    modern = {row.name: row.published["AP"] for row in read_table(1, "modern").rows}
    pairs = re.findall(r"\| (\d\d\.\d) \| (\d\d\.\d) \| (\d\.\d)", GUIDE)
    assert len(pairs) == 6
    for plain, libra, gain in pairs:
        assert round(float(libra) - float(plain), 1) == float(gain)
    names = [("faster_rcnn_r50_1x", "libra_rcnn_r50_1x"), ("retinanet_r50_1x", "libra_retinanet_r50_1x")]
    for published, place in ((rows, 0), (modern, 4)):
        assert [tuple(map(float, pair[:2])) for pair in pairs[place : place + 2]] == [
            tuple(published[name] for name in pair) for pair in names
        ]


def test_it_has_a_recipe(tmp_path):
    (tmp_path / "mine.toml").write_text(re.search(r"```toml\n(.*?)```", GUIDE, re.DOTALL)[1])
    recipe = Recipe.read(f"{tmp_path / 'mine.toml'}")
    assert recipe.settings == Recipe.read("paper/libra_faster_rcnn_r50_1x").settings | {
        "num_bins": 5,
        "refine": "conv",
    }


def test_it_reads_proposals(tmp_path, monkeypatch):
    rows = np.zeros(3, row_type(4))
    rows["split"], rows["count"] = (0, 0, 1), 2
    rows["boxes"][0, :2] = [[1, 2, 3, 4], [5, 6, 7, 8]]
    monkeypatch.chdir(tmp_path)
    np.save("proposals.npy", rows)
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)[1], names)  # noqa: S102
    assert names["boxes"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert len(names["scores"]) == 2
    assert names["of_training"].tolist() == [True, True, False]
    assert [row_type(places).itemsize for places in (1, 2)] == [16 + 20, 16 + 40]
    assert f"{123_287 * row_type(2000).itemsize / 1e9:.1f} GB" in GUIDE


def test_it_calls_the_program_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [GUIDE, *((ROOT / name).read_text() for name in ("README.md", "docs/does_it_help.md"))]
    commands = [command for text in texts for command in re.findall(r"examples/reproduce\.py (--.*)", text)]
    assert len(commands) >= 7
    for command in commands:
        assert make_plan(reproduce.read_request(reproduce.read_arguments(shlex.split(command, comments=True)))).jobs


def test_recipes_that_are_named_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"\b(?:paper|modern)/\w[\w.]*\w", page.read_text()):
            assert Recipe.read(name).about, page
