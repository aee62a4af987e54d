"""What the measurements of a detector say of each part of Libra R-CNN: a verdict, and a sentence with flags to try."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from balanced_learning.detection.imbalance.feature_level import FeatureLevel
from balanced_learning.detection.imbalance.objective_level import ObjectiveLevel
from balanced_learning.detection.imbalance.sample_level import SampleLevel
from balanced_learning.training.config import Config
from balanced_learning.training.imbalance.gathering import Measurements
from balanced_learning.training.model import smooth_l1

# Strengths from which a part is said to do a little, and from which it can help: a rule of thumb.
LITTLE, CAN_HELP = 0.05, 0.15
MOST = 0.5  # of the images, or of the gradient: from here on a sentence tells of it
LARGER = 1.2  # multiple of the box gradient from which the sentence tells that balanced L1 is a larger loss, too


@dataclass(frozen=True)
class Advice:
    """What is advised at a level.

    Attributes:
        level: ``"sample"``, ``"feature"`` or ``"objective"``.
        verdict: ``"can help"``, ``"little"`` or ``"nothing"``, of the level's part of Libra R-CNN, be it on or off.
        strength: what the verdict rests on, from 0 to 1.
        sentence: for people.
        flag: of the training program, that switches the part on, or off where it is on, whatever the verdict; or the
            one that the sentence names in its place.
        knob: the flag to turn next.
    """

    level: str
    verdict: str
    strength: float
    sentence: str
    flag: str | None
    knob: str | None


def advise(measured: Measurements, config: Config) -> list[Advice]:
    """What is advised at each level, from the samples to the objective."""
    metrics = measured.evaluation.metrics
    return [
        advise_sampler(measured.sample, config),
        advise_pyramid(measured.feature, config),
        advise_box_loss(measured.objective, metrics.get("AP50"), metrics.get("AP75"), config),
    ]


def advise_sampler(level: SampleLevel | None, config: Config) -> Advice:
    """Of IoU-balanced sampling.

    The strength is the share of the sampled negatives that it changes, or how much more of them become like the hard
    ones by IoU, whichever is less.
    """
    if level is None:
        sentence = "Nothing to balance: a RetinaNet learns from all anchors, and samples none."
        return Advice("sample", "nothing", 0.0, sentence, None, None)
    is_on = config.model.sampler
    flag, knob = _switch("sampler", is_on), "--num-bins"
    strength = _least(level.changed, approach(level))
    verdict = verdict_of(strength)
    part = "IoU-balanced sampling, which is on," if is_on else "IoU-balanced sampling"
    does = f"{part} changes {percent(level.changed)} of the negatives that the second stage learns from"
    if math.isnan(level.changed):
        sentence = "Not measured: there is nothing to sample from."
    elif level.changed < LITTLE and level.few_candidates >= MOST:
        flag, knob = "--box-batch-size-per-image", "--rpn-post-nms-top-n-train"
        few = f"in {percent(level.few_candidates)} of the images all negatives are taken either way"
        sentence = f"Nothing to balance: {few}. Lower {flag}, or raise {knob}."
    elif level.changed < LITTLE:
        sentence = f"Nothing to balance: {does}."
    elif verdict == "nothing":
        makes = "hardly makes" if approach(level) > 0 else "does not make"
        random, balanced = (percent(_overlap(level, name)) for name in ("random", "IoU-balanced"))
        alike = f"by IoU, {random} of random and {balanced} of IoU-balanced ones are like those"
        sentence = f"{does}, but {makes} them more like the hard ones: {alike}."
    else:
        bins = f"{knob} ({config.libra.num_bins} now)" if is_on else f"{knob} 2 to 5"
        sentence = f"{does}, which {_outlook(verdict, is_on, flag, bins)}{_empty_bin(level.empty_bins)}"
    return Advice("sample", verdict, strength, sentence, flag, knob)


def approach(level: SampleLevel) -> float:
    """How much larger a share of IoU-balanced negatives is like the hard ones, by IoU, than of random ones."""
    return _overlap(level, "IoU-balanced") - _overlap(level, "random")


def _overlap(level: SampleLevel, name: str) -> float:
    """The share of these negatives that lie, by IoU, where hard ones do: the overlap of the two histograms."""
    return torch.minimum(level.shares[name], level.shares["hard"]).sum().item()


def _empty_bin(shares: list[float]) -> str:
    share, number = max((share, number) for number, share in enumerate(shares, 1))
    return f" Bin {number} of {len(shares)} is empty in {percent(share)} of the images." if share >= MOST else ""


def advise_pyramid(level: FeatureLevel, config: Config) -> Advice:
    """Of the balanced pyramid.

    The strength is the share of what detections use that would have to come from other maps of the backbone, to use all
    alike, or how unlike the levels are, whichever is less. A pyramid that is on has mended that: then it is by how much
    more alike it makes them.
    """
    is_on = config.model.pyramid
    flag, knob = _switch("pyramid", is_on), "--refine"
    uneven = unevenness(level)
    before, after = likeness(level.likeness_before), likeness(level.likeness_after)
    strength = _least(after - before) if is_on else _least(uneven, 1 - before)
    verdict = verdict_of(strength)
    uses = f"{percent(uneven)} of what detections use would have to come from other maps of the backbone"
    if math.isnan(before) or (math.isnan(uneven) and not is_on):
        sentence = "Not measured: there is no object to follow, or only one level."
    elif is_on:
        changes = "raises" if after >= before else "lowers"
        does = (
            f"The balanced pyramid, which is on, {changes} the likeness of the levels from {before:.2f} to {after:.2f}"
        )
        nothing = f"{does}, and so hardly brings them together. {flag} tells whether it helps all the same."
        sentence = nothing if verdict == "nothing" else f"{does}, which {_outlook(verdict, is_on, flag, knob)}"
    else:
        found = f"{uses} for all to count alike, and the likeness of the levels is {before:.2f} of 1"
        outlook = f"a balanced pyramid {_outlook(verdict, is_on, flag, knob)}"
        sentence = f"Nothing to balance: {found}." if verdict == "nothing" else f"{found}: {outlook}"
    return Advice("feature", verdict, strength, sentence, flag, knob)


def unevenness(level: FeatureLevel) -> float:
    """The share of what detections use that would have to come from other maps of the backbone, to use all alike."""
    rows, num_maps = level.contribution.tolist(), level.contribution.shape[1]
    known = [(boxes, row) for boxes, row in zip(level.boxes, rows, strict=True) if not math.isnan(row[0])]
    moved = math.fsum(boxes * sum(max(0.0, share - 1 / num_maps) for share in row) for boxes, row in known)
    return moved / math.fsum(boxes for boxes, _ in known) if known else math.nan


def likeness(matrix: Tensor) -> float:
    """The mean over all pairs of two different levels that are known. [L, L] to a number"""
    others = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
    return others.nanmean().item()


def advise_box_loss(level: ObjectiveLevel, ap50: float | None, ap75: float | None, config: Config) -> Advice:
    """Of balanced L1.

    The strength is by how much it raises the inliers' share of the box gradient, or the share of AP50 that is lost at
    an IoU of 0.75, whichever is less.
    """
    is_on = config.model.box_loss
    flag, knob = _switch("box-loss", is_on), "--alpha, --gamma"
    gain, lost = raised_share(level), lost_share(ap50, ap75)
    strength = _least(gain) if math.isnan(lost) else _least(gain, lost)
    verdict = verdict_of(strength)
    part = "balanced L1, which is on" if is_on else "balanced L1"
    own, balanced = percent(level.of_total), percent(level.of_total_balanced)
    beta = smooth_l1(config).beta
    smooth = f"smooth L1 of beta {beta:.2g}" if beta else "L1"
    shares = f"inliers give {own} of the box gradient under {smooth} and {balanced} under {part}"
    losses = "" if math.isnan(lost) else f"{percent(lost)} of AP50 is lost at an IoU of 0.75"
    weight = level.growth * config.libra.box_loss_weight
    larger = (
        f" Balanced L1 is a larger loss, too: its gradient is {level.growth:.1f} times that of {smooth}, which "
        f"--box-loss-weight {weight:.2g} would make as large."
        if level.growth >= LARGER
        else ""
    )
    if math.isnan(gain):
        sentence = "Not measured: there is no box to learn from."
    elif gain < LITTLE:
        start = "Nothing to balance" if level.of_total >= MOST else "Balanced L1 does not mend this"
        sentence = f"{start}: {shares}."
        is_heavier_better = lost >= CAN_HELP and level.ratio < 1
        if larger or is_heavier_better:
            knob = "--box-loss-weight"
        if lost >= CAN_HELP and not larger:
            sentence += f" But {losses}{f': a larger {knob} is worth a try' if is_heavier_better else ''}."
    elif verdict == "nothing":
        sentence = f"{_sentence(shares)}, but boxes are tight: {losses}."
    else:
        outlook = f"balanced L1 {_outlook(verdict, is_on, flag, knob)}"
        sentence = f"{_sentence(shares)}{losses and f', and {losses}'}: {outlook}"
    return Advice("objective", verdict, strength, f"{sentence}{larger}", flag, knob)


def raised_share(level: ObjectiveLevel) -> float:
    """By how much balanced L1 raises the inliers' share of the box gradient."""
    return level.of_total_balanced - level.of_total


