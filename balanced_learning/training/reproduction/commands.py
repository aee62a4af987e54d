"""The commands of a plan, and the hours that they will take."""

import shlex

from balanced_learning.training.reproduction.folders import is_finished
from balanced_learning.training.reproduction.hours import Images, Measured, Throughput, estimate_hours
from balanced_learning.training.reproduction.plan import Plan


def print_commands(plan: Plan, images: Images, images_per_second: float | None) -> None:
    """Prints a plan so that a shell can read it: a comment on each run, its command, and the sum of the hours.

    Args:
        plan: what is to be done.
        images: of the data.
        images_per_second: of a run; None: as measured on the device that it would be on.
    """
    told = Throughput(images_per_second, images_per_second) if images_per_second else None
    measured = Measured(plan.jobs[0].config.run.device)
    source = "as told" if told else f"as measured on {measured.name}, without what it takes to read images"
    print(f"# {images.train:,} images to train on, {images.val:,} to evaluate; throughput {source}")
    total = 0.0
    for number, job in enumerate(plan.jobs, 1):
        place = f"# {number} of {len(plan.jobs)}: {job.title}"
        if is_finished(job):
            print(f"{place}: finished\n# {shlex.join(job.command)}")
            continue
        throughput = told or measured.of(job)
        hours = estimate_hours(job, images, throughput)
        total += hours
        speed = f" ({throughput.training:.3g} images/s in training, {throughput.evaluation:.3g} in evaluation)"
        note = f"\n# note: {job.note}" if job.note else ""
        print(f"{place}: {_in_words(hours)}{'' if told else speed}{note}\n{shlex.join(job.command)}", flush=True)
    print(f"# in all {_in_words(total)}")


def _in_words(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
