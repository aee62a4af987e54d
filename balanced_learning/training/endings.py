"""The ends of a program that trains: one line and an exit code, in whatever way it ends."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, NoReturn

from balanced_learning.training import distributed
from balanced_learning.training.data.loader_processes import LOST, is_of_lost_process
from balanced_learning.training.errors import SharedError, UserError
from balanced_learning.training.signals import EXIT_CODE, Stopped


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Ends the program after an error of the user or a signal, and takes leave of the other processes.

    An error that they do not know of ends this process without leave, which would have to wait for them; they learn of
    it from torch, or from torchrun, which ends them.

    What it prints may be lost, to a log on a full disk or a terminal that is gone: that ends no program.
    """
    try:
        with _lenient_output():
            yield
    except SharedError as error:
        sys.exit(f"error: {error}" if distributed.is_main() else 1)
    except UserError as error:
        _end(f"{error}")
    except Stopped as stopped:
        if distributed.is_main():
            print(f"{stopped} (exit code {EXIT_CODE})", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except Exception as error:
        if is_of_lost_process(error):
            _end(LOST)
        if distributed.world_size() == 1:
            raise
        if isinstance(error, RuntimeError) and distributed.is_of_another_process(error):
            _leave(f"error: process {distributed.rank()} has lost another one, which says why if it could")
        _leave(traceback.format_exc())
    finally:
        distributed.stop()


def _end(message: str) -> NoReturn:
    if distributed.world_size() > 1:
        _leave(f"error: {message}")
    sys.exit(f"error: {message}")


def _leave(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    for loader in multiprocessing.active_children():
        loader.kill()
    os._exit(1)


@contextmanager
def _lenient_output() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    try:
        with redirect_stdout(_Lenient(sys.stdout)), redirect_stderr(_Lenient(sys.stderr)):
            yield
    finally:
        for stream in streams:
            try:
                stream.flush()
            except OSError:  # what is left in its buffer would change the exit code
                with suppress(OSError), open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), stream.fileno())


class _Lenient:
    """A stream that loses what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()
