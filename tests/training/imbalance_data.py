"""Measurements made by hand, in place of those of a detector."""

from dataclasses import replace
from typing import Any

import torch

from balanced_learning.detection.imbalance.feature_level import FeatureLevel
from balanced_learning.detection.imbalance.objective_level import ObjectiveLevel
from balanced_learning.detection.imbalance.sample_level import SampleLevel
from balanced_learning.training.evaluation import ErrorKind, Evaluation
from balanced_learning.training.imbalance.gathering import Measurements
from balanced_learning.training.tide import KINDS

BINS = [0.0, 0.25, 0.5]


def sample_level(**changes: Any) -> SampleLevel:
    """The paper's situation: 60 % of the hard and 30 % of random negatives above IoU 0.05."""
    shares = {"all": [0.8, 0.2], "hard": [0.5, 0.5], "random": [0.8, 0.2], "IoU-balanced": [0.5, 0.5]}
    level = SampleLevel(
        images=100,
        edges=torch.tensor(BINS),
        shares={name: torch.tensor(values) for name, values in shares.items()},
        above={"all": 0.3, "hard": 0.6, "random": 0.3, "IoU-balanced": 0.6},
        few_candidates=0.02,
        empty_bins=[0.0, 0.1],
        changed=0.31,
    )
    return replace(level, **changes)


def feature_level(contribution: list[list[float]], before: float = 0.4, after: float = 0.7) -> FeatureLevel:
    """Two levels, of which P2 has three quarters of the boxes; these likenesses are of one with the other."""
    return FeatureLevel(
        levels=["P2", "P3"],
        body_maps=[f"C{number}" for number in range(2, 2 + len(contribution[0]))],
        boxes=[0.75, 0.25],
        contribution=torch.tensor(contribution),
        likeness_before=torch.tensor([[1.0, before], [before, 1.0]]),
        likeness_after=torch.tensor([[1.0, after], [after, 1.0]]),
    )


def objective_level(**changes: Any) -> ObjectiveLevel:
    level = ObjectiveLevel(
        positives=1000,
        inliers=0.6,
        of_total=0.3,
        of_sample=0.35,
        to_outlier=0.28,
        of_total_balanced=0.55,
        box_loss=0.2,
        class_loss=0.4,
        ratio=0.5,
        growth=1.9,
    )
    return replace(level, **changes)


def measurements(**changes: Any) -> Measurements:
    costs = dict(zip(KINDS, (0.02, 0.1, 0.0, 0.01, 0.05, 0.02), strict=True))
    errors = {kind: ErrorKind(1, cost) for kind, cost in costs.items()}
    measured = Measurements(
        images=100,
        evaluated_images=50,
        bins=BINS,
        sample=sample_level(),
        feature=feature_level([[0.8, 0.2], [0.4, 0.6]]),
        objective=objective_level(),
        evaluation=Evaluation({"AP": 0.4, "AP50": 0.7, "AP75": 0.42}, errors, []),
    )
    return replace(measured, **changes)
