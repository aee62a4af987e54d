"""Settings of the whole suite."""

import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import balanced_learning
from balanced_learning import _backend, backend_info, use_kernels

# The tests import each other, examples and benchmarks by full name. Last, so that an installed library goes first.
sys.path.append(str(Path(__file__).parents[1]))

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("suite")

torch.backends.cudnn.allow_tf32 = False  # float32 means float32


def pytest_report_header() -> str:
    """The library that is tested, in a clone perhaps not the one installed, and the implementation that computes."""
    info = backend_info()
    return f"balanced_learning {info['balanced_learning']}: {balanced_learning.__file__}; {info['kernels']}"


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from one seed and leaves the generators as it found them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available())
def device(request) -> str:
    return request.param


@pytest.fixture
def kernels(request):
    """Runs the test with the kernels for its device, and skips it where there are none."""
    device = torch.device(request.getfixturevalue("device") if "device" in request.fixturenames else "cpu")
    if not _backend.has_kernels(device):
        pytest.skip(f"no kernels for {device} here; the header says why")
    with use_kernels(True):
        yield


@pytest.fixture(params=["kernels", "plain"])
def implementation(request):
    """Runs the test with the kernels and in plain PyTorch."""
    if request.param == "kernels":
        request.getfixturevalue("kernels")
        yield request.param
    else:
        with use_kernels(False):
            yield request.param
