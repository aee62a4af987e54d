"""Processes meet in a store that outlives them, whatever those before have left in it."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from time import sleep

import pytest
from torch.distributed import DistStoreError, HashStore

from balanced_learning.training.meeting import fresh_part

ROOT = Path(__file__).parents[2]


def meet(store, world_size, late=()):
    """As which of them each process comes into its part; those that are late come so much later."""

    def process(rank):
        if rank in late:
            sleep(0.3)
        return fresh_part(store, rank, world_size, timedelta(seconds=20)).add("came", 1)

    with ThreadPoolExecutor(world_size) as pool:
        return sorted(pool.map(process, range(world_size)))


@pytest.mark.parametrize("late", [(), (0,), (1, 2)])
def test_all_meet_again_and_again(late):
    store = HashStore()
    for _ in range(3):
        assert meet(store, 4, late) == [1, 2, 3, 4]


def test_questions_and_answers_of_processes_that_are_no_more_do_no_harm():
    store = HashStore()
    with pytest.raises(DistStoreError):
        fresh_part(store, 0, 2, timedelta(seconds=0.2))  # the other died before it came
    with pytest.raises(DistStoreError):
        fresh_part(store, 1, 3, timedelta(seconds=0.2))  # the first one died
    assert meet(store, 3, late=(1,)) == [1, 2, 3]


PROGRAM = """\
import os, signal, sys, time
import torch, torch.distributed as dist
from balanced_learning.training import distributed
start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if start and rank:
    time.sleep(1)  # so that the first process finds in the store what the one before has left
distributed.start("cpu", "env://")
if start == 0 and rank:
    os.kill(os.getpid(), signal.SIGKILL)
total = torch.ones(1)
dist.all_reduce(total)
print(f"start {start} rank {rank} of {total.item():g}", flush=True)
distributed.stop()
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", [["--standalone"], ["--master-port", "29517"]], ids=["c10d", "static"])
def test_torchrun_starts_a_killed_process_again(tmp_path, place):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [Path(sys.prefix) / "bin" / "torchrun", *place, "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, tmp_path / "program.py"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    for rank in range(2):  # the processes share stdout, and may write their lines into one another's
        assert f"start 1 rank {rank} of 2" in result.stdout
