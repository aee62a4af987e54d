"""The maps inside a backbone: what enters its FPN, and what enters and leaves its balanced pyramid."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Seen:
    """The maps of the last forward pass, finest first."""

    body: list[Tensor]  # that enter the FPN: leaves, so that there are gradients with respect to them
    before: list[Tensor] | None = None  # that enter the pyramid; None without one
    after: list[Tensor] | None = None  # that leave it


@contextmanager
def watch(backbone: Any) -> Iterator[Seen]:
    """Keeps the maps inside a backbone, and cuts the graph of autograd where they enter its FPN."""
    seen = Seen()

    def cut(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        maps, *others = args
        leaves = type(maps)((name, level.detach().requires_grad_()) for name, level in maps.items())
        seen.body = list(leaves.values())
        return leaves, *others

    def keep(_: Any, args: tuple[Any, ...], output: Any) -> None:
        seen.before, seen.after = list(args[0].values()), list(output.values())

    hooks = [backbone.fpn.register_forward_pre_hook(cut)]
    if hasattr(backbone, "bfp"):
        hooks.append(backbone.bfp.register_forward_hook(keep))
    try:
        # What was compiled before does not know of hooks.
        with torch.compiler.set_stance("force_eager"):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
