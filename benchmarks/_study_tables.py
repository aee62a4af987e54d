"""The tables that the documentation has of the study's results."""

import shlex
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from _common import markdown
from _intervals import of_difference, of_fewer, of_mean
from _study_results import (
    BOX_LOSS,
    LIBRA,
    PAPERS_PLAIN,
    PARTS,
    PLAIN,
    Results,
    Situation,
    against_plain,
    compared,
    counted,
    differences,
    label,
    ordered,
    title,
    values,
)
from balanced_learning.training.tide import KINDS

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
COSTS = tuple(f"dAP50/{kind}" for kind in KINDS)
OTHER_LOSSES = (PLAIN, PAPERS_PLAIN, "smooth_l1_w1.5", "smooth_l1_w2", "l1")
SHARES = {words: Fraction(words) for words in ("1/4", "1/3", "1/2", "2/3", "3/4", "1")}  # of the epochs
NOTHING = "No run is finished yet."
CURVES, DIFFERENCES = "images/study_curves.svg", "images/study_differences.svg"  # beside the page


def table(results: Results) -> str:
    """The README's: what each part changes of AP in each situation."""
    measured = {name: situation for name, situation in results.items() if against_plain(situation)}
    parts = {part: _of_part(measured, part) for part in PARTS if part != "sampler_pyramid"}
    rows = []
    for name, situation in measured.items():
        pairs = {words: differences(situation, part, PLAIN, "AP") for part, words in parts.items() if words}
        rows.append(
            {
                "data and start": title(name),
                "seeds": _range([len(each) for each in pairs.values() if each]),
                "AP plain": of_mean(list(values(situation, PLAIN, "AP").values())),
                **{words: of_difference(each) for words, each in pairs.items()},
                "all, over smooth L1 of beta 1": of_difference(differences(situation, LIBRA, PAPERS_PLAIN, "AP")),
            }
        )
    return markdown(rows, words=1) if rows else NOTHING


def _of_part(results: Results, part: str) -> str | None:
    """What a part is called, if it is anywhere."""
    return next((label(each, part) for each in results.values() if part in each["rows"]), None)


