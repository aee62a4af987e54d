"""The process that tries."""

import faulthandler
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import torch

from tests.fuzz.checkpoints import Checkpoints
from tests.fuzz.coco import Coco

SECONDS = 20  # within which a try has to end
MEMORY = 6 << 30  # bytes more than at first, which no try may need
TRIES = 20_000  # of a process, after which a new one takes over


def make_ways(folder: Path) -> dict[str, Callable[[Random], str]]:
    """All ways to spoil something, by name."""
    (folder / "checkpoints").mkdir()
    (folder / "coco").mkdir()
    return Checkpoints(folder / "checkpoints").ways | Coco(folder / "coco").ways


def random_of(seed: int, way: str, number: int) -> Random:
    return Random(f"{seed} {way} {number}")


def work(parent: Connection, folder: str, seed: int, numbers: dict[str, int], log: str) -> None:
    """Tries one way after the other, each for as long as the others, and tells the parent."""
    torch.set_num_threads(1)
    place = Path(folder) / "work"
    place.mkdir()
    ways = make_ways(place)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    seconds = dict.fromkeys(ways, 0.0)
    for _ in range(TRIES):
        way = min(seconds, key=seconds.__getitem__)
        number = numbers.get(way, 0)
        numbers[way] = number + 1
        parent.send((way, number, None, ""))
        start = time.perf_counter()
        try:
            with _watched(log):
                outcome, details = ways[way](random_of(seed, way, number)), ""
        except Exception:
            outcome, details = "failed", traceback.format_exc()
        seconds[way] += time.perf_counter() - start
        parent.send((way, number, outcome, details))


@contextmanager
def _watched(log: str) -> Iterator[None]:
    """Ends the process where the block takes too long or crashes; the traceback is left in the log."""
    with open(log, "w") as file:
        faulthandler.enable(file)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.disable()
