"""The names that torch keeps private and this library uses: a torch without one still gives right results, later."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch


def _assume_active() -> bool:
    return True


# Whether a function transform (torch.func) is active. Where torch does not tell, one may always be: the loss is then
# the formula that every transform can take apart.
are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", _assume_active)

# A context in which ops run past the Python that would record their derivatives. Without it they pass through.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def end_loading(batches: Iterator[Any]) -> None:
    """Ends the processes of a ``DataLoader``'s iterator now. Without the name they end when the iterator is freed."""
    getattr(batches, "_shutdown_workers", _nothing)()


def _nothing() -> None:
    pass
