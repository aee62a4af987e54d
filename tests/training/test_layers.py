"""Nothing imports upwards: library, then detection, then training, then the programs."""

import ast
from pathlib import Path

import pytest

import balanced_learning

PACKAGE = Path(balanced_learning.__file__).parent
EXTRAS = {"matplotlib", "faster_coco_eval", "pycocotools", "tqdm", "tensorboard", "PIL", "tomllib", "tomli"}


def imports(file: Path) -> set[str]:
    """The full names of the modules that a file imports, anywhere in it."""
    found = set()
    folder = file.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(folder[: len(folder) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (parent, node.module)))
            found |= {base, *(f"{base}.{name.name}" for name in node.names)}
    return found


def files(folder: str) -> list[Path]:
    found = sorted((PACKAGE / folder).glob("**/*.py" if folder else "*.py"))
    assert found
    return found


def starts(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names for prefix in prefixes if name == prefix or name.startswith(f"{prefix}.")}


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("", ["torchvision", "balanced_learning.detection", "balanced_learning.training", "examples", *EXTRAS]),
        ("detection", ["balanced_learning.training", "examples", *EXTRAS]),
        ("training", ["examples", "benchmarks", "tests"]),
    ],
)
def test_no_file_imports_what_is_above_it(folder, above):
    for file in files(folder):
        assert not starts(imports(file), *above), file


def test_matplotlib_has_its_place():
    """Figures are made with it; pictures take its font alone, and no program waits for it to start."""
    users = [file for file in PACKAGE.glob("**/*.py") if starts(imports(file), "matplotlib")]
    users += [file for file in (PACKAGE.parent / "examples").glob("*.py") if starts(imports(file), "matplotlib")]
    places = {file.relative_to(PACKAGE).as_posix(): starts(imports(file), "matplotlib") for file in users}
    figures = {"training/reporting/figures.py", "training/reporting/imbalance_figure.py"}
    assert places.keys() == figures | {"training/reporting/pictures.py"}
    assert places["training/reporting/pictures.py"] == {"matplotlib", "matplotlib.get_data_path"}


def test_programs_are_short():
    for file in (PACKAGE.parent / "examples").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 150, file
