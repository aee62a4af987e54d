import math
import re
from dataclasses import replace

import pytest
import torch

from balanced_learning.training.config import Config
from balanced_learning.training.flags import make_parser
from balanced_learning.training.imbalance.advice import (
    CAN_HELP,
    LITTLE,
    advise,
    advise_box_loss,
    advise_pyramid,
    advise_sampler,
    approach,
    likeness,
    unevenness,
)
from balanced_learning.training.imbalance.text import blocks
from tests.training.imbalance_data import feature_level, measurements, objective_level, sample_level

ON = Config.of({})
OFF = Config.of({"sampler": False, "pyramid": False, "box_loss": False})
NAN = math.nan
BELOW = 1e-6


def sampled(changed: float, nearer: float = 1.0, **more):
    """Of negatives so many of which sampling changes, and whose IoUs it brings so much nearer to those of the hard."""
    random = [nearer, 1 - nearer] if nearer > 0 else [0.0, 1.0]
    balanced = [0.0, 1.0] if nearer > 0 else [-nearer, 1 + nearer]
    shares = {"all": random, "hard": [0.0, 1.0], "random": random, "IoU-balanced": balanced}
    return sample_level(
        changed=changed, shares={name: torch.tensor(each, dtype=torch.float64) for name, each in shares.items()}, **more
    )


@pytest.mark.parametrize(
    ("strength", "verdict"),
    [
        (0.0, "nothing"),
        (LITTLE - BELOW, "nothing"),
        (LITTLE, "little"),
        (CAN_HELP - BELOW, "little"),
        (CAN_HELP, "can help"),
        (1.0, "can help"),
    ],
)
@pytest.mark.parametrize("config", [ON, OFF])
def test_a_verdict_follows_from_the_lesser_of_what_changes_and_what_there_is_to_gain(strength, verdict, config):
    for level in (sampled(strength), sampled(1.0, nearer=strength)):
        advice = advise_sampler(level, config)
        assert (advice.verdict, advice.strength) == (verdict, pytest.approx(strength))
    for balanced, ap50, ap75 in ((strength, 1.0, 0.0), (1.0, 1.0, 1.0 - strength), (strength, None, None)):
        advice = advise_box_loss(objective_level(of_total=0.0, of_total_balanced=balanced), ap50, ap75, config)
        assert (advice.verdict, advice.strength) == (verdict, pytest.approx(strength))


@pytest.mark.parametrize(("strength", "verdict"), [(0.04, "nothing"), (0.06, "little"), (0.16, "can help")])
def test_the_verdict_of_a_pyramid(strength, verdict):
    more, less = 0.5 + strength, 0.5 - strength  # of two maps
    unlike = feature_level([[more, less], [less, more]], before=0.0)
    one_sided = feature_level([[1.0, 0.0], [1.0, 0.0]], before=1 - strength)
    mended = feature_level([[0.5, 0.5], [0.5, 0.5]], before=0.0, after=strength)
    for level, config in ((unlike, OFF), (one_sided, OFF), (mended, ON)):
        advice = advise_pyramid(level, config)
        assert (advice.verdict, advice.strength) == (verdict, pytest.approx(strength))


def test_the_paper_on_coco_can_be_helped():
    assert [(a.level, a.verdict, a.flag, a.knob) for a in advise(measurements(), OFF)] == [
        ("sample", "can help", "--sampler", "--num-bins"),
        ("feature", "can help", "--pyramid", "--refine"),
        ("objective", "can help", "--box-loss", "--alpha, --gamma"),
    ]


def test_what_balanced_l1_changes_is_told():
    sentence = (
        "Inliers give 30 % of the box gradient under smooth L1 of beta 0.11 and 55 % under balanced L1, "
        "and 50 % of AP50 is lost at an IoU of 0.75: balanced L1 can help. "
        "Try --box-loss; to tune it: --alpha, --gamma."
    )
    assert advise_box_loss(objective_level(growth=1.1), 0.8, 0.4, OFF).sentence == sentence
    larger = advise_box_loss(objective_level(growth=1.9), 0.8, 0.4, OFF)
    assert larger.sentence.startswith(f"{sentence} Balanced L1 is a larger loss, too: its gradient is 1.9 times that")
    assert larger.verdict == "can help"


@pytest.mark.parametrize(("of_total", "words"), [(0.5, "Nothing to balance"), (0.05, "Balanced L1 does not mend this")])
def test_a_gradient_of_outliers_is_not_called_balanced(of_total, words):
    level = objective_level(of_total=of_total, of_total_balanced=of_total + 0.03, growth=1.0)
    assert advise_box_loss(level, 0.7, 0.4, OFF).sentence.startswith(f"{words}: inliers give ")


