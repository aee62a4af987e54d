"""Means over seeds, and differences with their intervals, as tables print them."""

from collections.abc import Sequence

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
    text = f"{_signed(middle)} [{_signed(bounds[0])}, {_signed(bounds[1])}]"
    return f"**{text}**" if excludes_zero(bounds) and round(middle, 1) else text


def of_fewer(pairs: Sequence[float]) -> str:
    """The least and the largest mean of what is left when one pair is left out."""
    if len(pairs) < FEWEST:
        return "-"
    means = [(sum(pairs) - pair) / (len(pairs) - 1) for pair in pairs]
    return f"{_signed(min(means))} to {_signed(max(means))}"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # + 0.0, or there would be -0.0


def excludes_zero(bounds: tuple[float, float]) -> bool:
    return bounds[0] > 0 or bounds[1] < 0
