"""Tests of csrc/sample.h with threads of the CPU in place of a GPU's: they draw what one does, without a data race."""

import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("sample_threads.cpp")
FLAGS = ["-std=c++20", "-O1", "-pthread"]


def build(source: Path, binary: Path, *flags: str) -> bool:
    return subprocess.run(["c++", *FLAGS, *flags, source, "-o", binary], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def sanitizer(tmp_path_factory) -> list[str]:
    """The thread sanitizer, if this compiler and this machine have it."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    source = tmp_path_factory.mktemp("probe") / "probe.cpp"
    source.write_text("#include <barrier>\nint main() {}\n")
    if not build(source, source.with_suffix("")):
        pytest.skip("needs a compiler of C++20")
    usable = build(source, source.with_suffix(""), "-fsanitize=thread")
    return ["-fsanitize=thread"] if usable and subprocess.run([source.with_suffix("")]).returncode == 0 else []


def test_many_threads_sample_what_one_does(sanitizer, tmp_path):
    assert build(PROGRAM, tmp_path / "program", *sanitizer)
    result = subprocess.run([tmp_path / "program"], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0", "")
