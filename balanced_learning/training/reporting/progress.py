"""Progress through a loader, with the time left."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from tqdm import tqdm


class Batches(Protocol):
    """A loader, or whatever knows how many batches it yields."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Progress:
    """A bar on a terminal, a line every ``print_freq`` batches in a log; only where ``is_main``."""

    def __init__(self, title: str, print_freq: int, *, is_main: bool = True) -> None:
        self.title = title
        self.print_freq = print_freq
        self.is_main = is_main

    def over(self, loader: Batches, status: Callable[[], str]) -> Iterator[Any]:
        """The batches. ``status`` is asked on every process, for it may have to hear the others."""
        on_terminal = sys.stdout.isatty()
        start, waited, last = time.perf_counter(), 0.0, time.perf_counter()
        bar = tqdm(loader, self.title, disable=not (self.is_main and on_terminal), file=sys.stdout)
        for number, batch in enumerate(bar, 1):
            waited += time.perf_counter() - last
            yield batch
            last = time.perf_counter()
            if number % self.print_freq and number != len(loader):
                continue
            text = status()
            if not self.is_main:
                continue
            if on_terminal:
                bar.set_postfix_str(text)
            else:
                each = (last - start) / number
                eta = time.strftime("%H:%M:%S", time.gmtime(each * (len(loader) - number)))
                memory = f"  max mem {torch.cuda.max_memory_allocated() >> 20} MiB" if torch.cuda.is_available() else ""
                print(
                    f"{self.title} [{number:>{len(str(len(loader)))}}/{len(loader)}]  eta {eta}  {text}  "
                    f"time {each:.3f} s  data {waited / number:.3f} s{memory}",
                    flush=True,
                )
