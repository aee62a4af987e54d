"""The runs that tables take: each a call of the training program, made once however many rows share it."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from balanced_learning.training.config import Config
from balanced_learning.training.errors import UserError, shown
from balanced_learning.training.reproduction.options import checked_options, count_gpus, settle
from balanced_learning.training.reproduction.published import Row, Table

PROPOSER = "paper/rpn_r50_1x"  # the RPN whose proposals the rows of Fast R-CNN share


@dataclass(frozen=True)
class Request:
    """The tables that are asked for, and how to train their rows.

    Attributes:
        tables: to make.
        seeds: of each row.
        output_dir: for the runs and the tables.
        program: that trains.
        rows: to train, of all tables; None: all.
        data_path: as the program takes it.
        options: flags of the program, over the recipes.
        processes: that train together; None: one on each GPU, or one on a CPU.
        proposals: to train Fast R-CNN on, in place of those of an RPN that is trained first.
    """

    tables: tuple[Table, ...]
    seeds: tuple[int, ...]
    output_dir: Path
    program: Path
    rows: tuple[str, ...] | None = None
    data_path: Path | None = None
    options: tuple[str, ...] = ()
    processes: int | None = None
    proposals: Path | None = None


@dataclass(frozen=True)
class Job:
    """A call of the training program.

    Attributes:
        title: the table and the row that it is for first, and its seed.
        config: the settings that it trains with.
        images_per_step: of all processes.
        command: what to call.
        note: of the recipe, if any.
        dumps: where it writes proposals, if that is what it does.
        needs: what has to be done before.
    """

    title: str
    config: Config
    images_per_step: int
    command: tuple[str, ...] = field(repr=False)
    note: str = ""
    dumps: Path | None = None
    needs: tuple["Job", ...] = ()

    @property
    def folder(self) -> Path:
        return self.config.run.output_dir

    @property
    def processes(self) -> int:
        training = self.config.training
        return self.images_per_step // (training.batch_size * training.accumulation_steps)


class Cell(NamedTuple):
    """A row of a table with a seed."""

    table: str
    row: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """The jobs in the order in which to do them, and the job of each row and seed, also of rows not to be trained."""

    jobs: tuple[Job, ...]
    cells: dict[Cell, Job]


def make_plan(request: Request) -> Plan:
    """Plans the runs of a request; those of one recipe and seed are one.

    Raises:
        UserError: for a row that no table has, and for options that the training program does not take or that are not
            for this one to choose.
    """
    _check_rows(request)
    planner = _Planner(request)
    cells = {
        Cell(table.stem, row.name, seed): planner.job_of(table, row, seed)
        for table in request.tables
        for seed in request.seeds
        for row in table.rows
    }
    asked = [job for cell, job in cells.items() if request.rows is None or cell.row in request.rows]
    jobs = {each.command: each for job in asked for each in (*job.needs, job)}
    return Plan(tuple(jobs.values()), cells)


def _check_rows(request: Request) -> None:
    names = list(dict.fromkeys(row.name for table in request.tables for row in table.rows))
    for name in request.rows or ():
        if name not in names:
            raise UserError(f"--rows {name}: the rows are {', '.join(names)}")


class _Planner:
    """Makes the jobs of a request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.options = checked_options(request.options)
        self.processes = request.processes or count_gpus(request.options)
        self.jobs: dict[tuple[str, int], Job] = {}

    def job_of(self, table: Table, row: Row, seed: int) -> Job:
        key = row.recipe, seed
        if key not in self.jobs:
            title = f"table {table.number}, {row.name}, seed {seed}"
            job = self._with_proposals(title, *key) if row.takes_proposals else self._job(title, *key)
            self.jobs[key] = replace(job, note=row.note)
        return self.jobs[key]

    def _with_proposals(self, title: str, recipe: str, seed: int) -> Job:
        if self.request.proposals:
            return self._job(title, recipe, seed, "--proposals", self.request.proposals)
        file = proposals_file(self.request.output_dir)
        return self._job(title, recipe, seed, "--proposals", file, needs=self._makers_of(file))

    def _makers_of(self, file: Path) -> tuple[Job, ...]:
        """The training of the RPN and its dump; where the proposals are there already, only the latter."""
        made_by = read_maker(file)
        seed = made_by["seed"] if made_by else self.request.seeds[0]
        key = PROPOSER, seed
        if key not in self.jobs:
            self.jobs[key] = self._job(f"RPN for tables 2, 4, 5 and 6, seed {seed}", *key)
        train = self.jobs[key]
        needs = () if made_by else (train,)
        title = f"proposals of the RPN, seed {seed}"
        command = (*train.command, "--dump-proposals", f"{file}")
        return (*needs, replace(train, title=title, command=command, dumps=file, needs=needs))

    def _job(self, title: str, recipe: str, seed: int, *more: object, **fields: Any) -> Job:
        request = self.request
        folder = request.output_dir / "runs" / recipe / f"seed_{seed}"
        words = ["--recipe", recipe, "--seed", f"{seed}", "--output-dir", f"{folder}", *map(str, more)]
        data = ["--data-path", f"{request.data_path}"] if request.data_path else []
        config, images = settle([*words, *data, *self.options], self.processes)
        if not (data or config.model.small):
            data = ["--data-path", "coco"]  # to be read in the command; without data, nothing large is trained
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{self.processes}"]
        launch = [sys.executable, *(launcher if self.processes > 1 else []), f"{request.program}"]
        return Job(title, config, images, (*launch, *words, *data, "--resume", "auto", *self.options), **fields)


def proposals_file(folder: Path) -> Path:
    """The proposals that the rows of Fast R-CNN share, in the folder of a reproduction."""
    return folder.absolute() / "proposals.npy"


def maker_file(proposals: Path) -> Path:
    """The settings of the RPN whose proposals those are, or will be."""
    return proposals.with_suffix(".json")


def read_maker(proposals: Path) -> dict[str, Any] | None:
    """What :func:`maker_file` holds, if the proposals are there.

    Raises:
        UserError: if it is not there, or holds something else.
    """
    file = maker_file(proposals)
    if not proposals.exists():
        return None
    if not file.exists():
        raise UserError(f"{proposals}: without {file.name}, whose are they? Pass them as --proposals, or remove them")
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if not isinstance(content, dict) or type(content.get("seed")) is not int:
        raise UserError(f"{file}: must have the settings of the RPN, got {shown(content)}")
    return content
