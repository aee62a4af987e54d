"""What the measurements of a detector say of each part of Libra R-CNN: a verdict, and a sentence with flags to try."""

import math
from dataclasses import dataclass

from balanced_learning.detection.imbalance.feature_level import FeatureLevel
from balanced_learning.detection.imbalance.objective_level import ObjectiveLevel
from balanced_learning.detection.imbalance.sample_level import SampleLevel
from balanced_learning.training.config import Config, ModelConfig
from balanced_learning.training.imbalance.gathering import Measurements

# Strengths from which a part is called of little use, and from which it can help. They are a rule of thumb: on COCO,
# where each part gained the paper about a point of AP, the sample level has a strength of about 0.3 (60 % against 30 %),
# and half of that is taken to be worth a try. No series of trainings has confirmed them.
LITTLE, CAN_HELP = 0.05, 0.15
MOST = 0.5  # of the images; and the share from which a bin counts as empty
LARGER = 1.2  # factor of the box gradient from which balanced L1 is told to make it larger


@dataclass(frozen=True)
class Advice:
    """What is advised at a level.

    Attributes:
        level: ``"sample"``, ``"feature"`` or ``"objective"``.
        verdict: ``"can help"``, ``"little"`` or ``"nothing"``.
        strength: what the verdict rests on, from 0 to 1: the lesser of how much the part would change and of how much
            there is to gain.
        sentence: for people.
        flag: of the training program, to try; that which switches the part off, where it is on.
        knob: what to turn of the part.
    """

    level: str
    verdict: str
    strength: float
    sentence: str
    flag: str | None
    knob: str | None


def advise(measured: Measurements, config: Config) -> list[Advice]:
    """Of each level, from the samples to the objective."""
    metrics = measured.evaluation.metrics
    return [
        advise_sampler(measured.sample, config),
        advise_pyramid(measured.feature, config.model),
        advise_box_loss(measured.objective, metrics.get("AP50"), metrics.get("AP75"), config.model),
    ]


def advise_sampler(level: SampleLevel | None, config: Config) -> Advice:
    """The strength is the share of the negatives that sampling changes, or how much more often hard ones lie above IoU
    0.05 than random ones, whichever is less."""
    if level is None:
        return Advice(
            "sample", "nothing", 0.0, "Nothing to balance: a RetinaNet learns from all anchors, it samples none.", None, None
        )
    is_on = config.model.sampler
    flag, knob = _switch("sampler", is_on), f"--num-bins {config.libra.num_bins}" if is_on else "--num-bins 2 to 5"
    hard, random = level.above["hard"], level.above["random"]
    strength = _strength(level.changed, hard - random)
    verdict = _verdict(strength)
    changed = f"changes {percent(level.changed)} of the negatives that the second stage learns from"
    is_on_already = ", which is on," if is_on else ""
    if math.isnan(level.changed):
        sentence = "Not measured: there is no image to sample from."
    elif level.changed < LITTLE and level.few_candidates >= MOST:
        flag, knob = "--box-batch-size-per-image", "--rpn-post-nms-top-n-train"
        sentence = (
            f"Nothing to balance here: in {percent(level.few_candidates)} of the images all negatives are taken either "
            f"way; lower {flag}, or raise {knob}."
        )
    elif level.changed < LITTLE:
        sentence = f"Nothing to balance here: IoU-balanced sampling{is_on_already} {changed}."
    elif verdict == "nothing":
        sentence = (
            f"IoU-balanced sampling{is_on_already} {changed}, but hard negatives do not lie higher than random ones "
            f"({percent(hard)} and {percent(random)} above IoU 0.05): nothing to gain."
        )
    else:
        sentence = f"IoU-balanced sampling{is_on_already} {changed}: {_outlook(verdict, is_on, flag, knob)}"
    return Advice("sample", verdict, strength, sentence + _empty_bins(level, verdict), flag, knob)


def _empty_bins(level: SampleLevel, verdict: str) -> str:
    empty = [(share, number) for number, share in enumerate(level.empty_bins, 1) if share >= MOST]
    if verdict == "nothing" or not empty:
        return ""
    share, number = max(empty)
    return f" Bin {number} of {len(level.empty_bins)} is empty in {percent(share)} of the images."


