"""One process, or several started by torchrun, seen alike."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from balanced_learning.training.errors import UserError


def start(device: str, dist_url: str) -> torch.device:
    """Joins the other processes, if there are any, and returns the device of this one.

    Raises:
        UserError: for a device that torch cannot use.
    """
    device = find_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device == "cuda":
            torch.cuda.set_device(local_rank)
            device = f"cuda:{local_rank}"
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, init_method=dist_url)
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
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def share_buffers(model: nn.Module) -> None:
    """Gives every process the running statistics of the first, so that all evaluate the model that is saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean_over_processes(values: dict[str, Tensor]) -> dict[str, float]:
    """Returns the mean of each scalar over the processes, which must hold the same names."""
    stacked = torch.stack([value.float() for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(stacked)
    return dict(zip(values, (stacked / world_size()).tolist(), strict=True))


def union_over_processes(values: dict[Any, Any]) -> dict[Any, Any]:
    """Returns one dict with the entries of all processes, on every process; an entry that several hold counts once."""
    if not dist.is_initialized():
        return values
    gathered: list[dict] = [{}] * world_size()
    dist.all_gather_object(gathered, values)
    return {key: value for part in gathered for key, value in part.items()}


def from_main(value: Any) -> Any:
    """The value of the main process, on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]
