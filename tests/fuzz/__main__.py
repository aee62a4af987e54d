"""Reads spoilt checkpoints and data sets for as long as you like, and counts what becomes of them.

    python -m tests.fuzz --minutes 120 --output fuzz.json

A try is refused in one line, or what is read is as it was before, or a run goes on from it for a step. Anything else is
a failure, and so is a try that takes 20 seconds, ends its process or runs code of the file. Every try follows from
``--seed``, the way of spoiling and its number, and ``--repeat WAY NUMBER`` repeats it. Called again with the same
``--output``, it goes on.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from balanced_learning import backend_info
from balanced_learning.training.files import write_text
from tests.fuzz.worker import make_ways, random_of, work

_ENDED = "the process ended with"
FAILURES = 200  # told in full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long, this time (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON with the counts, written every minute and at the end")
    parser.add_argument("--repeat", nargs=2, metavar=("WAY", "NUMBER"), help="repeat one try, with its traceback")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.repeat:
        with tempfile.TemporaryDirectory() as folder:
            way, number = options.repeat
            print(make_ways(Path(folder))[way](random_of(options.seed, way, int(number))))
        return
    sys.exit(fuzz(options.seed, time.monotonic() + 60 * options.minutes, options.output))


def fuzz(seed: int, deadline: float, output: Path | None) -> int:
    """Tries until the deadline, in one process after the other, and returns the number of failures."""
    result = _read_result(output, seed)
    before, start = result["minutes"], time.monotonic()
    written = start
    context = multiprocessing.get_context("spawn")
    while time.monotonic() < deadline:
        with tempfile.TemporaryDirectory() as folder:
            mine, its = context.Pipe()
            log = Path(folder) / "log"
            process = context.Process(target=work, args=(its, folder, seed, _numbers(result), str(log)))
            process.start()
            its.close()
            running: tuple[str, int] | None = None
            try:
                while time.monotonic() < deadline:
                    if mine.poll(1):
                        running = _take(result, mine.recv())
                    if time.monotonic() - written > 60:
                        written = time.monotonic()
                        result["minutes"] = before + (written - start) / 60
                        _write(result, output)
            except EOFError:
                process.join()
                if process.exitcode:
                    _fail(result, running, f"{_ENDED} {process.exitcode}\n{_end_of(log)}")
                    if running is None:
                        break
            finally:
                process.kill()
                process.join()
                mine.close()
    result["minutes"] = before + (time.monotonic() - start) / 60
    _write(result, output)
    print(json.dumps({name: entry for name, entry in result.items() if name != "failures"}, indent=2))
    return len(result["failures"])


def _read_result(output: Path | None, seed: int) -> dict[str, Any]:
    if output and output.exists():
        result = json.loads(output.read_text())
        if result["seed"] == seed:
            return result
        raise SystemExit(f"{output}: made with --seed {result['seed']}")
    return {"seed": seed, "minutes": 0.0, "tries": 0, "ways": {}, "failures": [], "versions": backend_info()}


def _write(result: dict[str, Any], output: Path | None) -> None:
    result["tries"] = sum(way["tries"] for way in result["ways"].values())
    if output:
        write_text(output, json.dumps(result, indent=2) + "\n")


def _numbers(result: dict[str, Any]) -> dict[str, int]:
    """The next try of each way."""
    return {name: way["tries"] for name, way in result["ways"].items()}


def _take(result: dict[str, Any], message: tuple[str, int, str | None, str]) -> tuple[str, int]:
    """Counts what a process tells, and returns what it is trying."""
    way, number, outcome, details = message
    if outcome == "failed":
        _fail(result, (way, number), details)
    elif outcome is not None:
        _count(result, way, outcome)
    return way, number


def _count(result: dict[str, Any], way: str, outcome: str) -> None:
    counts = result["ways"].setdefault(way, {"tries": 0})
    counts["tries"] += 1
    counts[outcome] = counts.get(outcome, 0) + 1


def _fail(result: dict[str, Any], running: tuple[str, int] | None, details: str) -> None:
    way, number = running or ("start", 0)
    _count(result, way, "failed")
    lines = details.strip().splitlines()
    print(
        f"{way} {number}: {lines[0 if running is None or details.startswith(_ENDED) else -1][:300]}",
        file=sys.stderr,
        flush=True,
    )
    if len(result["failures"]) < FAILURES:
        result["failures"].append({"way": way, "number": number, "details": details[-3000:]})


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2500:] if log.exists() else ""


if __name__ == "__main__":
    main()