def lost_share(ap50: float | None, ap75: float | None) -> float:
    """The share of AP50 that is lost at an IoU of 0.75; NaN where that is not known."""
    return (ap50 - ap75) / ap50 if ap50 and ap75 is not None else math.nan


def _least(*values: float) -> float:
    """The least of them, from 0 to 1; 0 if one is not known."""
    return 0.0 if any(map(math.isnan, values)) else min(1.0, max(0.0, min(values)))


def _switch(part: str, is_on: bool) -> str:
    """The flag that changes whether a part is on."""
    return f"--no-{part}" if is_on else f"--{part}"


def _outlook(verdict: str, is_on: bool, flag: str, knob: str) -> str:
    """The end of a sentence whose subject is a part, or what it does."""
    found = "can help" if verdict == "can help" else "can help a little"
    return f"{found}. {f'{flag} tells by how much' if is_on else f'Try {flag}'}; to tune it: {knob}."


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def verdict_of(strength: float) -> str:
    """What is said of a part with this strength."""
    return "can help" if strength >= CAN_HELP else "little" if strength >= LITTLE else "nothing"


def percent(share: float | None, digits: int = 0) -> str:
    """A share as text, "-" where it is not known."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def decimal(value: float) -> str:
    """A number as text, "-" where it is not known."""
    return "-" if math.isnan(value) else f"{value:.2f}"
