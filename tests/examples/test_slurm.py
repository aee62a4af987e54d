"""The batch script for SLURM, with stand-ins for srun and scontrol: no SLURM has run it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.small import SMALL

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"

# Starts the tasks, passes on to each of them what SLURM would send, and ends with the highest of their codes.
SRUN = """\
import os, signal, subprocess, sys
command = sys.argv[next(i for i, word in enumerate(sys.argv[1:], 1) if not word.startswith("-")) :]
tasks = []
for signum in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(signum, lambda signum, _: [task.send_signal(signum) for task in tasks])
for rank in range(int(os.environ["SLURM_NTASKS"])):
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    tasks.append(subprocess.Popen(command, env={**os.environ, **own}))
open("srun.pid", "w").write(str(os.getpid()))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """\
import sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost\\nanother")
else:
    open("scontrol.log", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""
# Counts to 60 in a folder, ten a second, over as many starts as it takes; processes meet to agree on the signal.
PROGRAM = """\
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
stopped = []
for signum in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(signum, lambda *_: stopped.append(1))
assert sys.argv[-2:] == ["--resume", "auto"], sys.argv
folder = Path(sys.argv[sys.argv.index("--output-dir") + 1])
dist.init_process_group("gloo")
assert os.environ["LOCAL_RANK"] == str(dist.get_rank())
count = folder / "count"
for i in range(int(count.read_text()) if count.exists() else 0, 60):
    time.sleep(0.1)
    any_stopped = torch.tensor(len(stopped))
    dist.all_reduce(any_stopped)
    if dist.get_rank() == 0:
        count.with_suffix(".new").write_text(str(i + 1))
        count.with_suffix(".new").rename(count)
    if any_stopped:
        break
dist.barrier()
dist.destroy_process_group()  # or its threads may abort the process when it ends
sys.exit(75 if any_stopped else 0)
"""


JOB_ID = os.getpid() % 10_000  # which the port follows from
PATIENCE = 600  # seconds; two processes import torch, on a machine that may have more to do


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """A folder to submit in: stand-ins in ``PATH``, a stand-in for the training program, a folder for its output."""
    for name, code in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}\n{code}")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "train_torchvision_libra.py").write_text(PROGRAM)
    (tmp_path / "a run").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {"NTASKS": 2, "CPUS_PER_TASK": 1, "JOB_ID": JOB_ID, "JOB_NODELIST": "node[1-2]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return tmp_path


@pytest.fixture
def start(submitted):
    """Starts the script as SLURM would; at the end nothing of it is left."""
    jobs = []

    def run(*options):
        jobs.append(subprocess.Popen(["bash", SCRIPT, *options], cwd=submitted, start_new_session=True))
        return jobs[-1]

    yield run
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def wait_for(job, condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert job.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def requeued(folder):
    log = folder / "scontrol.log"
    return log.read_text().splitlines() if log.exists() else []


def count(folder):
    file = folder / "a run" / "count"
    return int(file.read_text()) if file.exists() else 0


def signal_step(folder, signum):
    """What SLURM does before the time is up: the tasks of srun are told, the batch shell is not."""
    os.kill(int((folder / "srun.pid").read_text()), signum)


OPTIONS = "--output-dir", "a run", "--data-path", "two words"


def test_a_job_goes_back_into_the_queue_until_it_is_done(submitted, start):
    job = start(*OPTIONS)
    wait_for(job, lambda: count(submitted) >= 5)
    signal_step(submitted, signal.SIGUSR1)
    assert job.wait(PATIENCE) == 75
    assert requeued(submitted) == [f"requeue {JOB_ID}"]
    reached = count(submitted)
    assert reached < 60

    assert start(*OPTIONS).wait(PATIENCE) == 0
    assert count(submitted) == 60
    assert len(requeued(submitted)) == 1


def test_a_job_that_is_cancelled_or_must_make_room_is_left_to_slurm(submitted, start):
    job = start(*OPTIONS)
    wait_for(job, lambda: count(submitted) >= 5)
    job.send_signal(signal.SIGTERM)
    signal_step(submitted, signal.SIGTERM)
    assert job.wait(PATIENCE) == 75  # the shell has waited for the checkpoint
    assert requeued(submitted) == []


def test_a_job_that_fails_is_not_repeated(submitted, start):
    (submitted / "examples" / "train_torchvision_libra.py").write_text("import sys\nsys.exit(1)\n")
    assert start(*OPTIONS).wait(PATIENCE) == 1
    assert requeued(submitted) == []


@pytest.mark.slow
def test_the_training_program_goes_back_into_the_queue(submitted, start, coco_root, monkeypatch):
    (submitted / "examples" / "train_torchvision_libra.py").unlink()
    (submitted / "examples").rmdir()
    (submitted / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}")
    options = "--data-path", coco_root, *SMALL, "-b", "1", "--epochs", "8", "--output-dir", "a run"
    job = start(*options)
    wait_for(job, (submitted / "a run" / "checkpoint.pth").exists)
    signal_step(submitted, signal.SIGUSR1)
    assert job.wait(PATIENCE) == 75
    assert requeued(submitted) == [f"requeue {JOB_ID}"]

    assert start(*options).wait(PATIENCE) == 0
    rows = (submitted / "a run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == list(range(8))
    assert len(requeued(submitted)) == 1
