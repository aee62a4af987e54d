"""Means, spreads, and what can be said of a difference from a few seeds."""

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
FEWEST = 3  # pairs that an interval takes


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; of one value there is none."""
    return statistics.stdev(values) if len(values) > 1 else None


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The interval of Student's t that holds the mean of paired differences with 95 %, of three or more.

    The quantile is SciPy's.
    """
    if len(differences) < FEWEST:
        return None
    from scipy.stats import t  # type: ignore[import-untyped]  # takes a second

    middle, free = statistics.fmean(differences), len(differences) - 1
    half = float(t.ppf((1 + CONFIDENCE) / 2, free)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return middle - half, middle + half
