"""Claims of README and docs, compared with results, flags and files."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from balanced_learning.training.flags import make_parser
from tests.training.small import save_untrained

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize(
    ("name", "benchmark", "text"),
    [
        ("training_shapes", "training", "README.md"),
        ("training_bccd", "training", "docs/guides/own_data.md"),
        ("kernel_speed_cpu", "kernel_speed", "README.md"),
        ("sampler_speed_cpu", "sampler_speed", "README.md"),
        ("pyramid_speed_cpu", "pyramid_speed", "README.md"),
        ("train_step_small_cpu", "train_step", "README.md"),
        ("reading_speed", "reading_speed", "docs/guides/own_data.md"),
        ("kill_and_resume", "kill_and_resume", "docs/survival.md"),
    ],
)
def test_figures_are_those_a_command_wrote(name, benchmark, text, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where its folder is when it is run
    results = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert f"<!-- {name} -->\n{import_module(benchmark).table(results)}\n" in (ROOT / text).read_text()


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_options_of_the_script_exist(text):
    commands = re.findall(
        r"(?:train_torchvision_libra|imbalance_report)\.py (.*?)(?:`|$)", text.read_text(), re.MULTILINE
    )
    rows = re.findall(r"^\|[^|]*\| (`--.*?)\|$", text.read_text(), re.MULTILINE)
    known = make_parser()._option_string_actions
    assert {flag for line in commands + rows for flag in re.findall(r"--[a-z-]+", line)} <= known.keys()


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(text):
    for target in re.findall(r"\]\((?!http)([^)#]+)", text.read_text()):
        assert (text.parent / target).exists(), target


def test_python_blocks_compile():
    for block in _python_blocks():
        compile(block, "README.md", "exec")


def test_twelve_lines_predict(tmp_path, monkeypatch):
    """On an image on its side, with a checkpoint that finds something everywhere."""
    (block,) = (each for each in _python_blocks() if "load_detector" in each)
    assert len([line for line in block.splitlines() if line]) == 12
    monkeypatch.chdir(tmp_path)
    save_untrained(Path(re.search(r'load_detector\("(.*?)"\)', block)[1]))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.effect_noise((90, 60), 80).save("street.jpg", exif=exif)
    result: dict = {}
    exec(block.replace("0.5", "0.1"), result)  # noqa: S102
    assert result["names"]
    assert set(result["names"]) <= {"cat", "dog [old]"}
    with Image.open("street-found.png") as picture:
        assert picture.size == (60, 90)


def _python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
