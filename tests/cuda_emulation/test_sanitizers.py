"""The tests of the kernels again, under the sanitizers: no race, nothing beyond memory or off alignment."""

import os
import subprocess
import sys

import pytest

from tests.cuda_emulation.build import CXX, HERE, SANITIZERS
from tests.cuda_emulation.conftest import LIBRARIES


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_kernels(builder, host_library, sanitizer):
    flags = SANITIZERS[sanitizer]
    if obstacle := builder.sanitizer_obstacle(*flags):
        pytest.skip(obstacle)
    runtime = f"lib{sanitizer[0]}san.so"
    path = subprocess.check_output([*CXX, f"-print-file-name={runtime}"], text=True).strip()
    if path == runtime:
        pytest.skip(f"{CXX[0]} has no {runtime} that Python could load")
    library = builder.library(f"emulated_{sanitizer}", "*_cuda.cu", *flags)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
        "LD_PRELOAD": path,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's
        "TSAN_OPTIONS": "halt_on_error=1 history_size=0",
        "OMP_NUM_THREADS": "1",
        LIBRARIES: os.pathsep.join(map(str, (library, host_library))),
    }
    tests = [HERE / "test_loss.py", HERE / "test_sampling.py"]
    tests += {"thread": ["-m", "not many_threads"], "address": ["-k", "not grid"]}[sanitizer]  # which would take long
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
