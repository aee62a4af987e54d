"""Kernels that are absent, broken, switched off or not for this machine: what computes, and what the user is told."""

import ctypes
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest import mock

import pytest
import torch

import balanced_learning
from balanced_learning import _backend, _ops, backend_info, use_kernels

PACKAGE = Path(balanced_learning.__file__).parent
PROGRAM = """
import torch
from balanced_learning import backend_info, balanced_l1_loss
print(backend_info()["kernels"], balanced_l1_loss(torch.ones(3), torch.zeros(3)).item(), sep="|")
"""


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of the package without kernels."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


@pytest.fixture(autouse=True)
def _forget():
    yield
    _backend._problem.cache_clear()


def run(folder: Path, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)} | env, capture_output=True, text=True)


def test_absent_is_silent(bare: Path) -> None:
    result = run(bare)
    assert result.stderr == ""
    words, _, loss = result.stdout.partition("|")
    assert words.count("not built") == 2
    assert float(loss) == pytest.approx(1.0785935)


def test_broken_raises_with_its_cause(bare: Path) -> None:
    (bare / "balanced_learning" / "_cpu.so").write_bytes(b"no library")
    result = run(bare)
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert "_cpu.so is broken" in result.stderr
    assert "invalid ELF header" in result.stderr or "file too short" in result.stderr


def test_cuda_kernels_beside_a_torch_without_cuda(bare: Path) -> None:
    (bare / "balanced_learning" / "_cuda.so").write_bytes(b"not opened")
    result = run(bare)
    if torch.version.cuda is None:
        assert result.returncode == 0
        assert "CUDA: plain PyTorch (not loaded: this torch is built for the CPU alone" in result.stdout
    else:
        assert "_cuda.so is broken" in result.stderr


class Library:
    """Stands for the CUDA library on a machine with a GPU."""

    def __init__(self, error: bytes | None, driver: int, runtime: int) -> None:
        self.balanced_learning_cuda_error = mock.Mock(side_effect=self.error)
        self.answer = error, driver, runtime

    def error(self, driver, runtime) -> bytes | None:
        error, driver._obj.value, runtime._obj.value = self.answer
        return error


@pytest.mark.parametrize(
    ("library", "words"),
    [
        (Library(None, 13000, 13000), None),
        (
            Library(b"CUDA driver version is insufficient for CUDA runtime version", 12040, 13000),
            "the driver is for CUDA 12, the kernels need CUDA 13: install NVIDIA driver 580 or newer",
        ),
        (
            Library(b"no kernel image is available for execution on the device", 13000, 13000),
            "the kernels do not run on this GPU: no kernel image is available for execution on the device",
        ),
    ],
)
def test_gpu_that_the_kernels_do_not_suit(library: Library, words: str | None, tmp_path: Path) -> None:
    file = tmp_path / "_cuda.so"
    file.touch()
    device = torch.device("cuda", 0)
    _backend._problem.cache_clear()
    with (
        mock.patch.dict(_backend._LIBRARIES, cuda=file),
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.object(ctypes, "CDLL", return_value=library),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
    ):
        assert _backend._problem(device) == words


def test_a_device_without_kernels_has_the_formula() -> None:
    for dtype in (torch.float32, torch.float16):
        meta = torch.zeros(3, device="meta", dtype=dtype)
        assert not _backend.has_kernels(meta.device)
        assert balanced_learning.balanced_l1_loss(meta, meta).shape == ()


def test_the_command_prints_the_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "balanced_learning"]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    printed = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert all(key in printed and value in printed for key, value in backend_info().items())


@pytest.mark.usefixtures("kernels")
def test_the_switch_is_what_computes_and_what_is_told() -> None:
    tensor = torch.zeros(3)
    for enabled in (False, True):
        with use_kernels(enabled):
            assert _ops.uses_kernels(tensor) == enabled
            assert ("switched off" in backend_info()["kernels"]) != enabled
            with suppress(KeyError), use_kernels(not enabled):
                assert _ops.uses_kernels(tensor) != enabled
                raise KeyError
            assert _ops.uses_kernels(tensor) == enabled


@pytest.mark.usefixtures("kernels")
def test_compiled_code_follows_the_switch() -> None:
    compiled = torch.compile(lambda tensor: tensor + _ops.uses_kernels(tensor), fullgraph=True, backend="eager")
    for enabled in (True, False, True):
        with use_kernels(enabled):
            assert compiled(torch.zeros(())).item() == enabled


def test_a_loss_goes_backward_as_it_went_forward() -> None:
    input = torch.randn(9, requires_grad=True)
    with use_kernels(False):
        loss = balanced_learning.balanced_l1_loss(input, torch.zeros(9))
    with use_kernels(True), mock.patch.object(_ops, "_backward_op", side_effect=AssertionError):
        loss.backward()
    assert input.grad is not None


def test_kernels_that_are_absent_are_not_used_if_switched_on(bare: Path) -> None:
    assert run(bare, BALANCED_LEARNING_KERNELS="1").stdout.count("not built") == 2


@pytest.mark.usefixtures("kernels")
def test_the_environment_switches_kernels_off() -> None:
    words, _, loss = run(PACKAGE.parent, BALANCED_LEARNING_KERNELS="0").stdout.partition("|")
    assert words.startswith("CPU: plain PyTorch (the kernels are switched off, by BALANCED_LEARNING_KERNELS=0")
    assert float(loss) == pytest.approx(1.0785935)


def test_the_environment_has_no_other_value(bare: Path) -> None:
    assert "BALANCED_LEARNING_KERNELS must be 0 or 1, got 'off'" in run(bare, BALANCED_LEARNING_KERNELS="off").stderr


def test_the_driver_tells_its_version() -> None:
    def get_version(version) -> int:
        version._obj.value = 13020
        return 0

    with mock.patch.object(ctypes, "CDLL", return_value=mock.Mock(cuDriverGetVersion=get_version)):
        assert _backend._driver() == "CUDA 13.2"
    with mock.patch.object(ctypes, "CDLL", side_effect=OSError):
        assert _backend._driver() == "unknown"
