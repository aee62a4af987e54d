"""What came out of the runs of a table, beside what was published: as JSON takes it."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from balanced_learning.training.config import PAPER_IMAGES
from balanced_learning.training.files import write_text
from balanced_learning.training.reproduction.folders import FREE, difference, is_finished, read_rows, read_settings
from balanced_learning.training.reproduction.hours import COCO, Images
from balanced_learning.training.reproduction.markdown import as_markdown
from balanced_learning.training.reproduction.options import given_settings
from balanced_learning.training.reproduction.plan import Cell, Job, Plan, Request
from balanced_learning.training.reproduction.published import Row, Table
from balanced_learning.training.reproduction.spreads import FEWEST, interval, mean, spread

Values = dict[str, float | None]  # by metric, in percent


def write_table(
    request: Request, table: Table, plan: Plan, images: Images, commit: str | None, failures: dict[Job, str]
) -> str:
    """Writes a table as JSON and Markdown, with what there is so far, and returns the Markdown.

    Args:
        request: that the table is part of.
        table: to write.
        plan: of the request.
        images: of the data.
        commit: of the programs, if they are in a checkout.
        failures: by job, the errors of those that have failed.

    Raises:
        UserError: if it cannot be written.
    """
    content = gather_table(request, table, plan, images, commit, failures)
    text = as_markdown(content)
    write_text(request.output_dir / f"{table.stem}.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(request.output_dir / f"{table.stem}.md", text)
    return text


def gather_table(
    request: Request, table: Table, plan: Plan, images: Images, commit: str | None, failures: dict[Job, str]
) -> dict[str, Any]:
    """As :func:`write_table`, but returns what the JSON holds."""
    runs = {
        row.name: {seed: _run(plan.cells[Cell(table.stem, row.name, seed)], table, failures) for seed in request.seeds}
        for row in table.rows
    }
    done = [run for of_row in runs.values() for run in of_row.values() if _is_done(run)]
    settings = [read_settings(Path(run["folder"])) for run in done]
    return {
        "table": table.number,
        "family": table.family,
        "title": table.title,
        "split": table.split,
        "metrics": list(table.metrics),
        "seeds": list(request.seeds),
        "data": f"{request.data_path or 'drawn shapes'}",
        "images": images._asdict(),
        "options": list(request.options),
        "versions": distinct([each.get("versions") for each in settings]),
        "device": "; ".join(distinct([device_of(each) for each in settings])),
        "commit": commit,
        "notes": [*table.notes, *_recipe_notes(table), *_notes(request, table, plan, images)],
        "rows": [_row(row, table, runs) for row in table.rows],
    }


def _run(job: Job, table: Table, failures: dict[Job, str]) -> dict[str, Any]:
    """A run with its metrics, if it is over; what was made with other settings is none."""
    about: dict[str, Any] = {"folder": f"{job.folder}", "epochs": job.config.training.epochs}
    if job in failures:
        return about | {"status": "failed", "error": failures[job]}
    if not is_finished(job) or difference(job):
        return about | {"status": "to do"}
    last = read_rows(job.folder)[-1]
    return about | {
        "status": "finished",
        "values": {metric: _in_percent(last.get(metric)) for metric in table.metrics},
    }


def _in_percent(value: Any) -> float | None:
    """The value of a metric, which is not defined where there is nothing to find."""
    is_known = isinstance(value, int | float) and math.isfinite(value)
    return round(100 * value, 6) if is_known else None


def _is_done(run: dict[str, Any]) -> bool:
    return run["status"] == "finished"


def _row(row: Row, table: Table, runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    measured = {metric: _by_seed(runs[row.name], metric) for metric in table.metrics}
    baseline = next((each for each in table.rows if each.name == row.baseline), None)
    return {
        "name": row.name,
        "label": row.label,
        "recipe": row.recipe,
        "baseline": row.baseline,
        "published": row.published,
        "runs": {f"{seed}": run for seed, run in runs[row.name].items()},
        "mean": {metric: mean(list(values.values())) for metric, values in measured.items()},
        "std": {metric: spread(list(values.values())) for metric, values in measured.items()},
        "difference": baseline
        and {
            metric: _difference(measured[metric], _by_seed(runs[baseline.name], metric), row, baseline, metric)
            for metric in table.metrics
        },
    }


def _by_seed(runs: dict[int, dict[str, Any]], metric: str) -> dict[int, float]:
    values = {seed: run["values"][metric] for seed, run in runs.items() if _is_done(run)}
    return {seed: value for seed, value in values.items() if value is not None}


def _difference(
    measured: dict[int, float], of_baseline: dict[int, float], row: Row, baseline: Row, metric: str
) -> dict[str, Any]:
    """The difference to the baseline: published, and of the seeds that both have."""
    seeds = [seed for seed in measured if seed in of_baseline]
    pairs = [measured[seed] - of_baseline[seed] for seed in seeds]
    both = [each.published.get(metric) for each in (row, baseline)]
    return {
        "published": None if None in both else round(both[0] - both[1], 1),  # type: ignore[operator]
        "mean": mean(pairs),
        "interval": interval(pairs),
        "seeds": seeds,
    }


def _recipe_notes(table: Table) -> list[str]:
    """The notes of the recipes, each with the rows that it is about."""
    rows = {note: [row.name for row in table.rows if row.note == note] for note in (row.note for row in table.rows)}
    return [f"{', '.join(names)}: {note}" for note, names in rows.items() if note]


def _notes(request: Request, table: Table, plan: Plan, images: Images) -> list[str]:
    notes = []
    few = [f"Differences have an interval from {FEWEST} seeds on."] if len(request.seeds) < FEWEST else []
    if any(row.takes_proposals for row in table.rows):
        source = request.proposals or "the RPN trained here"
        notes.append(
            f"The paper's proposals were not published. All rows share those of {source}, of which an image has 1,000 "
            "at most, as in the authors' runs."
        )
    if request.options:
        is_other = not FREE.issuperset(given_settings(request.options))
        end = ": not with the settings of the recipes." if is_other else "."
        notes.append(f"Trained with {shlex.join(request.options)}{end}")
    if not any(row.published for row in table.rows):
        return notes + few
    step = plan.cells[Cell(table.stem, table.rows[0].name, request.seeds[0])].images_per_step
    if step != PAPER_IMAGES:
        notes.append(f"A step has {step} images, not {PAPER_IMAGES} as in the paper.")
    if images != COCO:
        notes.append(
            f"Trained on {images.train:,} images and evaluated on {images.val:,}, not on COCO's {COCO.train:,} and "
            f"{COCO.val:,}: published and measured numbers are not of the same thing."
        )
    return notes + few


def device_of(settings: dict[str, Any]) -> str:
    """What a run trained on, from its ``args.json``."""
    gpu = settings.get("versions", {}).get("gpu", "")
    is_cpu = str(settings.get("device")) == "cpu" or gpu.startswith("none")
    count = settings.get("world_size", 1)
    return f"{count} x {'CPU' if is_cpu else gpu.split(', ')[0]}"


def distinct(values: list[Any]) -> list[Any]:
    """The values, each once, in their order; they need no hash."""
    return [value for i, value in enumerate(values) if value not in values[:i]]
