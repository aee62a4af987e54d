"""Test of csrc/balanced_l1_half.h, the loss as CUDA kernels compute it for half types, on the CPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("half_losses.cpp")


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_errors_are_small_beside_rounding(tmp_path: Path) -> None:
    subprocess.run(["c++", "-std=c++17", "-O1", PROGRAM, "-o", tmp_path / "program"], check=True)
    result = subprocess.run([tmp_path / "program"], check=True, capture_output=True, text=True)
    loss, derivative = map(float, result.stdout.split())
    assert loss < 2.3e-5
    assert derivative < 1e-5
