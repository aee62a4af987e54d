"""What reading may come to."""

import contextlib
import hashlib
import io
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from balanced_learning.training.errors import UserError

Read = TypeVar("Read")

REFUSED, SAME, ACCEPTED = "refused", "same", "accepted"


class WrongError(Exception):
    """What must not happen."""


def read(function: Callable[[], Read]) -> Read | None:
    """What a function returns, or ``None`` where it refuses its input as it should: in one line for people.

    Raises:
        WrongError: if its error, or a warning, is no such line.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return function()
    except UserError as error:
        if not str(error).isprintable() or len(str(error)) > 20_000:
            raise WrongError(f"an error that is not one line: {str(error)!r:.500}") from None
        return None
    finally:
        for line in said.getvalue().splitlines():
            if not (line.startswith(("warning: ", "--weights")) and line.isprintable()):
                raise WrongError(f"says {line!r:.500}")


def digest(value: Any) -> str:
    """Tells contents apart: tensors by their bytes, numbers by type and value."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype} {list(value.shape)}".encode())
        found.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else repr(value).encode())
    elif isinstance(value, dict):
        found.update(b"{")
        for key, entry in value.items():
            _feed(found, key)
            _feed(found, entry)
        found.update(b"}")
    elif isinstance(value, list | tuple):
        found.update(b"[")
        for entry in value:
            _feed(found, entry)
        found.update(b"]")
    else:
        found.update(f"{type(value).__name__} {value!r};".encode())
