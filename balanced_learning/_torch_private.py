"""The names that torch keeps private and this library uses: a torch without one still gives right results, later."""

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch.autograd import forward_ad


def _assume_active() -> bool:
    return True


# Whether a function transform (torch.func) is active. Where torch does not tell, one may always be: the loss is then
# the formula that every transform can take apart.
are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", _assume_active)


_tells_forward_mode = hasattr(forward_ad, "_current_level")


def is_forward_mode_active() -> bool:
    """Whether tensors may have tangents (``torch.autograd.forward_ad``): asking each for its own takes longer."""
    return not _tells_forward_mode or forward_ad._current_level >= 0


# A context in which ops run past the Python that would record their derivatives. Without it they pass through.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def end_loading(batches: Iterator[Any]) -> None:
    """Ends the processes of a ``DataLoader``'s iterator now. Without the name they end when the iterator is freed."""
    getattr(batches, "_shutdown_workers", _nothing)()


def compile_for_every_size() -> None:
    """Lets ``torch.compile`` compile for hundreds of sizes. Without the names it does so for the first alone."""
    with suppress(ImportError):
        from torch._dynamo import config

        for name in ("recompile_limit", "accumulated_recompile_limit"):
            if hasattr(config, name):
                setattr(config, name, 4096)


def _nothing() -> None:
    pass
