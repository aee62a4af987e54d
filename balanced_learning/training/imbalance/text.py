"""The report on imbalances as text: a block of figures for each level, beside the paper's, and what is advised."""

from collections.abc import Iterable, Sequence

from balanced_learning.training.imbalance.advice import Advice, decimal, likeness, percent, unevenness
from balanced_learning.training.imbalance.gathering import PAPER_ABOVE, PAPER_TO_OUTLIER, Measurements

Row = tuple[str, str, str]  # a figure, its value, and the paper's


def blocks(measured: Measurements, advices: Sequence[Advice]) -> str:
    """A block for each level, from the samples to the objective; the paper's figures are of COCO."""
    rows = (_sample_rows(measured), _feature_rows(measured), _objective_rows(measured))
    parts = [_block(advice, each) for advice, each in zip(advices, rows, strict=True)]
    if not measured.has_learned:
        parts.append(f"{too_young(measured)}. Measure a checkpoint of longer training, or raise --warm-up-steps.")
    return "\n\n".join(parts)


def too_young(measured: Measurements) -> str:
    """Why a detector that has not learned is not to be judged."""
    ap50 = percent(measured.evaluation.metrics.get("AP50"))
    return f"AP50 is {ap50}: the detector has hardly learned, and its figures say little"


def _block(advice: Advice, rows: Iterable[Row]) -> str:
    lines = [f"{advice.level} level: {advice.verdict} (strength {advice.strength:.2f})"]
    lines += [f"  {name:<58}{value:>8}" + (f"   paper: {paper}" if paper else "") for name, value, paper in rows]
    return "\n".join([*lines, f"  {advice.sentence}"])


def _sample_rows(measured: Measurements) -> list[Row]:
    level = measured.sample
    if level is None:
        return []
    above = {"hard": f"> {percent(PAPER_ABOVE['hard'])}", "random": f"about {percent(PAPER_ABOVE['random'])}"}
    rows = [
        (f"{name} negatives above IoU 0.05", percent(share), above.get(name, "")) for name, share in level.above.items()
    ]
    rows += [("sampled negatives that IoU-balanced sampling changes", percent(level.changed), "")]
    rows += [("images with no more negatives than are sampled", percent(level.few_candidates), "")]
    empty = [
        (f"images where bin {number} is empty", percent(share), "") for number, share in enumerate(level.empty_bins, 1)
    ]
    return rows + empty


def _feature_rows(measured: Measurements) -> list[Row]:
    level = measured.feature
    contribution = zip(level.levels, level.boxes, level.contribution.tolist(), strict=True)
    rows = [
        (
            f"{name}, {percent(boxes)} of the boxes; from {' '.join(level.body_maps)}",
            " ".join(percent(share).replace(" %", "") for share in shares),
            "",
        )
        for name, boxes, shares in contribution
    ]
    rows += [("share to come from other maps, for all to count alike", percent(unevenness(level)), "")]
    rows += [("likeness of the levels before integration (linear CKA)", decimal(likeness(level.likeness_before)), "")]
    rows += [("the same after it", decimal(likeness(level.likeness_after)), "")]
    return rows


def _objective_rows(measured: Measurements) -> list[Row]:
    level, metrics = measured.objective, measured.evaluation.metrics
    lost = measured.costs()["localisation"]
    return [
        ("coordinates that are inliers", percent(level.inliers), ""),
        ("their part of the box gradient, smooth L1", percent(level.of_total), ""),
        ("the same of each box, mean", percent(level.of_sample), ""),
        ("their part of the box gradient, balanced L1", percent(level.of_total_balanced), ""),
        (
            "mean gradient of an inlier / of an outlier",
            percent(level.to_outlier),
            f"{percent(PAPER_TO_OUTLIER)}, of beta 1",
        ),
        ("the gradient of balanced L1 / of smooth L1", decimal(level.growth), ""),
        ("box loss / classification loss", decimal(level.ratio), ""),
        ("AP50", percent(metrics.get("AP50")), ""),
        ("AP75", percent(metrics.get("AP75")), ""),
        ("AP50 minus AP75", percent(measured.difference), ""),
        ("AP50 lost to localisation (TIDE)", percent(lost), ""),
        ("its share of all errors' costs", percent(measured.localisation_share()), ""),
    ]
