"""Settings of the whole suite."""

import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# The tests import each other, examples and benchmarks by full name. Last, so that an installed library goes first.
sys.path.append(str(Path(__file__).parents[1]))

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("suite")


torch.backends.cudnn.allow_tf32 = False  # float32 means float32


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from one seed and leaves the generators as it found them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request) -> str:
    return request.param
