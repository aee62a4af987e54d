"""What is measured of a detector for the report: its three levels on training images, its AP on others."""

import math
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning import IoUBalancedSampler
from balanced_learning.detection.imbalance.feature_level import FeatureLevel, LevelMeter
from balanced_learning.detection.imbalance.objective_level import ObjectiveLevel, ObjectiveMeter
from balanced_learning.detection.imbalance.sample_level import SampleLevel, SampleMeter, bin_edges
from balanced_learning.training import randomness
from balanced_learning.training.config import Config
from balanced_learning.training.data.batching import DetectionLoader
from balanced_learning.training.data.dataset import DetectionDataset
from balanced_learning.training.errors import UserError
from balanced_learning.training.evaluation import Evaluation, detections_per_image, evaluate_detections
from balanced_learning.training.inference import predict
from balanced_learning.training.measuring import batches_to_measure
from balanced_learning.training.model import balanced_l1, smooth_l1
from balanced_learning.training.optimization import Precision
from balanced_learning.training.tide import KINDS

PAPER_ABOVE = {"hard": 0.6, "random": 0.3}  # of the negatives above IoU 0.05; of the hard ones it is more than that
PAPER_TO_OUTLIER = 0.3  # the mean gradient of an inlier, of an outlier's, under smooth L1 of beta 1
DRAWS = 20  # of the samplers, of each image
LEARNED = 0.1  # AP50 from which a detector is taken to know its objects


@dataclass(frozen=True)
class Measurements:
    """The three levels of a detector, and its evaluation.

    Attributes:
        images: training images that the levels are measured on.
        evaluated_images: others, that the evaluation is of.
        bins: the edges of the bins of IoU-balanced sampling; empty for a detector that samples nothing. [K + 1]
        sample: None for a detector that samples nothing.
        feature: what its detections use of the backbone's maps.
        objective: of smooth L1, whatever its box loss, beside balanced L1, both with the settings of the run.
        evaluation: COCO's metrics, and what AP50 is lost to.
    """

    images: int
    evaluated_images: int
    bins: list[float]
    sample: SampleLevel | None
    feature: FeatureLevel
    objective: ObjectiveLevel
    evaluation: Evaluation

    @property
    def difference(self) -> float | None:
        """AP50 minus AP75."""
        high, low = (self.evaluation.metrics.get(name) for name in ("AP50", "AP75"))
        return None if high is None or low is None else high - low

    @property
    def has_learned(self) -> bool:
        """Whether the detector knows its objects; if not, the levels say little."""
        return (self.evaluation.metrics.get("AP50") or 0.0) >= LEARNED

    def costs(self) -> dict[str, float | None]:
        """What AP50 would gain without the errors of each kind."""
        return {kind: self.evaluation.errors[kind].dAP50 for kind in KINDS}

    def localisation_share(self) -> float | None:
        """The share of errors of localisation in the costs of all kinds."""
        costs = [cost or 0.0 for cost in self.costs().values()]
        return (self.costs()["localisation"] or 0.0) / sum(costs) if sum(costs) else None

    def plain(self) -> dict[str, Any]:
        """The levels as JSON takes them; what could not be measured is null."""
        metrics, costs = self.evaluation.metrics, self.costs()
        of_evaluation = {
            "AP50": metrics.get("AP50"),
            "AP75": metrics.get("AP75"),
            "difference": self.difference,
            "localisation": {"dAP50": costs["localisation"], "share": self.localisation_share()},
            "errors": costs,
        }
        return {
            "sample": self.sample and finite(asdict(self.sample) | {"bins": self.bins}),
            "feature": finite(self.feature),
            "objective": finite(asdict(self.objective) | of_evaluation),
        }


def require_all_levels(config: Config) -> None:
    """Refuses a stage of a detector alone.

    Raises:
        UserError: names the model.
    """
    name = f"--model {config.model.model}"
    if config.model.is_rpn:
        raise UserError(f"{name}: an RPN alone has no second stage to measure; pass a libra_fasterrcnn")
    if config.model.is_fast_rcnn:
        raise UserError(f"{name}: it has no RPN, whose proposals are measured; pass a libra_fasterrcnn")


def gather(
    config: Config, model: Any, dataset: DetectionDataset, val_loader: DetectionLoader, precision: Precision
) -> Measurements:
    """Measures a detector, in evaluation mode on its device: its levels on ``dataset``, its AP on the loader's images.

    The images of ``dataset`` are read once.
    """
    balanced = None if config.model.is_retinanet else _balanced_sampler(config, model)
    sample = balanced and SampleMeter(model, balanced, _random(balanced), DRAWS)
    feature = LevelMeter(model)
    objective = ObjectiveMeter(model, smooth_l1(config), balanced_l1(config))
    meters = [meter for meter in (sample, feature, objective) if meter]
    randomness.seed_all(config.training.seed, "imbalance")
    for images, targets in batches_to_measure("imbalance", config, model, dataset):
        for meter in meters:
            meter.add(images, targets)
    val = val_loader.dataset
    detections = predict(model, val_loader, precision, config.run.print_freq)
    return Measurements(
        images=len(dataset),
        evaluated_images=len(val),
        bins=bin_edges(balanced) if balanced else [],
        sample=sample.result() if sample else None,
        feature=feature.result(),
        objective=objective.result(),
        evaluation=evaluate_detections(
            val.split, detections, val.label_of, config.run.coco_backend, limit=detections_per_image(model)
        ),
    )


def _balanced_sampler(config: Config, model: Any) -> IoUBalancedSampler:
    """The detector's own, or the one that it would have."""
    heads = model.roi_heads
    own = heads.fg_bg_sampler
    if isinstance(own, IoUBalancedSampler):
        return own
    return IoUBalancedSampler(
        own.batch_size_per_image,
        own.positive_fraction,
        num_bins=config.libra.num_bins,
        max_iou=heads.proposal_matcher.low_threshold,
        instance_balanced=config.libra.instance_balanced,
    )


def _random(balanced: IoUBalancedSampler) -> BalancedPositiveNegativeSampler:
    return BalancedPositiveNegativeSampler(balanced.batch_size_per_image, balanced.positive_fraction)


def finite(value: Any) -> Any:
    """A value in plain numbers, lists and dicts, with None in place of each number that is not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
