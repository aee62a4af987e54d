import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning import IoUBalancedSampler
from balanced_learning.training.reporting.tensorboard import ObservedSampler
from examples.train_torchvision_libra import main
from tests.small import SMALL

LABELS, IOUS = torch.tensor([1, 0, 0, 0, -1]), torch.tensor([0.9, 0.1, 0.2, 0.4, 0.5])


@pytest.mark.parametrize("sampler", [IoUBalancedSampler(4, 0.5), BalancedPositiveNegativeSampler(4, 0.5)])
def test_a_watched_sampler_draws_as_before_and_remembers(sampler):
    watched = ObservedSampler(sampler)
    positives, negatives = watched([LABELS], [IOUS], [torch.zeros(5, dtype=torch.int64)])
    assert positives[0].tolist() == [1, 0, 0, 0, 0]
    assert negatives[0].tolist() == [0, 1, 1, 1, 0]
    assert watched.sampled_ious().tolist() == pytest.approx([0.1, 0.2, 0.4])


def test_torchvisions_own_stage_gives_no_iou():
    watched = ObservedSampler(BalancedPositiveNegativeSampler(4, 0.5))
    assert watched([LABELS])[1][0].sum() == 3
    assert watched.last == []


@pytest.mark.parametrize("options", [[], ["--no-sampler"], ["--no-sampler", "--no-box-loss"]])
def test_tensorboard_gets_metrics_and_sampled_ious(coco_root, tmp_path, options):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main(["--data-path", str(coco_root), *SMALL, *options, "--tensorboard", "--output-dir", str(tmp_path)])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "AP"} <= set(events.Tags()["scalars"])
    has_histogram = "IoU of sampled negatives" in events.Tags()["histograms"]
    assert has_histogram == ("--no-box-loss" not in options)


def test_a_missing_package_is_named(coco_root, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="--tensorboard: the package is missing; pip install tensorboard"):
        main(["--data-path", str(coco_root), *SMALL, "--tensorboard", "--output-dir", str(tmp_path)])