def test_the_share_that_sampling_changes_is_told():
    sentence = advise_sampler(sample_level(), OFF).sentence
    assert sentence == (
        "IoU-balanced sampling changes 31 % of the negatives that the second stage learns from, which can help. "
        "Try --sampler; to tune it: --num-bins 2 to 5."
    )


def test_a_part_that_is_on_is_told_with_the_flag_that_takes_it_off():
    config = Config.of({"num_bins": 4})
    for advice, flag, words in zip(
        advise(measurements(), config),
        ("--no-sampler", "--no-pyramid", "--no-box-loss"),
        ("4 now", "0.40 to 0.70", "55 %"),
        strict=True,
    ):
        assert advice.flag == flag
        assert flag in advice.sentence
        assert ", which is on" in advice.sentence
        assert words in advice.sentence


def test_too_few_negatives_are_told_with_what_makes_more():
    advice = advise_sampler(sampled(0.01, few_candidates=0.92), OFF)
    assert advice.verdict == "nothing"
    assert "in 92 % of the images all negatives are taken either way" in advice.sentence
    assert (advice.flag, advice.knob) == ("--box-batch-size-per-image", "--rpn-post-nms-top-n-train")
    assert "either way" not in advise_sampler(sampled(0.01, few_candidates=0.08), OFF).sentence
    assert "either way" not in advise_sampler(sampled(0.3, few_candidates=0.6), OFF).sentence


def test_negatives_that_are_hard_at_low_iou_are_not_for_iou_balanced_sampling():
    advice = advise_sampler(sampled(0.4, nearer=-0.2), OFF)
    assert (advice.verdict, advice.strength) == ("nothing", 0)
    further = "does not make them more like the hard ones: by IoU, 100 % of random and 80 % of IoU-balanced ones are"
    assert further in advice.sentence
    hardly = "hardly makes them more like the hard ones: by IoU, 96 % of random and 100 % of IoU-balanced ones are"
    assert hardly in advise_sampler(sampled(0.4, nearer=0.04), OFF).sentence


def test_how_much_nearer_to_hard_negatives_sampling_comes():
    rows = {"hard": [0.2, 0.3, 0.5], "random": [0.7, 0.2, 0.1], "IoU-balanced": [0.3, 0.3, 0.4], "all": [1.0, 0.0, 0.0]}
    assert approach(sample_level(shares={name: torch.tensor(row) for name, row in rows.items()})) == pytest.approx(
        0.5 - 0.1
    )


def test_an_empty_bin_is_told():
    assert (
        "Bin 2 of 2 is empty in 80 % of the images."
        in advise_sampler(sample_level(empty_bins=[0.1, 0.8]), OFF).sentence
    )
    assert "Bin" not in advise_sampler(sample_level(empty_bins=[0.1, 0.3]), OFF).sentence


def test_levels_that_are_equal_leave_a_pyramid_nothing_to_do():
    advice = advise_pyramid(feature_level([[1.0, 0.0], [0.0, 1.0]], before=1.0, after=1.0), OFF)
    assert (advice.verdict, advice.strength) == ("nothing", 0)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (0.42, "raises the likeness of the levels from 0.40 to 0.42, and so hardly brings them together."),
        (0.30, "lowers the likeness of the levels from 0.40 to 0.30, and so hardly brings them together."),
        (0.47, "raises the likeness of the levels from 0.40 to 0.47, which can help a little."),
        (0.70, "raises the likeness of the levels from 0.40 to 0.70, which can help."),
    ],
)
def test_of_a_pyramid_that_is_on_it_is_told_what_it_does_to_the_levels(after, words):
    level = feature_level([[1.0, 0.0], [0.0, 1.0]], before=0.4, after=after)
    sentence = advise_pyramid(level, ON).sentence
    assert sentence.startswith(f"The balanced pyramid, which is on, {words} --no-pyramid tells ")


def test_errors_that_are_all_inliers_leave_balanced_l1_nothing_to_do_but_to_be_larger():
    inliers = objective_level(inliers=1.0, of_total=1.0, of_total_balanced=1.0, to_outlier=NAN, growth=1.4)
    advice = advise_box_loss(inliers, 0.7, 0.4, OFF)
    assert (advice.verdict, advice.strength, advice.knob) == ("nothing", 0, "--box-loss-weight")
    larger = "its gradient is 1.4 times that of smooth L1 of beta 0.11, which --box-loss-weight {} would make as large."
    assert advice.sentence.endswith(larger.format(1.4))
    weighted = advise_box_loss(inliers, 0.7, 0.4, Config.of({"box_loss_weight": 1.5}))
    assert weighted.sentence.endswith(larger.format(2.1))
    as_large = advise_box_loss(replace(inliers, growth=1.1), 0.8, 0.4, OFF)
    assert as_large.knob == "--box-loss-weight"
    assert as_large.sentence.endswith(
        "But 50 % of AP50 is lost at an IoU of 0.75: a larger --box-loss-weight is worth a try."
    )
    large_already = advise_box_loss(replace(inliers, growth=1.1, ratio=1.5), 0.8, 0.4, OFF)
    assert (large_already.knob, large_already.sentence[-6:]) == ("--alpha, --gamma", " 0.75.")
    tight = advise_box_loss(replace(inliers, growth=1.1), 0.8, 0.78, OFF)
    assert (tight.knob, tight.sentence[-3:]) == ("--alpha, --gamma", "L1.")


