"""The ends of a program that trains: one line and an exit code, in whatever way it ends."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from balanced_learning.training import distributed
from balanced_learning.training.errors import SharedError, UserError
from balanced_learning.training.signals import EXIT_CODE, Stopped


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Ends the program after an error of the user or a signal, and takes leave of the other processes.

    An error that they do not know of ends this process without leave, which would have to wait for them; they learn of
    it from torch, or from torchrun, which ends them.
    """
    try:
        yield
    except SharedError as error:
        sys.exit(f"error: {error}" if distributed.is_main() else 1)
    except UserError as error:
        if distributed.world_size() > 1:
            _leave(f"error: {error}")
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        if distributed.is_main():
            print(f"{stopped} (exit code {EXIT_CODE})", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except Exception as error:
        if distributed.world_size() == 1:
            raise
        if isinstance(error, RuntimeError) and distributed.is_of_another_process(error):
            _leave(f"error: process {distributed.rank()} has lost another one, which says why if it could")
        _leave(traceback.format_exc())
    finally:
        distributed.stop()


def _leave(message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    for loader in multiprocessing.active_children():
        loader.kill()
    os._exit(1)
