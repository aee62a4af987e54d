"""The script of a session on a GPU, with programs that only tell how they were called."""

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu_session.sh"
# Each writes its arguments down; a file named after a word among them is what it does then.
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
for word in "$@"; do
  [ ! -f "$DO/${word##*/}" ] || . "$DO/${word##*/}"
done
echo "output of $(basename "$0") $1"
"""

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU timeout")


@pytest.fixture
def session(tmp_path):
    """Runs steps, and returns the status, what was printed, the calls, and the logs."""
    for folder in ("bin", "do"):
        (tmp_path / folder).mkdir()
    for name in ("python3", "compute-sanitizer"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    out, calls = tmp_path / "out", tmp_path / "calls"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "TIMEOUT", "CUDA_HOME")}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUT": str(out)}
    environment |= {"CALLS": str(calls), "DO": str(tmp_path / "do")}

    def run(*steps, on=None, **settings):
        for word, command in (on or {}).items():
            (tmp_path / "do" / word).write_text(command)
        result = subprocess.run(
            ["bash", SCRIPT, *steps], env=environment | settings, capture_output=True, text=True, timeout=600
        )
        logs = {}
        if (out / "logs.tar.gz").exists():
            with tarfile.open(out / "logs.tar.gz") as archive:
                logs = {Path(f.name).stem: archive.extractfile(f).read().decode() for f in archive if f.isfile()}
        called = calls.read_text().splitlines() if calls.exists() else []
        return result.returncode, result.stdout + result.stderr, called, logs

    return run


def listed() -> dict[str, int]:
    """The seconds of each step."""
    printed = subprocess.run(["bash", SCRIPT, "--list"], capture_output=True, text=True, check=True).stdout
    return {name: int(seconds) for name, seconds, *_ in map(str.split, printed.splitlines())}


def test_every_step_ends_within_eight_minutes():
    assert max(listed().values()) < 8 * 60
    assert next(iter(listed())) == "build"


def test_without_arguments_all_steps_run_and_call_files_that_exist(session):
    status, printed, calls, logs = session()
    assert status == 0, printed
    assert printed.endswith("== failed: nothing\n")
    assert re.findall(r"^== (\w+): status 0 after \d+ s$", printed, re.MULTILINE) == list(listed())
    assert logs.keys() == listed().keys()
    for word in {word for call in calls for word in call.split() if word.endswith(".py")}:
        assert (ROOT / word).is_file()
    assert {"memcheck", "racecheck", "synccheck", "initcheck"} == {
        call.split()[2] for call in calls if call.startswith("compute-sanitizer --tool ")
    }
    sanitized = [call for call in calls if call.startswith("compute-sanitizer")]
    assert all(call.endswith(" --error-exitcode 1 python3 -m tests.every_kernel --device cuda") for call in sanitized)
    assert not any("build_ext" in call for call in calls)


def test_kernels_that_do_not_run_are_built_and_tried_again(session):
    status, printed, calls, _ = session("build", on={"-c": "exit 1"}, TORCH_CUDA_ARCH_LIST="9.0")
    assert status == 1
    assert any("build_ext --inplace --force" in call for call in calls)
    assert printed.endswith("== failed: build\n")


def test_without_kernels_no_test_passes_by_being_skipped(session):
    status, _, calls, _ = session("tests", on={"-c": "exit 1"})
    assert status == 1
    assert not any("pytest" in call for call in calls)


def test_a_step_that_fails_does_not_stop_the_next(session):
    status, printed, _, logs = session("kernel_speed", "sampler_speed", on={"kernel_speed.py": "exit 3"})
    assert status == 1
    assert "== kernel_speed: status 3" in logs["kernel_speed"]
    assert "output of python3 benchmarks/sampler_speed.py" in logs["sampler_speed"]
    assert printed.endswith("== failed: kernel_speed\n")


def test_a_step_that_takes_too_long_is_stopped_with_all_that_it_started(session):
    on = {"memcheck": "sleep 1000 & wait"}
    status, printed, _, logs = session("memcheck", "racecheck", on=on, TIMEOUT="5")
    assert status == 1
    assert "stopped after 5 s" in logs["memcheck"]
    assert "status 0" in logs["racecheck"]
    assert printed.endswith("== failed: memcheck\n")


def test_a_step_that_is_not_there_is_named_before_any_runs(session):
    status, printed, calls, _ = session("build", "bild")
    assert (status, printed, calls) == (2, "there is no step bild: see --list\n", [])


def test_all_tests_that_use_a_gpu_are_run(session):
    _, _, calls, _ = session("tests")
    (call,) = (call for call in calls if "pytest" in call)
    uses_gpu = re.compile(r"^(@needs_gpu|def \w+\([^)]*\bdevice\b)", re.MULTILINE)
    files = [file for folder in ("tests", "tests/detection") for file in (ROOT / folder).glob("test_*.py")]
    found = {str(file.relative_to(ROOT)) for file in files if uses_gpu.search(file.read_text())}
    assert found == {word for word in call.split() if word.endswith(".py")}
    assert "-m gpu" in call
