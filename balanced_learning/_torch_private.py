"""The names that torch keeps private and this library uses: a torch without one still gives right results, later."""

from contextlib import nullcontext

import torch


def _assume_active() -> bool:
    return True


# Whether a function transform (torch.func) is active. Where torch does not tell, one may always be: the loss is then
# the formula that every transform can take apart.
are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", _assume_active)

# A context in which ops run past the Python that would record their derivatives. Without it they pass through.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