def advise_pyramid(level: FeatureLevel, model: ModelConfig) -> Advice:
    """The strength is how far detections use a single map of the backbone (0: all alike), or how unlike the levels are,
    whichever is less; with the pyramid on, how much more alike it makes them."""
    flag, knob = _switch("pyramid", model.pyramid), "--refine"
    top, even = dominance(level)
    before, after = likeness(level.likeness_before), likeness(level.likeness_after)
    if model.pyramid:
        strength = _strength(after - before)
    else:
        strength = _strength((top - even) / (1 - even) if even < 1 else 0.0, 1 - before)
    verdict = _verdict(strength)
    uses = f"a detection takes {percent(top)} of what it uses from one map of the backbone ({percent(even)} if all gave alike)"
    if math.isnan(top) or math.isnan(before):
        sentence = "Not measured: no detection to follow, or a single level."
    elif model.pyramid:
        sentence = (
            f"With the balanced pyramid, which is on, {uses}; it raises the likeness of the levels from {before:.2f} to "
            f"{after:.2f}: {_outlook(verdict, True, flag, knob)}"
        )
    elif verdict == "nothing":
        sentence = f"Nothing to balance here: {uses}, and the likeness of the levels is {before:.2f} (1: the same)."
    else:
        sentence = (
            f"{uses[0].upper()}{uses[1:]}, and the likeness of the levels is {before:.2f} (1: the same): a balanced pyramid "
            f"{_outlook(verdict, False, flag, knob)}"
        )
    return Advice("feature", verdict, strength, sentence, flag, knob)


def dominance(level: FeatureLevel) -> tuple[float, float]:
    """The share of the map that contributes most, the mean of the detections, and what it is if all contribute alike."""
    rows = zip(level.boxes, level.contribution.amax(dim=1).tolist(), strict=True)
    used = [(share, top) for share, top in rows if share > 0 and not math.isnan(top)]
    total = math.fsum(share for share, _ in used)
    top = math.fsum(share * top for share, top in used) / total if used else math.nan
    return top, 1 / max(1, level.contribution.shape[1])


def likeness(matrix: object) -> float:
    """The mean of what a matrix says of two different levels."""
    values = [value for i, row in enumerate(matrix.tolist()) for j, value in enumerate(row) if i != j]  # type: ignore[attr-defined]
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def advise_box_loss(level: ObjectiveLevel, ap50: float | None, ap75: float | None, model: ModelConfig) -> Advice:
    """The strength is how much larger balanced L1 makes the inliers' share of the gradient, or the share of AP50 that is
    lost at an IoU of 0.75, whichever is less."""
    is_on = model.box_loss
    flag, knob = _switch("box-loss", is_on), "--alpha, --gamma"
    gain = level.of_total_balanced - level.of_total
    room = (ap50 - ap75) / ap50 if ap50 and ap75 is not None else math.nan
    strength = _strength(gain) if math.isnan(room) else _strength(gain, room)
    verdict = _verdict(strength)
    shares = (
        f"inliers give {percent(level.of_total)} of the box gradient under smooth L1, {percent(level.of_total_balanced)} "
        f"under balanced L1{', which is on' if is_on else ''}"
    )
    lost = "" if math.isnan(room) else f", and {percent(room)} of AP50 is lost at an IoU of 0.75"
    if math.isnan(gain):
        sentence = "Not measured: no positive has a box gradient."
    elif gain < LITTLE:
        sentence = f"Nothing to balance here: {shares}."
        if level.growth >= LARGER:
            knob = "--box-loss-weight"
            sentence += f" It makes the gradient {level.growth:.1f} times as large, as {knob} can."
    elif verdict == "nothing":
        sentence = f"{_capital(shares)}, but boxes are tight already: {percent(room)} of AP50 is lost at an IoU of 0.75."
    else:
        sentence = f"{_capital(shares)}{lost}: {_outlook(verdict, is_on, flag, knob)}"
    return Advice("objective", verdict, strength, sentence, flag, knob)


def _strength(*values: float) -> float:
    """The least, from 0 to 1; 0 if one is not known."""
    return 0.0 if any(map(math.isnan, values)) else min(1.0, max(0.0, min(values)))


def _verdict(strength: float) -> str:
    return "can help" if strength >= CAN_HELP else "little" if strength >= LITTLE else "nothing"


def _switch(part: str, is_on: bool) -> str:
    """The flag that changes whether a part is on."""
    return f"--no-{part}" if is_on else f"--{part}"


def _outlook(verdict: str, is_on: bool, flag: str, knob: str) -> str:
    found = {"can help": "it has something to do here" if is_on else "can help", "little": "it has little to do here" if is_on else "may help a little", "nothing": "it has nothing to do here"}[verdict]
    return f"{found}. {flag} shows what it brings; {knob}." if is_on else f"{found}. Try {flag}; {knob}."


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def percent(value: float | None) -> str:
    """A share as text, "-" where there is none."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.0f} %"
