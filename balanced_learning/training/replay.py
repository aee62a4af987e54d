"""Steps that were left out, repeated from the file that was kept of one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from balanced_learning.training import randomness
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.data.dataset import Batch
from balanced_learning.training.errors import UserError, printable
from balanced_learning.training.faults import bad_gradients
from balanced_learning.training.optimization import Precision
from balanced_learning.training.step import Losses


def replay(checkpoint: Checkpoint, model: nn.Module, precision: Precision) -> str:
    """Repeats the step of a file that was kept of one, and says in some lines where its numbers go wrong.

    Args:
        checkpoint: of the file.
        model: with its weights, on the device of ``precision``.
        precision: of its run.

    Raises:
        UserError: if the file is a checkpoint of another kind.
    """
    fault = checkpoint.fault
    if fault is None:
        raise UserError(f"--replay {checkpoint.path}: a checkpoint, but not of a step that was left out")
    training, position = checkpoint.config.training, checkpoint.position
    batch = Batch(fault["images"], fault["targets"], of=len(fault["images"]), is_filler=False, unreadable=[], step=0)
    place = f"step {position.step} of epoch {position.epoch}, process {fault['rank']}"
    lines = [f"{place}; in the run, {printable(fault['cause'])}"]
    checkpoint.restore({"scaler": precision.scaler})
    model.train()
    for number, part in enumerate(batch.to(precision.device).parts(training.batch_size)):
        model.zero_grad()
        randomness.seed_all(training.seed, "step", position.epoch, position.step, fault["rank"], number)
        with _watched(model) as seen, precision():
            losses = Losses(model)(part.images, part.targets)
        lines.append(f"images {part.image_ids()}: " + "  ".join(f"{name} {loss:g}" for name, loss in losses.items()))
        lines += [f"the first output that is not finite is that of {name}" for name in seen[:1]]
        precision.scaler.scale(torch.stack(list(losses.values())).sum()).backward()
        names = bad_gradients(model)[:1]
        lines += [f"of the gradients that are not finite, that of {name} is nearest to the losses" for name in names]
    if not any("not finite" in line for line in lines[1:]):
        lines.append(
            "all numbers are finite here: threads, kernels or versions are others than then, or the fault was in the "
            "batch of another process"
        )
    return "\n".join(lines)


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that give what is not finite, in the order in which they do."""
    seen: list[str] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                seen.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
