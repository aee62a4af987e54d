"""What the emulation finds in kernels that have one fault each, and that it finds nothing in a kernel without one."""

import re
import subprocess

import pytest

from tests.cuda_emulation.build import HERE, SANITIZERS

NOTHING, RACE, OVERFLOW = "^$", "ThreadSanitizer: data race", "AddressSanitizer: heap-buffer-overflow"
WAIT = "threads wait for others that do not come"
FAULTS = {
    "none": {
        "faultless": NOTHING,
        "no_barrier": "a wrong sum",  # since threads go on in random order
        "barrier_of_some": rf"{WAIT}: 56 have ended, 40 wait for the block at faults.cu:\d+",
        "two_barriers": r"a barrier, where other threads wait at faults.cu:\d+, at faults.cu:\d+",
        "lane_has_left": rf"{WAIT}: 65 have ended, 31 wait for lanes at faults.cu:\d+",
        "outside_its_mask": r"a lane outside its own mask, at faults.cu:\d+",
        "from_outside_the_mask": r"a shuffle from a lane outside the mask, at faults.cu:\d+",
    },
    "thread": {
        "faultless": NOTHING,
        "no_barrier": RACE,
        "no_warp_barrier": RACE,
        "no_atomic": RACE,
        "no_atomic_in_block": RACE,
    },
    "address": {
        "faultless": NOTHING,
        "beyond_memory": OVERFLOW,
        "beyond_shared_memory": OVERFLOW,
        "beyond_dynamic_memory": OVERFLOW,
        "off_alignment": "misaligned address",
    },
}


@pytest.mark.parametrize("sanitizer", FAULTS)
def test_faults_are_found(builder, sanitizer):
    flags = SANITIZERS[sanitizer]
    if obstacle := builder.sanitizer_obstacle(*flags):
        pytest.skip(obstacle)
    program = builder.program(f"faults_{sanitizer}", HERE / "faults.cu", *flags)
    for fault, message in FAULTS[sanitizer].items():
        result = subprocess.run([program, fault], capture_output=True, text=True, timeout=60)
        assert (result.returncode == 0) == (message == NOTHING), fault
        assert re.search(message, result.stderr), f"{fault}: {result.stderr}"
