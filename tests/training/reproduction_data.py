"""Requests of a reproduction, and a program that only pretends to train."""

import functools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from balanced_learning.training.reproduction.plan import Job, Plan, Request, make_plan
from balanced_learning.training.reproduction.published import read_table

# Takes its settings and its faults from the test, by its output folder, and needs no torch for that.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--output-dir") + 1])
told = json.loads((Path(__file__).parent / "told.json").read_text())[str(folder)]
with (Path(__file__).parent / "calls.txt").open("a") as file:
    print(*sys.argv[1:], file=file)
if "--dump-proposals" in sys.argv:
    Path(sys.argv[sys.argv.index("--dump-proposals") + 1]).write_text("boxes")
    sys.exit()

rows = folder / "metrics.jsonl"
done = rows.read_text().splitlines() if rows.exists() else []
folder.mkdir(parents=True, exist_ok=True)
(folder / "args.json").write_text(json.dumps(told["settings"]))
for epoch in range(len(done), told["settings"]["epochs"]):
    if told.get("does") == "fails":
        print("warning: a matter of no weight", file=sys.stderr)
        print("error: there is no such thing\\nas a launcher says, it failed", file=sys.stderr)
        sys.exit(1)
    if told.get("does") == "ends":
        sys.exit()
    if told.get("does") == "stops":
        sys.exit(75)
    if told.get("does") == "waits":
        def stop(number, _):
            (folder / "stopped_by").write_text(signal.Signals(number).name)
            sys.exit(75)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        (folder / "waits").write_text(str(os.getpid()))
        time.sleep(60)
    done.append(json.dumps({"epoch": epoch, **told["values"]}))
    rows.write_text("".join(line + "\\n" for line in done))
    (folder / "checkpoint.pth").write_text("")
"""


def request_of(folder: Path, number: int = 5, **more: Any) -> Request:
    """A request of a table in a folder, of a small detector, which needs no data."""
    options = ("--small", "--epochs", "2", *more.pop("options", ()))
    rest = {"seeds": (0,), "processes": 1, "program": folder / "program.py"} | more
    return Request((_table(number),), output_dir=folder / "out", options=options, **rest)


_table = functools.cache(read_table)


def plan_of(folder: Path, number: int = 5, **more: Any) -> Plan:
    return make_plan(request_of(folder, number, **more))


def settings_of(job: Job) -> dict[str, Any]:
    """What args.json says of a job that ran as planned, in one process."""
    return job.config.plain() | {"world_size": 1, "versions": {"torch": "2", "gpu": "none that torch can use"}}


def finish(job: Job, **values: float) -> None:
    """Leaves what a job leaves: these values in the last epoch, and higher ones before."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "args.json").write_text(json.dumps(settings_of(job)))
    last = job.config.training.epochs - 1
    rows = [
        {"epoch": epoch, **{name: value and value + last - epoch for name, value in values.items()}}
        for epoch in range(last + 1)
    ]
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def values_of(job: Job) -> dict[str, float]:
    """Metrics that depend on recipe and seed."""
    base = len(f"{job.folder}") / 1000 + job.config.training.seed / 100
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "AR300", "AR1000")
    return {name: base + i / 50 for i, name in enumerate(names)}


def pretend(folder: Path, plan: Plan, **does: str) -> Path:
    """Writes the program that pretends to do the jobs of a plan.

    Those whose recipe ends with a name of ``does`` fail, stop or wait.
    """
    told = {}
    for job in (each for cell in plan.cells.values() for each in (*cell.needs, cell)):
        name = job.folder.parent.name
        faults = [fault for ending, fault in does.items() if name.endswith(ending)]
        told[f"{job.folder}"] = {"settings": settings_of(job), "values": values_of(job), "does": "".join(faults)}
    (folder / "told.json").write_text(json.dumps(told))
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return program


def calls(folder: Path) -> list[list[str]]:
    """The words of each call of the program that pretends, in their order."""
    file = folder / "calls.txt"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def words_of(job: Job, folder: Path) -> list[str]:
    """The words that a job gives to the program."""
    assert job.command[:2] == (sys.executable, f"{folder / 'program.py'}"), shlex.join(job.command)
    return list(job.command[2:])
