"""One process, or several started by torchrun or SLURM, seen alike."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from balanced_learning.training.errors import SharedError, UserError
from balanced_learning.training.meeting import is_torchruns_store, meet_at_torchrun

T = TypeVar("T")

_host_group: Any = None  # of all processes, for what is exchanged on the CPU beside the gradients


def start(device: str, dist_url: str) -> torch.device:
    """Joins the other processes, if there are any that it has not joined, and returns the device of this one.

    Raises:
        UserError: for a device that torch cannot use, or processes that cannot meet.
    """
    global _host_group
    device = find_device(device)
    if announced_world_size() > 1:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device == "cuda":
            torch.cuda.set_device(local_rank)
            device = f"cuda:{local_rank}"
    if announced_world_size() > 1 and not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        try:
            if dist_url == "env://" and is_torchruns_store():
                store, own_rank, size = meet_at_torchrun()
                dist.init_process_group(backend, store=store, rank=own_rank, world_size=size)
            else:
                dist.init_process_group(backend, init_method=dist_url)
            _host_group = dist.new_group(backend="gloo")
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--dist-url {dist_url}: the processes cannot meet ({_first_line(error)})") from None
    return torch.device(device)


def find_device(name: str) -> str:
    """The name of a device; ``auto`` is a GPU if there is one.

    Raises:
        UserError: for a device that torch cannot use.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {_first_line(error)}") from None
    return name


def stop() -> None:
    global _host_group
    _host_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def announced_world_size() -> int:
    """The number of processes that the launcher announces, for they may not have joined yet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def announced_rank() -> int:
    """The rank that the launcher announces, which the process may not have taken yet."""
    return int(os.environ.get("RANK", 0))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def say(text: str) -> None:
    """Prints it, in the main process."""
    if is_main():
        print(text)


def share_buffers(model: nn.Module) -> None:
    """Gives every process the running statistics of the first, so that all evaluate the model that is saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def parallel(module: nn.Module) -> nn.Module:
    """The module, with gradients that are means over the processes; their bits do not depend on the steps before."""
    if world_size() == 1:
        return module
    # Without the search for unused parameters the gradients would be sent in another order, and so be summed in
    # another one, from the second step of each process on: a run that goes on would not be the same.
    tiny = nn.Linear(1, 1, device=next(module.parameters()).device)
    with _deaf_stderr():  # that the search is in vain is said once in a process, in many words
        DistributedDataParallel(tiny, find_unused_parameters=True)(tiny.weight.detach())
    shared = DistributedDataParallel(module, find_unused_parameters=True)
    # Those of the main process are saved and evaluated. To send them in every forward pass, all processes would have to
    # make equally many, which those with fewer parts of a batch do not.
    shared.broadcast_buffers = False
    return shared


@contextmanager
def _deaf_stderr() -> Iterator[None]:
    """Drops what is written to the file behind standard error, by C++ too."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def is_of_another_process(error: RuntimeError) -> bool:
    """Whether torch says by this error that another process is gone."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """The plain values or CPU tensors that the processes give, in their order, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_host_group)
    return values


def from_main(value: Any) -> Any:
    """What the main process gives, on every process."""
    return gather(value)[0]


def in_main(work: Callable[[], T]) -> T:
    """What the work gives in the main process, the only one to do it, on every process.

    Raises:
        SharedError: if the work raises a ``UserError``.
    """
    result, error = None, None
    if is_main():
        try:
            result = work()
        except UserError as reason:
            error = str(reason)
    result, error = from_main((result, error))
    if error is not None:
        raise SharedError(error)
    return result


def union_over_processes(values: dict[Any, Any]) -> dict[Any, Any]:
    """Returns one dict with the entries of all processes, on every process; an entry that several hold counts once."""
    return {key: value for part in gather(values) for key, value in part.items()}


class Agreement:
    """Numbers that the processes tell each other after every step without waiting: each call hears of the one before.

    So all of them learn of a signal, or of a checkpoint that is due, at the same step. A process alone hears itself.
    """

    def __init__(self) -> None:
        self._told: tuple[dict[str, float], Tensor, Any] | None = None

    def exchange(self, **numbers: float) -> dict[str, float]:
        """Tells the numbers, and returns the sums over all processes of those of the call before; zeros at first."""
        if not dist.is_initialized():
            return numbers
        before = self.finish() or dict.fromkeys(numbers, 0.0)
        sums = torch.tensor(list(numbers.values()), dtype=torch.float64)
        self._told = (numbers, sums, dist.all_reduce(sums, group=_host_group, async_op=True))
        return before

    def finish(self) -> dict[str, float]:
        """The sums of the last call, or nothing if they were returned."""
        if self._told is None:
            return {}
        (names, sums, work), self._told = self._told, None
        work.wait()
        return dict(zip(names, sums.tolist(), strict=True))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
