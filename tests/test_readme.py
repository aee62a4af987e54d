"""What README and docs say, held against what it is about."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from options import _parser

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("case", ["shapes", "bccd"])
def test_figures_are_those_a_command_wrote(case):
    spec = importlib.util.spec_from_file_location("training", ROOT / "benchmarks" / "training.py")
    training = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training)
    results = json.loads((ROOT / "benchmarks" / "results" / f"training_{case}.json").read_text())
    assert f"<!-- training_{case} -->\n{training.table(results)}\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_options_of_the_script_exist(text):
    commands = re.findall(r"train_torchvision_libra\.py (.*)", text.read_text())
    rows = re.findall(r"^\|[^|]*\| (`--.*?)\|$", text.read_text(), re.MULTILINE)
    known = _parser()._option_string_actions
    assert {flag for line in commands + rows for flag in re.findall(r"--[a-z-]+", line)} <= known.keys()


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(text):
    for target in re.findall(r"\]\((?!http)([^)#]+)", text.read_text()):
        assert (text.parent / target).exists(), target


def test_python_blocks_compile():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        compile(block, "README.md", "exec")
