"""Measurement, and a description of the machine, for all benchmarks."""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Measurement, Timer

from balanced_learning import backend_info

sys.path.append(str(Path(__file__).parents[1]))  # for tests.reference

RESULTS = Path(__file__).parent / "results"
TURNS = 3


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for what is written")
    parser.add_argument("--quick", action="store_true", help="a small part, to see that it runs")
    return parser


def keep_freed_memory() -> None:
    """Keeps the C library from giving freed memory back to the system: by chance, it slows now one, now another."""
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_mmap_max, 0)


def environment(device: str) -> dict[str, Any]:
    """The device, the versions and the commit of a measurement."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return {"device": name, "versions": without_files(backend_info()), "commit": commit()}


def commit() -> str:
    """The commit: that of the clone or, in a copy without git, what BALANCED_LEARNING_COMMIT says it is."""
    if "BALANCED_LEARNING_COMMIT" in os.environ:
        return os.environ["BALANCED_LEARNING_COMMIT"]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def without_files(versions: dict[str, Any]) -> dict[str, Any]:
    """What :func:`balanced_learning.backend_info` says, but for the places of files on one machine."""
    return {name: value for name, value in versions.items() if name != "files"}


def measure(
    calls: Iterable[tuple[str, Callable[[], Any], Callable[[], AbstractContextManager]]], seconds: float
) -> dict[str, dict[str, float]]:
    """Median and interquartile range of the seconds that each of the named calls takes, inside a context of its own.

    They take turns, so that what else the machine does meets all of them.
    """
    measurements: dict[str, list[Measurement]] = {}
    for _ in range(TURNS):
        for name, function, context in calls:
            timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
            with context():
                measurement = timer.blocked_autorange(min_run_time=seconds / TURNS)
            measurements.setdefault(name, []).append(measurement)
    merged = {name: Measurement.merge(several)[0] for name, several in measurements.items()}
    return {name: {"seconds": times.median, "iqr": times.iqr} for name, times in merged.items()}


def peak_memory(function: Callable[[], Any], device: str) -> int:
    """The bytes that a call needs at a time, beyond what was there before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    allocated = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def markdown(rows: Sequence[dict[str, str]], words: int = 0) -> str:
    """Rows with the same keys as a table, whose first columns hold words, and the others numbers."""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width if i < words else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    lines = (
        " | ".join(f"{cell:{'<' if i < words else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in cells
    )
    return "\n".join(f"| {line} |" for line in lines)


def write(file: Path, results: dict[str, Any]) -> None:
    save(file, results)
    print(f"wrote {file}")


def save(file: Path, results: dict[str, Any]) -> None:
    """Writes the results so far, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(file)
