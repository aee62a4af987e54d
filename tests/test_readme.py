"""What README and docs say, held against what it is about."""

import json
import re
from pathlib import Path

import pytest

import kernel_speed
import pyramid_speed
import sampler_speed
import training
from _common import RESULTS
from options import make_parser

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("training_shapes", training.table),
        ("training_bccd", training.table),
        ("kernel_speed_cpu", kernel_speed.table),
        ("sampler_speed_cpu", sampler_speed.table),
        ("pyramid_speed_cpu", pyramid_speed.table),
    ],
)
def test_figures_are_those_a_command_wrote(name, table):
    results = json.loads((RESULTS / f"{name}.json").read_text())
    assert f"<!-- {name} -->\n{table(results)}\n" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_options_of_the_script_exist(text):
    commands = re.findall(r"train_torchvision_libra\.py (.*)", text.read_text())
    rows = re.findall(r"^\|[^|]*\| (`--.*?)\|$", text.read_text(), re.MULTILINE)
    known = make_parser()._option_string_actions
    assert {flag for line in commands + rows for flag in re.findall(r"--[a-z-]+", line)} <= known.keys()


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(text):
    for target in re.findall(r"\]\((?!http)([^)#]+)", text.read_text()):
        assert (text.parent / target).exists(), target


def test_python_blocks_compile():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        compile(block, "README.md", "exec")
