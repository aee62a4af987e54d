"""Means over seeds, and differences with their intervals, as tables print them."""

from collections.abc import Sequence
from statistics import fmean

from balanced_learning.training.reproduction.spreads import FEWEST, interval, mean, spread


def of_mean(numbers: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = spread(numbers)
    return "-" if not numbers else f"{mean(numbers):.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def of_difference(pairs: Sequence[float]) -> str:
    """Mean and interval, bold where the interval excludes zero, and the mean is not rounded to it."""
    middle, bounds = mean(pairs), interval(pairs)
    if middle is None:
        return "-"
    if bounds is None:
        return _signed(middle)
    return _bold(f"{_signed(middle)} [{_signed(bounds[0])}, {_signed(bounds[1])}]", middle, bounds)


def of_fewer(pairs: Sequence[float]) -> str:
    """The least and the largest mean when one pair is left out, each bold as in :func:`of_difference`."""
    if len(pairs) < FEWEST:
        return "-"
    fewer = sorted(([*pairs[:i], *pairs[i + 1 :]] for i in range(len(pairs))), key=sum)
    return " to ".join(_bold(_signed(fmean(each)), fmean(each), interval(each)) for each in (fewer[0], fewer[-1]))


def _bold(text: str, middle: float, bounds: tuple[float, float] | None) -> str:
    return f"**{text}**" if bounds and excludes_zero(bounds) and round(middle, 1) else text


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # + 0.0, or there would be -0.0


def excludes_zero(bounds: tuple[float, float]) -> bool:
    return bounds[0] > 0 or bounds[1] < 0
