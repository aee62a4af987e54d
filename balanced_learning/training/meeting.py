"""Where processes that torchrun started meet, also when it starts them again."""

import os
import time
import uuid
from datetime import timedelta

from torch.distributed import DistStoreError, PrefixStore, Store, TCPStore

PATIENCE = timedelta(minutes=5)
_PAUSE = 0.05


def is_torchruns_store() -> bool:
    """Whether the store at ``MASTER_ADDR`` and ``MASTER_PORT`` is torchrun's own, which outlives the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet_at_torchrun() -> tuple[Store, int, int]:
    """A store that no process of an earlier start has written into, this process's rank, and the number of processes.

    After ``--max-restarts``, torchrun's store still holds the addresses of the processes before, and whoever reads them
    waits for those that are no more (https://github.com/pytorch/pytorch/issues/135712).

    Raises:
        DistStoreError: if the others do not come.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, world_size, is_master=False)
    return fresh_part(store, rank, world_size), rank, world_size


def fresh_part(store: Store, rank: int, world_size: int, patience: timedelta = PATIENCE) -> Store:
    """The part of a store that is the same for the processes that live, and that no others know of.

    The first process gives it a name that nobody had before. Each of the others asks for that name under one of its own
    that nobody had either, so that an answer is from a first process that lives; and the first one answers until all
    have thanked it, for a question may be left of a process that is no more.

    Args:
        store: which may hold what earlier processes wrote.
        rank: of this process.
        world_size: number of processes.
        patience: how long to wait for the others.

    Raises:
        DistStoreError: if they do not come.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        _answer(store, name, set(range(1, world_size)), time.monotonic() + patience.total_seconds())
    else:
        store.set(f"question/{rank}", name)
        store.wait([f"answer/{name}"], patience)
        name = store.get(f"answer/{name}").decode()
        store.set(f"thanks/{name}/{rank}", "")
    return PrefixStore(name, store)


def _answer(store: Store, name: str, waiting: set[int], end: float) -> None:
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"thanks/{name}/{rank}"]):
                waiting.remove(rank)
            elif store.check([f"question/{rank}"]):
                store.set(f"answer/{store.get(f'question/{rank}').decode()}", name)
        if waiting and time.monotonic() > end:
            raise DistStoreError(f"processes {', '.join(map(str, sorted(waiting)))} have not come")
        time.sleep(_PAUSE)