def test_the_loss_that_balanced_l1_is_compared_with_is_named():
    for settings, name in (
        ({}, "smooth L1 of beta 0.11 "),
        ({"beta": 1.0}, "smooth L1 of beta 1 "),
        ({"model": "libra_retinanet"}, "L1 "),
    ):
        assert f"gradient under {name}and" in advise_box_loss(objective_level(), 0.7, 0.4, Config.of(settings)).sentence


def test_boxes_that_are_tight_need_no_other_loss():
    advice = advise_box_loss(objective_level(), 0.7, 0.69, OFF)
    assert advice.verdict == "nothing"
    assert "boxes are tight: 1 % of AP50" in advice.sentence


def test_what_could_not_be_measured_is_said():
    nothing = [
        advise_sampler(sampled(NAN, few_candidates=NAN, empty_bins=[NAN, NAN]), OFF),
        advise_pyramid(feature_level([[NAN, NAN], [NAN, NAN]]), OFF),
        advise_pyramid(feature_level([[0.5, 0.5], [NAN, NAN]], before=NAN), ON),
        advise_box_loss(objective_level(of_total=NAN, of_total_balanced=NAN, growth=NAN), 0.7, 0.4, OFF),
    ]
    assert all((advice.verdict, advice.strength) == ("nothing", 0) for advice in nothing)
    assert all("Not measured" in advice.sentence for advice in nothing)


def test_what_a_pyramid_does_to_the_levels_is_known_without_objects():
    advice = advise_pyramid(feature_level([[NAN, NAN], [NAN, NAN]], before=0.4, after=0.7), ON)
    assert (advice.verdict, "from 0.40 to 0.70, which can help." in advice.sentence) == ("can help", True)


def test_without_any_ap_the_gradient_decides():
    assert advise_box_loss(objective_level(), 0.0, 0.0, OFF).verdict == "can help"
    assert "AP50" not in advise_box_loss(objective_level(), None, None, OFF).sentence


def test_a_retinanet_samples_nothing():
    config = Config.of({"model": "libra_retinanet"})
    advice, *_ = advise(measurements(sample=None), config)
    assert (advice.verdict, advice.flag, advice.knob) == ("nothing", None, None)
    assert "RetinaNet" in advice.sentence


def test_what_would_have_to_come_from_other_maps_is_of_the_levels_that_have_boxes():
    level = feature_level([[0.7, 0.3, 0.0], [0.2, 0.2, 0.6]])
    expected = [0.7 - 1 / 3, 0.6 - 1 / 3]
    assert unevenness(level) == pytest.approx(0.75 * expected[0] + 0.25 * expected[1])
    unseen = replace(level, contribution=torch.tensor([[0.7, 0.3, 0.0], [NAN, NAN, NAN]]))
    assert unevenness(unseen) == pytest.approx(expected[0])
    assert unevenness(feature_level([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])) == pytest.approx(0.75)
    assert unevenness(feature_level([[0.25] * 4, [0.25] * 4])) == 0


def test_the_likeness_is_that_of_different_levels():
    matrix = torch.tensor([[1, 0.2, 0.4], [0.2, 1, NAN], [0.4, NAN, 1]])
    assert likeness(matrix) == pytest.approx(0.3)
    assert math.isnan(likeness(torch.ones(1, 1)))


def test_all_flags_are_the_training_programs():
    """Where a sentence names one that there is not, nobody can try it."""
    known = set(make_parser()._option_string_actions)
    texts = [blocks(measurements(), advise(measurements(), config)) for config in (ON, OFF)]
    texts += [advise_sampler(sampled(0, few_candidates=1.0), OFF).sentence]
    texts += [advise_box_loss(objective_level(of_total=0.6, growth=2.0), 0.7, 0.4, OFF).sentence]
    flags = {flag for text in texts for flag in re.findall(r"--[a-z-]+", text)}
    assert len(flags) > 9
    assert flags <= known


@pytest.mark.parametrize(("ap50", "is_told"), [(0.02, True), (None, True), (0.1, False), (0.7, False)])
def test_a_detector_that_has_hardly_learned_is_told_of(ap50, is_told):
    measured = measurements()
    evaluation = replace(measured.evaluation, metrics=measured.evaluation.metrics | {"AP50": ap50})
    measured = replace(measured, evaluation=evaluation)
    assert ("the detector has hardly learned" in blocks(measured, advise(measured, OFF))) == is_told
