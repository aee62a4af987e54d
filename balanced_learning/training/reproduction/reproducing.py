"""Does the jobs of a plan, one after the other, and keeps the tables up to date."""

import subprocess
import sys
import time
from pathlib import Path

from balanced_learning.training.errors import UserError
from balanced_learning.training.files import make_folder
from balanced_learning.training.reproduction.folders import is_finished, note_maker
from balanced_learning.training.reproduction.hours import Images
from balanced_learning.training.reproduction.plan import Job, Plan, Request
from balanced_learning.training.reproduction.results import write_table
from balanced_learning.training.reproduction.running import run_job
from balanced_learning.training.signals import StopSignals


class Reproduction:
    """The runs that a request takes, and its tables.

    Args:
        request: what is asked for.
        plan: of it.
        images: of its data.
    """

    def __init__(self, request: Request, plan: Plan, images: Images) -> None:
        self.request = request
        self.plan = plan
        self.images = images
        self.commit = find_commit(request.program.parent)
        self.failures: dict[Job, str] = {}

    def run(self, signals: StopSignals) -> None:
        """Does what is left to do, writes the tables before the first run and after each, and prints them at the end.

        Raises:
            Stopped: after a signal.
            UserError: if runs have failed, when all others are done.
        """
        make_folder(self.request.output_dir)
        tables = self._write_tables()  # if that cannot be, it is known before days of training
        jobs, took = self.plan.jobs, list[float]()
        left = [job for job in jobs if not is_finished(job)]
        for number, job in enumerate(left):
            hours = sum(took) / len(took) * (len(left) - number) / 3600 if took else None
            place = f"run {len(jobs) - len(left) + number + 1} of {len(jobs)}"
            print(f"{place}: {job.title}{f'; about {hours:.1f} h left' if hours else ''}", flush=True)
            start = time.monotonic()
            if error := self._do(job, signals):
                self.failures[job] = error
                print(f"failed: {job.title}: {error}", file=sys.stderr, flush=True)
            else:
                took.append(time.monotonic() - start)
            tables = self._write_tables()
        print("\n".join(tables))
        if self.failures:
            raise UserError(f"{len(self.failures)} of {len(jobs)} runs failed; the same command tries them again")

    def _do(self, job: Job, signals: StopSignals) -> str | None:
        """Does a job, and returns what is wrong if it cannot be done."""
        for needed in job.needs:
            if needed in self.failures:
                return f"{needed.title}: failed"
        note_maker(job)
        if error := run_job(job, signals):
            return error
        return None if is_finished(job) else "it ended before its last epoch"

    def _write_tables(self) -> list[str]:
        rest = self.plan, self.images, self.commit, self.failures
        return [write_table(self.request, table, *rest) for table in self.request.tables]


def find_commit(folder: Path) -> str | None:
    """The commit that a folder is a checkout of, with what is told of changes to it; None if it is none."""
    command = ["git", "-C", f"{folder}", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
