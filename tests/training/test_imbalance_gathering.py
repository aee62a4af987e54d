import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning import BalancedL1Loss, IoUBalancedSampler
from balanced_learning.detection import apply_libra
from balanced_learning.detection.imbalance.feature_level import LevelMeter
from balanced_learning.detection.imbalance.objective_level import ObjectiveMeter
from balanced_learning.detection.imbalance.sample_level import SampleMeter
from balanced_learning.detection.proposals import second_stage
from balanced_learning.training.config import Config
from balanced_learning.training.evaluation import ErrorKind, Evaluation
from balanced_learning.training.imbalance import gathering
from balanced_learning.training.imbalance.advice import advise, likeness
from balanced_learning.training.imbalance.gathering import finite
from balanced_learning.training.imbalance.text import blocks
from balanced_learning.training.small import small_fasterrcnn
from balanced_learning.training.tide import KINDS
from tests.training.imbalance_data import feature_level, measurements, objective_level, sample_level


def test_a_detector_made_to_have_nothing_to_balance_is_told_so():
    """All negatives have an IoU of 0, all errors are inliers, and all levels are the same."""

    def make_equal(_, __, levels):
        coarsest = list(levels.values())[-1]
        return {name: F.interpolate(coarsest, level.shape[-2:]) for name, level in levels.items()}

    model = second_stage(small_fasterrcnn(3)).eval()
    model.backbone.fpn.register_forward_hook(make_equal)
    deltas = model.roi_heads.box_predictor.bbox_pred
    nn.init.zeros_(deltas.weight)
    nn.init.constant_(deltas.bias, 0.5)
    meters = [
        SampleMeter(model, IoUBalancedSampler(64, 0.25), BalancedPositiveNegativeSampler(64, 0.25), draws=2),
        LevelMeter(model),
        ObjectiveMeter(model, nn.SmoothL1Loss(beta=1 / 9), BalancedL1Loss()),
    ]
    truth, far = torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([60.0, 60, 90, 90]).expand(300, 4)
    target = {"boxes": truth, "labels": torch.ones(1, dtype=torch.int64), "proposals": far}
    for meter in meters:
        meter.add([torch.rand(3, 128, 128)] * 2, [target] * 2)
    sample, feature, objective = (meter.result() for meter in meters)
    assert (sample.changed, objective.inliers, likeness(feature.likeness_before)) == (0, 1, pytest.approx(1))
    plain = Config.of({"sampler": False, "pyramid": False, "box_loss": False})
    for advice in advise(measurements(sample=sample, feature=feature, objective=objective), plain):
        assert (advice.verdict, advice.strength) == ("nothing", pytest.approx(0, abs=1e-6))
        assert advice.sentence.startswith("Nothing to balance: ")


def test_what_is_not_finite_is_null():
    value = {"a": [1, math.nan, (math.inf, 2.5)], "b": torch.tensor([[0.5, math.nan]]), "c": "text", "d": None}
    assert finite(value) == {"a": [1, None, [None, 2.5]], "b": [[0.5, None]], "c": "text", "d": None}


def test_measurements_without_numbers_are_written_and_told():
    nan = math.nan
    nothing = measurements(
        sample=sample_level(changed=nan, few_candidates=nan, empty_bins=[nan, nan]),
        feature=replace(feature_level([[nan, nan], [nan, nan]], nan, nan), boxes=[nan, nan]),
        objective=objective_level(**{name: nan for name in vars(objective_level()) if name != "positives"}),
        evaluation=Evaluation({"AP50": None, "AP75": None}, {kind: ErrorKind(0, None) for kind in KINDS}, []),
    )
    plain = nothing.plain()
    json.dumps(plain, allow_nan=False)
    assert plain["objective"]["difference"] is plain["objective"]["localisation"]["share"] is None
    assert plain["feature"]["likeness_before"] == [[1.0, None], [None, 1.0]]
    assert "nan" not in blocks(nothing, advise(nothing, Config.of({}))).lower()


def test_what_ap_is_lost_to_localisation():
    plain = measurements().plain()["objective"]
    assert plain["difference"] == pytest.approx(0.28)
    assert plain["localisation"] == {"dAP50": 0.1, "share": pytest.approx(0.5)}  # of 0.2 in all
    assert plain["errors"].keys() == set(KINDS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0.5, 1.5, 1.0)),
        ({"alpha": 0.3, "gamma": 1.2, "beta": 0.5}, (0.3, 1.2, 0.5)),
        ({"box_loss": False, "beta": 0.0}, (0.5, 1.5, 1.0)),  # L1
        ({"model": "libra_retinanet"}, (0.5, 1.5, 0.11)),
    ],
)
def test_box_losses_are_compared_with_balanced_l1_of_the_settings(monkeypatch, settings, expected):
    class BuiltError(Exception):
        pass

    def build(_, __, balanced):
        raise BuiltError(balanced.alpha, balanced.gamma, balanced.beta)

    monkeypatch.setattr(gathering, "LevelMeter", lambda _: None)
    monkeypatch.setattr(gathering, "ObjectiveMeter", build)
    with pytest.raises(BuiltError) as built:
        gathering.gather(Config.of(settings), small_fasterrcnn(3), *[None] * 3)
    assert built.value.args == expected


def test_a_plain_detector_is_compared_with_the_sampler_that_it_would_have():
    config = Config.of({"num_bins": 4, "instance_balanced": False, "sampler": False})
    stock = small_fasterrcnn(3)
    would_have = gathering._balanced_sampler(config, stock)
    assert would_have == replace(
        apply_libra(small_fasterrcnn(3)).roi_heads.fg_bg_sampler, num_bins=4, instance_balanced=False
    )
    balanced = apply_libra(small_fasterrcnn(3), sampler=IoUBalancedSampler(64, 0.25, num_bins=5))
    assert gathering._balanced_sampler(config, balanced) is balanced.roi_heads.fg_bg_sampler