def _range(numbers: list[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def blocks(results: Results) -> dict[str, str]:
    """The parts of the study's page, by the names of their markers."""
    return {
        "set-up": _set_up(results),
        "commands": _commands(results),
        "differences": f"![Differences to the plain detector with their intervals]({DIFFERENCES})"
        if any(map(against_plain, results.values()))
        else NOTHING,
        "curves": f"![AP over the epochs of the plain and the Libra detector, a line a seed]({CURVES})"
        if results
        else NOTHING,
        "convergence": _convergence(results),
        "results": "\n\n".join(_results(name, situation) for name, situation in results.items()) or NOTHING,
        "box loss": _box_loss(results),
    }


def _set_up(results: Results) -> str:
    rows = []
    for name, situation in results.items():
        of, images = situation["settings"], situation["images"]
        rows.append(
            {
                "situation": title(name),
                "images to train on": f"{images['train']:,}",
                "to evaluate": f"{images['val']:,}",
                "backbone starts from": "chance" if of["weights_backbone"] in (None, "none") else "ImageNet",
                "sides in pixels": f"{of['min_size']}, at most {of['max_size']}",
                "epochs": f"{of['epochs']}",
                "images a step": f"{of['batch_size']}",
                "optimizer": f"{of['opt']}, {of['lr']:g}, {of['lr_scheduler']}",
                "device": ", ".join(situation["devices"]),
                "commit": ", ".join((commit or "-")[:12] for commit in situation["commits"]),
            }
        )
    return markdown(rows, words=1) if rows else NOTHING


def _commands(results: Results) -> str:
    lines = [_command(name, situation) for name, situation in results.items()]
    lines.append(f".venv/bin/python benchmarks/study.py {' '.join(f'runs/{name}' for name in results)}".rstrip())
    return "\n".join(["```", *lines, "```"])


def _command(name: str, situation: Situation) -> str:
    """What trains the rows of a situation."""
    rows = [] if situation["is_whole"] else ["--rows", *ordered(situation)]
    seeds = sorted({seed for row in situation["rows"].values() for seed in row["seeds"]}, key=int)
    words = ["--table", "study", *rows, "--seeds", *seeds, "--data-path", situation["data"]]
    words += ["--output-dir", f"runs/{name}", *(["--", *situation["options"]] if situation["options"] else [])]
    return f".venv/bin/python examples/reproduce.py {shlex.join(words)}"


def _convergence(results: Results) -> str:
    """Mean AP after shares of the epochs."""
    rows = []
    for name, situation in results.items():
        for row in (PLAIN, PAPERS_PLAIN, LIBRA):
            seeds = situation["rows"].get(row, {}).get("seeds", {}).values()
            if seeds:
                aps = {f"AP at {words}": [_ap_at(run, share) for run in seeds] for words, share in SHARES.items()}
                rows.append(
                    {
                        "situation": title(name),
                        "row": label(situation, row),
                        **{words: "-" if None in each else of_mean(each) for words, each in aps.items()},  # type: ignore[arg-type]
                    }
                )
    return markdown(rows, words=2) if rows else NOTHING


def _ap_at(run: dict[str, Any], share: Fraction) -> float | None:
    """The AP that was measured when this share of the epochs was trained, if it was then."""
    last = run["curve"][-1][0]
    return next((ap for epoch, ap in run["curve"] if epoch == share * last), None)


def _results(name: str, situation: Situation) -> str:
    means = [
        {
            "row": f"{label(situation, row)} (`{row}`)",
            "seeds": counted(len(situation["rows"][row]["seeds"])),
            **{metric: of_mean(list(values(situation, row, metric).values())) for metric in METRICS},
        }
        for row in ordered(situation)
    ]
    parts = [f"### {title(name)}", "Mean ± standard deviation over the seeds:", markdown(means, words=1)]
    if compared(situation):
        changed = _differences(situation, METRICS)
        for cells, pair in zip(changed, compared(situation), strict=True):
            cells["AP without one seed"] = of_fewer(differences(situation, *pair, "AP"))
        cost = {"row": label(situation, PLAIN), "against": "", "seeds": ""} if PLAIN in situation["rows"] else {}
        if cost:
            cost["seeds"] = counted(len(situation["rows"][PLAIN]["seeds"]))
            cost |= {_kind(metric): of_mean(list(values(situation, PLAIN, metric).values())) for metric in COSTS}
        costs = [*([cost] if cost else []), *_differences(situation, COSTS)]
        parts += ["Paired differences:", markdown(changed, words=2)]
        parts += [
            "What the kinds of error cost in AP50, and how much that changes; less is better:",
            markdown(costs, words=2),
        ]
    return "\n\n".join(parts)


def _differences(situation: Situation, metrics: Sequence[str]) -> list[dict[str, str]]:
    return [
        {
            "row": label(situation, row),
            "against": f"`{against}`",
            "seeds": counted(len(differences(situation, row, against, "AP"))),
            **{_kind(metric): of_difference(differences(situation, row, against, metric)) for metric in metrics},
        }
        for row, against in compared(situation)
    ]


def _kind(metric: str) -> str:
    return metric.rpartition("/")[2]


def _box_loss(results: Results) -> str:
    """What balanced L1 has over each of the other box losses."""
    rows = [
        {
            "situation": title(name),
            "balanced L1 minus": label(situation, other),
            "seeds": counted(len(differences(situation, BOX_LOSS, other, "AP"))),
            **{metric: of_difference(differences(situation, BOX_LOSS, other, metric)) for metric in METRICS},
        }
        for name, situation in results.items()
        for other in OTHER_LOSSES
        if differences(situation, BOX_LOSS, other, "AP")
    ]
    return markdown(rows, words=2) if rows else "No two box losses have a finished run yet."
