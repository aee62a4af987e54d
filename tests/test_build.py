"""What BALANCED_LEARNING_BUILD builds, and what it asks for and says when it cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
PARTS = ("setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for part in PARTS:
        shutil.copy(ROOT / part, tmp_path)
    for folder in ("balanced_learning", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def build(source: Path, mode: str, **environment: str) -> tuple[bool, str, str]:
    """Whether the wheel was built, its name, and what was printed."""
    command = [sys.executable, "-c", "import build_backend; build_backend.build_wheel('dist')"]
    environment = {**os.environ, "BALANCED_LEARNING_BUILD": mode, "PYTHONPATH": str(source), **environment}
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    wheels = [file.name for file in source.glob("dist/*.whl")]
    return result.returncode == 0, "".join(wheels), result.stdout + result.stderr


def test_none_gives_a_pure_wheel(source: Path) -> None:
    built, wheel, _ = build(source, "none")
    assert built
    assert wheel.endswith("-py3-none-any.whl")


def test_auto_does_without_a_compiler(source: Path) -> None:
    built, wheel, printed = build(source, "auto", CXX="no-such-compiler")
    assert built
    assert wheel.endswith("-py3-none-any.whl")
    assert "kernels for nothing; cpu would need a C++ compiler: there is no no-such-compiler" in printed


def test_auto_survives_a_compiler_that_fails(source: Path) -> None:
    built, _, printed = build(source, "auto", CXX="false", CUDA_HOME="/nowhere")
    assert built
    assert "the cpu kernels do not compile" in printed


@pytest.mark.parametrize(
    ("mode", "environment", "words"),
    [
        ("cpu", {"CXX": "false"}, "the cpu kernels do not compile"),
        ("cpu", {"CXX": "no-such-compiler"}, "BALANCED_LEARNING_BUILD=cpu needs a C++ compiler"),
        ("cuda", {"CXX": "true", "CUDA_HOME": "/nowhere"}, "there is no /nowhere/bin/nvcc"),
        ("gpu", {}, "BALANCED_LEARNING_BUILD must be one of auto, none, cpu, cuda, got gpu"),
    ],
)
def test_what_is_asked_for_and_fails_fails(source: Path, mode: str, environment: dict[str, str], words: str) -> None:
    built, wheel, printed = build(source, mode, **environment)
    assert not built
    assert not wheel
    assert words in printed


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_kernels_make_a_wheel_for_every_python(source: Path) -> None:
    built, wheel, printed = build(source, "cpu")
    assert built, printed
    assert "-py3-none-" in wheel
    assert not wheel.endswith("-any.whl")


@pytest.mark.parametrize(
    ("mode", "compiler", "needs_torch"),
    [("none", "true", False), ("auto", "no-such-compiler", False), ("auto", "true", True), ("cuda", "true", True)],
)
def test_torch_is_fetched_only_to_compile(source: Path, mode: str, compiler: str, needs_torch: bool) -> None:
    command = [sys.executable, "-c", "import build_backend; print(build_backend.get_requires_for_build_wheel())"]
    environment = {**os.environ, "BALANCED_LEARNING_BUILD": mode, "CXX": compiler, "PYTHONPATH": str(source)}
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=True)
    assert ("torch>=2.11" in result.stdout.splitlines()[-1]) == needs_torch
