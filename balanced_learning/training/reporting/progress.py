"""Progress through batches, with the time left."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm


class Progress:
    """A bar on a terminal, a line every ``print_freq`` batches in a log; only where ``is_main``."""

    def __init__(self, title: str, print_freq: int, *, is_main: bool = True) -> None:
        self.title = title
        self.print_freq = print_freq
        self.is_main = is_main

    def over(
        self,
        batches: Iterable[Any],
        total: int,
        status: Callable[[], str] = lambda: "",
        *,
        done: int = 0,
        images: int = 1,
    ) -> Iterator[Any]:
        """The batches, one by one.

        Args:
            batches: those that are left.
            total: their number, with those that are done.
            status: what to say beside the progress; asked on every process, for it may have to hear the others.
            done: the number of those that are done.
            images: in a batch, on all processes.
        """
        on_terminal = sys.stdout.isatty()
        start, waited, last = time.perf_counter(), 0.0, time.perf_counter()
        is_off = not (self.is_main and on_terminal)
        bar = tqdm(batches, self.title, total, disable=is_off, file=sys.stdout, initial=done)
        for number, batch in enumerate(bar, done + 1):
            waited += time.perf_counter() - last
            yield batch
            last = time.perf_counter()
            if number % self.print_freq and number != total:
                continue
            text = status()
            if not self.is_main:
                continue
            each, share = (last - start) / (number - done), waited / (last - start)
            speed = f"{images / each:.3g} images/s  {100 * share:.0f} % waiting for data"
            if on_terminal:
                bar.set_postfix_str(f"{text}  {speed}")
            else:
                eta = timedelta(seconds=round(each * (total - number)))
                memory = f"  max mem {torch.cuda.max_memory_allocated() >> 20} MiB" if torch.cuda.is_available() else ""
                print(
                    f"{self.title} [{number:>{len(str(total))}}/{total}]  eta {eta}  {text}  {speed}{memory}",
                    flush=True,
                )
