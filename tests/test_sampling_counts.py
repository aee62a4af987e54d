"""Tests of how many boxes the CPU kernel draws, built by every C++ compiler that is found, at several levels."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("sampling_counts.cpp")
CSRC = Path(__file__).parents[1] / "csrc"
SETUP_LEVEL = "-O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math"  # as in setup.py
LEVELS = ("-O0", "-O1", "-O2", "-O3", SETUP_LEVEL)


def compilers() -> list[list[str]]:
    """The commands of the compilers, each program once."""
    commands = [shlex.split(command) for command in (os.environ.get("CXX") or "c++", "c++", "g++", "clang++")]
    found: dict[tuple[str, ...], list[str]] = {}
    for command in commands:
        program = shutil.which(command[0])
        if program is not None:
            found.setdefault((os.path.realpath(program), *command[1:]), command)
    return list(found.values())


def draw(command: list[str], level: str, num_images: int, binary: Path) -> str:
    """Builds the program and runs it. Returns what it prints."""
    build = [*command, "-std=c++17", *level.split(), f"-I{CSRC}", str(PROGRAM), "-o", str(binary)]
    subprocess.run(build, check=True)
    return subprocess.run([binary, str(num_images)], check=True, capture_output=True, text=True, timeout=300).stdout


def check(levels: tuple[str, ...], num_images: int, tmp_path: Path) -> None:
    if not compilers():
        pytest.skip("needs a C++ compiler")
    results = {
        f"{shlex.join(command)} {level}": draw(command, level, num_images, tmp_path / "program")
        for command in compilers()
        for level in levels
    }
    first = next(iter(results.values()))
    assert re.fullmatch(r"0 wrong, checksum \d+\n", first), results
    assert set(results.values()) == {first}, results  # the same boxes


def test_every_compiler_draws_what_is_wanted(tmp_path):
    check(("-O0", "-O2"), 4_000, tmp_path)


@pytest.mark.slow
def test_every_compiler_draws_what_is_wanted_of_many_images(tmp_path):
    check(LEVELS, 100_000, tmp_path)
