"""The pictures that the documentation has of the study's results."""

from pathlib import Path
from textwrap import fill

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from _intervals import excludes_zero
from _study_results import (
    LIBRA,
    PARTS,
    PLAIN,
    Results,
    Situation,
    against_plain,
    counted,
    differences,
    label,
    title,
)
from _study_tables import CURVES, DIFFERENCES
from balanced_learning.training.reproduction.spreads import interval, mean
from docs.pictures import INK, OURS, STYLE, plt, save

OF_OTHERS, OF_SEEDS = "#0f766e", "#64748b"
ROW, HEAD = 0.31, 0.75  # of the differences, in inches
WIDTH, NO_BREAK = 36, "\N{NO-BREAK SPACE}"  # of the names of rows, in characters
LINES = {PLAIN: {"color": INK, "linestyle": "-"}, LIBRA: {"color": OURS, "linestyle": "--"}}


def draw(results: Results, docs: Path) -> None:
    """Writes the pictures that there are results for."""
    compared = {name: situation for name, situation in results.items() if against_plain(situation)}
    with mpl.rc_context(STYLE):
        if results:
            save(draw_curves(results), docs / CURVES)
        if compared:
            save(draw_differences(compared), docs / DIFFERENCES)


def draw_curves(results: Results) -> Figure:
    """AP over the epochs, plain and Libra: a thin line a seed, and a thick one for their mean."""
    columns = min(2, len(results))
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    for axis, (name, situation) in zip(axes.flat, results.items(), strict=False):
        for row, style in LINES.items():
            _plot_seeds(axis, situation, row, style)
        axis.set(title=title(name), xlabel="epochs trained", ylabel="AP in %", xlim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        if axis.has_data():
            low, high = axis.get_ylim()
            axis.set_ylim(low - 0.3 * (high - low), high)  # room for the legend
            axis.legend(loc="lower right", frameon=False)
    return figure


def _plot_seeds(axis: Axes, situation: Situation, row: str, style: dict[str, str]) -> None:
    seeds = situation["rows"].get(row, {}).get("seeds", {}).values()
    curves = [{epoch: ap for epoch, ap in run["curve"] if ap is not None} for run in seeds]
    for curve in curves:
        axis.plot(list(curve), list(curve.values()), **style, linewidth=0.7, alpha=0.6)  # type: ignore[arg-type]
    shared = [epoch for epoch in curves[0] if all(epoch in curve for curve in curves)] if curves else []
    if shared:
        means = [sum(curve[epoch] for curve in curves) / len(curves) for epoch in shared]
        name = f"{label(situation, row)}, {counted(len(curves))}"
        axis.plot(shared, means, **style, linewidth=2.2, label=name)  # type: ignore[arg-type]


def draw_differences(results: Results) -> Figure:
    """The paired differences to the plain detector: each seed, their mean, and the interval."""
    rows = {name: against_plain(situation) for name, situation in results.items()}
    heights = [ROW * len(of) + HEAD for of in rows.values()]
    figure, axes = plt.subplots(
        len(results),
        2,
        figsize=(9.2, sum(heights) + 0.5),
        height_ratios=heights,
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for line, (name, situation) in zip(axes, results.items(), strict=True):
        for axis, metric in zip(line, ("AP", "AP75"), strict=True):
            for y, row in enumerate(rows[name]):
                _plot_difference(axis, y, differences(situation, row, PLAIN, metric), row in PARTS)
            axis.axvline(0, color=INK, linewidth=0.9)
            axis.set_title(f"{title(name)}: {metric}", loc="left", fontsize=10, fontweight="bold")
            axis.grid(axis="x", alpha=0.3)
            axis.tick_params(axis="y", length=0)
            axis.tick_params(axis="x", labelbottom=True)
            axis.spines["left"].set_visible(False)
        line[0].set_yticks(range(len(rows[name])), [_named(situation, row) for row in rows[name]], fontsize=9)
        line[0].set_ylim(len(rows[name]) - 0.5, -0.5)
    for axis in axes[-1]:
        axis.set_xlabel("difference to plain in points")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _named(situation: Situation, row: str) -> str:
    count = len(differences(situation, row, PLAIN, "AP"))
    return fill(f"{label(situation, row)} ({counted(count).replace(' ', NO_BREAK)})", WIDTH)


def _plot_difference(axis: Axes, y: int, pairs: list[float], is_part: bool) -> None:
    color, marker = (OURS, "o") if is_part else (OF_OTHERS, "s")
    axis.plot(pairs, [y + 0.28] * len(pairs), "|", color=OF_SEEDS, markersize=5)
    middle, bounds = mean(pairs), interval(pairs)
    if bounds:
        axis.plot(bounds, (y, y), color=color, linewidth=2, solid_capstyle="butt")
    if middle is not None:
        is_filled = bounds is not None and excludes_zero(bounds)
        axis.plot(middle, y, marker, color=color, markerfacecolor=color if is_filled else "white", markersize=6)


def _legend() -> list[Line2D]:
    return [
        Line2D([], [], color=OURS, marker="o", linewidth=2, label="part of Libra, mean and 95 % interval"),
        Line2D([], [], color=OF_OTHERS, marker="s", linewidth=2, label="other rows"),
        Line2D(
            [],
            [],
            color=INK,
            marker="o",
            markerfacecolor="white",
            linestyle="",
            label="hollow: no interval, or it has 0",
        ),
        Line2D([], [], color=OF_SEEDS, marker="|", linestyle="", label="a seed"),
    ]
