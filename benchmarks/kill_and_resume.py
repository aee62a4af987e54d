"""Kills training at random moments, starts it again with the same command, and compares what comes out bit for bit.

    python benchmarks/kill_and_resume.py                   # 100 runs
    python benchmarks/kill_and_resume.py --runs 10 --jobs 2 --seed 1

A small detector is trained on a few drawn shapes in several ways: by one process, with loader processes, by two
processes of torchrun, with other optimizers, an average of the weights, accumulation, mixed precision. Each way is run
once without a stop, and then killed by SIGKILL, SIGTERM or SIGINT, sent to the process, to one of the two, or to all
with their loaders, up to three times a run, until it ends. The moments are spread over what a run prints; every
fourth run is killed while it writes a file.

Its last and best checkpoint must then have the same bits as those of the run that was not stopped, and its metrics,
evaluations and list of files be the same, but for clock and folder; every exit code must be the one that is documented,
and no process, unfinished file or traceback be left. Writes benchmarks/results/kill_and_resume.json with what was
killed, where that met the run, and every difference in words. Stopped itself, it goes on where it was, if nothing has
changed since. It needs Linux.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from _common import RESULTS, environment, markdown, write
from _killing import Kind, Moment, Start, Watched, start_command, watch
from balanced_learning.training.data.shapes import shapes_dataset
from balanced_learning.training.signals import EXIT_CODE

FLAGS = "--small --min-size 64 --max-size 96 --epochs 3 --lr-steps 2 --warmup-iters 5 --device cpu --print-freq 1"
KINDS = {
    "one process": Kind("-j 0 -b 2 --lr 0.01 --checkpoint-steps 1"),
    "two loaders, AdamW, EMA": Kind("-j 2 -b 2 --opt adamw --lr 0.001 --ema 0.9 --checkpoint-steps 3"),
    "accumulation, fp16": Kind("-j 0 -b 1 --accumulation-steps 2 --lr 0.01 --amp fp16 --checkpoint-minutes 0.01"),
    "two processes": Kind("-j 0 -b 1 --lr 0.01 --ema 0.9 --checkpoint-steps 2", processes=2),
    "two processes, restarts": Kind("-j 1 -b 1 --lr 0.01 --checkpoint-steps 3", processes=2, restarts=3),
}
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
CLOCK = {"seconds", "images_per_second"}  # no two runs have them in common
PLACE = {"output_dir"}
PLACES = ["starting", "training", "saving", "evaluating", "reporting"]
COMPARED = ["checkpoint.pth", "checkpoint_best.pth"]
SHARE_OF_START = 0.1  # at most, of the moments
DELAY = 0.2  # seconds at most, after a line that a run is killed at when it goes on
MOST_STARTS = 12
LOADERS = ("ConnectionResetError", "BrokenPipeError", "EOFError")  # with which they end that have lost the process
TORCHRUNS = ("SignalException", "ChildFailedError")  # with which it ends, and tells of a worker that failed


@dataclass
class Kill:
    """What was done to a run once.

    Attributes:
        signal: its name.
        to: whom it was sent to.
        where: what the run was doing, one of ``PLACES``.
        exit_code: of the command, 0 if torchrun went on by itself.
    """

    signal: str
    to: str
    where: str
    exit_code: int | None


@dataclass
class Outcome:
    """What became of a run that was killed; it is as it should be if there are no failures."""

    kind: str
    kills: list[Kill] = field(default_factory=list)
    starts: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """A run that was not stopped.

    Attributes:
        folder: of its output.
        times: seconds from its start to each line of progress, and to its end.
    """

    folder: Path
    times: list[float]

    def moment(self, share: float) -> Moment:
        """The moment at this share of the run, in [0, 1)."""
        gaps = [later - earlier for earlier, later in zip([0.0, *self.times], self.times, strict=False)]
        gaps[0] = min(gaps[0], SHARE_OF_START * sum(gaps[1:]))
        *starts, total = accumulate(gaps, initial=0.0)
        lines = max(i for i, start in enumerate(starts) if start <= share * total)
        # Whatever of the start is left out here is that before the program can hear: importing torch.
        late = self.times[0] - gaps[0] if lines == 0 else 0.0
        return Moment(lines, late + share * total - starts[lines])


class Runs:
    """The runs of a measurement, in a folder of its own.

    Args:
        folder: for data and output.
        seed: of the moments, signals and targets.
        count: of the runs.
        kinds: by name.
        kills: of a run; one of the numbers is drawn.
        start: starts a run.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        count: int,
        kinds: dict[str, Kind] = KINDS,
        kills: Sequence[int] = (1, 1, 2, 3),
        start: Start = start_command,
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.count = count
        self.kinds = kinds
        self.kills = kills
        self.start = start
        self.data = shapes_dataset(train=13, val=5)
        self.references: dict[str, Reference] = {}

    def _start(self, kind: Kind, out: Path, number: int) -> Watched:
        log = out.with_name(f"{out.name}.{number}.log")
        flags = [
            *f"{FLAGS} {kind.flags} --resume auto".split(),
            "--data-path",
            str(self.data),
            "--output-dir",
            str(out),
        ]
        return Watched(self.start(kind, flags, log), log, out)

    def refer(self, name: str) -> None:
        """Makes the run of a kind that the others are compared with.

        Raises:
            RuntimeError: if it fails.
        """
        out = self.folder / name.replace(" ", "_").replace(",", "")
        run = self._start(self.kinds[name], out, 0)
        times = watch(run)
        code, left = run.end()
        if code or left:
            raise RuntimeError(f"{name}: exit code {code}, processes {left}:\n{run.log.read_text()}")
        self.references[name] = Reference(out, times)

    def kill(self, number: int) -> Outcome:
        """Makes a run of the measurement, killed until it ends."""
        name = list(self.kinds)[number % len(self.kinds)]
        kind, reference, turn = self.kinds[name], self.references[name], number // len(self.kinds)
        turns = -(-self.count // len(self.kinds))
        rng = random.Random(f"{self.seed}/{number}")
        outcome, out = Outcome(name), self.folder / f"{number:04}"
        lines_left = len(reference.times) - 1
        kills = rng.choice(self.kills)
        while outcome.starts < MOST_STARTS:
            run = self._start(kind, out, outcome.starts)
            outcome.starts += 1
            moment = reference.moment((turn + rng.random()) / turns)
            if outcome.kills:
                lines = rng.randrange(max(1, lines_left))
                moment = Moment(lines, rng.uniform(0, DELAY if lines else reference.times[0]))
            elif outcome.starts > 1:
                moment = Moment(0, moment.delay)
            if turn % 4 == 3:
                moment = Moment(min(moment.lines, max(0, lines_left - 8)), saves=rng.randint(1, 3))
            number_of_signal = SIGNALS[(turn + len(outcome.kills)) % len(SIGNALS)]
            is_killed = len(outcome.kills) < kills and run.wait(moment)
            if is_killed:
                outcome.kills.append(self._kill(run, kind, number_of_signal, rng))
            lines_left -= len(run.progress())
            code, left = run.end()
            text = run.log.read_text(errors="replace")
            if is_killed:
                outcome.kills[-1].exit_code = code
                outcome.failures += _wrong_code(kind, outcome.kills[-1], is_over="\ndone: " in text)
            elif code:
                outcome.failures.append(f"start {outcome.starts} ended with {code}, and nothing had killed it")
            outcome.failures += [f"process {pid} was left behind" for pid in left]
            outcome.failures += _wrong_output(kind, text, outcome.kills[-1] if is_killed else None)
            if code == 0 and (is_killed or outcome.kills or not kills):
                break
            if code == 0:  # the moment never came
                shutil.rmtree(out)
        else:
            outcome.failures.append(f"did not end in {MOST_STARTS} starts")
        outcome.failures += differences(reference.folder, out)
        if not outcome.failures:
            shutil.rmtree(out)
        return outcome

    def _kill(self, run: Watched, kind: Kind, number: signal.Signals, rng: random.Random) -> Kill:
        targets = ["the process", "all processes"] if kind.processes == 1 else ["torchrun", "one rank", "all processes"]
        if number == signal.SIGKILL and kind.processes > 1:
            targets.remove("torchrun")  # which leaves its workers alone: they train on
        to = rng.choice(targets)
        ranks = run.ranks(kind)
        if to == "one rank" and not ranks:  # all have ended
            to = "torchrun"
        pids = {"one rank": ranks and [rng.choice(ranks)], "all processes": run.processes()}
        where = run.place()
        run.signal(number, pids.get(to) or [run.process.pid])
        return Kill(number.name, to, where, None)


def _wrong_code(kind: Kind, kill: Kill, *, is_over: bool) -> Iterator[str]:
    """Complains of an exit code that is not the documented one."""
    number = -signal.Signals[kill.signal]
    right: set[int | None] = {EXIT_CODE} if kill.signal != "SIGKILL" else {number}
    if kill.where == "starting":
        right.add(number)  # Python has not come to the program yet
    if kind.processes > 1:
        right = {1} if kill.to == "one rank" else {1, number}
        if kind.restarts and kill.to != "torchrun":
            right = {0} if kill.to == "one rank" else right | {0}
    if is_over:
        right.add(0)  # it came too late
    if kill.exit_code not in right:
        wanted = " or ".join(map(str, sorted(right, key=str)))
        yield f"{kill.signal} to {kill.to} when {kill.where}: exit code {kill.exit_code}, not {wanted}"


def _wrong_output(kind: Kind, text: str, kill: Kill | None) -> Iterator[str]:
    """Complains of a traceback that the script is to blame for."""
    innocent: tuple[str, ...] = TORCHRUNS if kind.processes > 1 else ()
    if kill and kill.where == "starting":
        innocent += ("KeyboardInterrupt",)  # in Python's imports, before the program can hear
    if kill and kill.signal == "SIGKILL":
        innocent += LOADERS
    text = re.sub(r"^\[rank\d+\]: ", "", text, flags=re.MULTILINE)
    for trace in text.split("Traceback (most recent call last):\n")[1:]:
        error = next((line for line in trace.splitlines() if line[:1].strip()), "")
        if not any(name in error for name in innocent):
            yield f"traceback after {kill or 'a start'}: {error}"


def differences(one: Path, other: Path) -> list[str]:
    """What of two runs is not the same, but for clock and folder."""
    found = []
    here, there = ({file.name for file in folder.iterdir()} for folder in (one, other))
    found += [f"{name} is in one of the folders alone" for name in sorted(here ^ there)]
    for name in sorted(here & there):
        if name in COMPARED:
            found += _differ(name, *(torch.load(folder / name, weights_only=True) for folder in (one, other)))
        elif name.endswith(".jsonl"):
            found += _differ(name, *([*map(json.loads, (f / name).read_text().splitlines())] for f in (one, other)))
        elif name.startswith("evaluation_") and (one / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{name} differs")
    return found


def _differ(path: str, one: Any, other: Any) -> list[str]:
    if type(one) is not type(other):
        return [f"{path}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, list | tuple):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict):
        found = [f"{path}: {key!r} is in one alone" for key in one.keys() ^ other.keys()]
        same = [key for key in one if key in other and key not in CLOCK | PLACE]
        return found + [text for key in same for text in _differ(f"{path}/{key}", one[key], other[key])]
    if isinstance(one, torch.Tensor):
        about = [(tensor.dtype, tensor.shape) for tensor in (one, other)]
        is_same = about[0] == about[1] and _bits(one) == _bits(other)
    else:
        is_same = repr(one) == repr(other)  # which tells all floats apart, and no NaN from itself
    return [] if is_same else [f"{path}: {_shown(one)} and {_shown(other)}"]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _shown(value: Any) -> str:
    return f"a sum of {value.double().sum().item()!r}" if isinstance(value, torch.Tensor) else f"{value!r}"


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For each kind and signal: the runs that it killed, how many of them are as they should be, its kills and where.

    A run that several signals killed is counted with each of them.
    """
    rows = []
    for name in results["kinds"]:
        for number in SIGNALS:
            of_run = [
                (run, [kill["where"] for kill in run["kills"] if kill["signal"] == number.name])
                for run in results["runs"].values()
                if run["kind"] == name
            ]
            where = Counter(place for _, places in of_run for place in places)
            killed = [run for run, places in of_run if places]
            equal = sum(not run["failures"] for run in killed)
            rows.append(
                {"kind": name, "signal": number.name, "runs": len(killed), "equal": equal, "kills": where.total()}
                | {place: where[place] for place in PLACES}
            )
    return rows


def table(results: dict[str, Any]) -> str:
    """As Markdown: the summary, and the failures in words."""
    equal = sum(not run["failures"] for run in results["runs"].values())
    kills = sum(len(run["kills"]) for run in results["runs"].values())
    last = f"{equal} of {len(results['runs'])} runs, killed {kills} times, equal the runs that were not stopped"
    rows = [{name: str(value) for name, value in row.items()} for row in results["summary"]]
    return "\n".join([markdown(rows), "", last, *(f"- {failure}" for failure in results["failures"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0, help="of moments, signals and targets")
    parser.add_argument("--output", type=Path, default=RESULTS / "kill_and_resume.json", metavar="JSON")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    unfinished = args.output.with_suffix(".unfinished.json")  # untracked: it makes no commit dirty
    about = {"seed": args.seed, "runs_asked": args.runs, "kinds": {n: asdict(kind) for n, kind in KINDS.items()}}
    results: dict[str, Any] = environment("cpu") | about
    begun = json.loads(unfinished.read_text()) if unfinished.exists() else {}
    is_same = not results["commit"].endswith("-dirty") and results.items() <= begun.items()
    done: dict[str, Any] = begun["runs"] if is_same else {}
    with tempfile.TemporaryDirectory(prefix="kill_and_resume-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        runs = Runs(Path(folder), args.seed, args.runs)
        pool = ThreadPoolExecutor(args.jobs)
        try:
            list(tqdm(pool.map(runs.refer, KINDS), "without a stop", len(KINDS)))
            todo = {pool.submit(runs.kill, i): i for i in range(args.runs) if str(i) not in done}
            for future in tqdm(as_completed(todo), "killed", args.runs, initial=args.runs - len(todo)):
                done[str(todo[future])] = asdict(future.result())
                for failure in done[str(todo[future])]["failures"]:
                    tqdm.write(f"run {todo[future]}: {failure}", file=sys.stderr)
                unfinished.write_text(json.dumps(results | {"runs": done}))
        finally:
            pool.shutdown(cancel_futures=True)
    results["runs"] = {key: done[key] for key in sorted(done, key=int)}
    results["failures"] = [f"run {key}: {text}" for key, run in results["runs"].items() for text in run["failures"]]
    results["summary"] = summary(results)
    write(args.output, results)
    unfinished.unlink(missing_ok=True)
    print(f"\n{table(results)}")
    sys.exit(bool(results["failures"]))


if __name__ == "__main__":
    main()
