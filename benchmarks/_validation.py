"""The study's answer to whether the report on imbalances predicts which part of Libra R-CNN helps."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from _common import markdown
from _intervals import of_difference
from _study_results import BOX_LOSS, PAPERS_PLAIN, PLAIN, Results, counted, differences, title
from balanced_learning.training.imbalance.advice import verdict_of
from balanced_learning.training.reproduction.spreads import interval, mean

# What is measured, and of each part that was added to it the level of the report that speaks of it.
BASELINES = {
    PLAIN: {"sampler": "sample", "pyramid": "feature", BOX_LOSS: "objective"},
    PAPERS_PLAIN: {BOX_LOSS: "objective"},
}
FEWEST = 4  # points that a correlation takes
MARGIN = 0.5  # AP in points; less is no help
NOTHING = "No report is made yet."

Validation = dict[str, Any]  # as benchmarks/results/imbalance_validation.json has it


@dataclass(frozen=True)
class Point:
    """A part in a situation: what was predicted, and what came of it.

    Attributes:
        situation: its name.
        part: the row that has it.
        baseline: the row that it was added to, and whose detectors were measured.
        strengths: of the reports, a seed each.
        gains: in AP, of the seeds that have both rows, with or without a report.
        figures: that the strength rests on, means over the reports.
    """

    situation: str
    part: str
    baseline: str
    strengths: list[float]
    gains: list[float]
    figures: dict[str, float | None]

    @property
    def strength(self) -> float:
        return statistics.fmean(self.strengths)

    @property
    def gain(self) -> float:
        """The mean; there must be one."""
        return statistics.fmean(self.gains)

    @property
    def verdict(self) -> str:
        return verdict_of(self.strength)

    @property
    def helped(self) -> bool | None:
        """Whether the interval of the gain lies above 0, or else below the margin; None if neither, or without one."""
        bounds = interval(self.gains)
        if bounds is None:
            return None
        return True if bounds[0] > 0 else False if bounds[1] < MARGIN else None

    @property
    def is_right(self) -> bool | None:
        """Whether the verdict is that something helps where it did, or "nothing" where it did not; None: undecided."""
        return None if self.helped is None else self.helped == (self.verdict != "nothing")


def points(results: Validation, study: Results) -> list[Point]:
    """All parts of all situations that there is a report for, with what they did in the study."""
    found = []
    for name, rows in results.items():
        for baseline, parts in BASELINES.items():
            for part in parts if rows.get(baseline) else ():
                seeds = [of_seed[part] for of_seed in rows[baseline].values()]
                gains = differences(study[name], part, baseline, "AP") if name in study else []
                figures = {figure: _mean([each["figures"][figure] for each in seeds]) for figure in seeds[0]["figures"]}
                found.append(Point(name, part, baseline, [each["strength"] for each in seeds], gains, figures))
    return found


def _mean(numbers: list[float | None]) -> float | None:
    return mean([number for number in numbers if number is not None])


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None of fewer than four pairs, or where one side is the same in all.

    It is SciPy's.
    """
    if len(first) < FEWEST or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    from scipy.stats import spearmanr  # type: ignore[import-untyped]  # takes a second

    return float(spearmanr(first, second).statistic)


def block(results: Validation, study: Results) -> str:
    """The part of the study's page."""
    found = points(results, study)
    return "\n\n".join([_table(found), _answer(found), _figures(found)]) if found else NOTHING


def _table(found: list[Point]) -> str:
    words = {True: "right", False: "wrong", None: "undecided"}
    rows = [
        {
            "situation": title(point.situation),
            "part": f"`{point.part}`",
            "added to": f"`{point.baseline}`",
            "figures": ", ".join(f"{name} {_decimal(value)}" for name, value in point.figures.items()),
            "verdict": point.verdict,
            "judged": words[point.is_right],
            "strength": _decimal(point.strength),
            "reports": counted(len(point.strengths)),
            "gain in AP": of_difference(point.gains),
            "pairs": counted(len(point.gains)) if point.gains else "-",
        }
        for point in found
    ]
    return markdown(rows, words=6)


def _answer(found: list[Point]) -> str:
    decided = [point for point in found if point.helped is not None]
    helped, right = sum(point.helped is True for point in decided), sum(point.is_right is True for point in decided)
    gained = [point for point in found if point.gains]
    rho = correlation([point.strength for point in gained], [point.gain for point in gained])
    of_verdicts = (
        f"The verdict is right in {right} of {len(decided)} cases that are decided. To say of every part that it "
        f"helps would be right in {helped} of them, and of none in {len(decided) - helped}."
    )
    number = f"{len(gained)} point{'' if len(gained) == 1 else 's'}"
    of_strengths = f"Spearman's rank correlation of strength and gain over {number}: {_signed(rho)}."
    return f"{of_verdicts if decided else 'No case is decided yet.'} {of_strengths}"


def _figures(found: list[Point]) -> str:
    """The correlation of each figure with the gain, over the points that have it."""
    rows = []
    for figure in dict.fromkeys(name for point in found for name in point.figures):
        having = [point for point in found if point.gains and point.figures.get(figure) is not None]
        rho = correlation([point.figures[figure] or 0.0 for point in having], [point.gain for point in having])
        parts = dict.fromkeys(f"`{point.part}`" for point in found if figure in point.figures)
        rows.append(
            {
                "figure": figure,
                "of": ", ".join(parts),
                "points": f"{len(having)}",
                "correlation with the gain": _signed(rho),
            }
        )
    return markdown(rows, words=2)


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "none" if value is None else f"{value:+.2f}"
