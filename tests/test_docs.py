"""The pages of docs/: their code runs, the API page is complete, their pictures are those that a command draws."""

import importlib
import re
from pathlib import Path
from runpy import run_path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "index.md", *sorted((DOCS / "components").glob("*.md"))]
OF_BENCHMARKS = {"study_curves.svg", "study_differences.svg", "imbalance_report.svg"}  # drawn from their results


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    names = {"__name__": page.stem}  # one program a page
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)  # noqa: S102


MODULES = ["balanced_learning", *(f"balanced_learning.{name}" for name in ("mmdet", "detection", "training"))]


@pytest.mark.parametrize("module", MODULES)
def test_the_api_page_has_every_public_name(module):
    text = (DOCS / "api.md").read_text()
    section = text.partition(f".. currentmodule:: {module}\n")[2].partition("\n## ")[0]
    names = re.findall(r"^\.\. auto\w+:: (\w+)$", section, re.MULTILINE)
    assert sorted(names) == sorted(importlib.import_module(module).__all__)


def test_every_source_of_the_comparison_is_named_once_and_used():
    comparison, _, sources = (DOCS / "survival.md").read_text().partition("## Where it was seen")
    named = re.findall(r"^\| ([a-z]\d) \|", sources, re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == set(re.findall(r"\[([a-z]\d)\]", comparison))


def test_the_pictures_are_those_that_a_command_draws(tmp_path):
    run_path(str(DOCS / "pictures.py"))["main"](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "images").iterdir()} - OF_BENCHMARKS
    assert drawn == {name for page in PAGES for name in re.findall(r"\]\(\.\./images/([^)]+)\)", page.read_text())}
