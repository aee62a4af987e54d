from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning import IoUBalancedSampler
from balanced_learning.detection.matching import Matches
from balanced_learning.detection.stages import taking_labels
from balanced_learning.training.reporting.tensorboard import ObservedSampler, TensorBoard
from examples.train_torchvision_libra import main
from tests.training.disks import NO_FILE, NO_ROOM, filled, removed
from tests.training.small import SMALL

LABELS, IOUS = torch.tensor([1, 0, 0, 0, -1]), torch.tensor([0.9, 0.1, 0.2, 0.4, 0.5])


@pytest.mark.parametrize("sampler", [IoUBalancedSampler(4, 0.5), BalancedPositiveNegativeSampler(4, 0.5)])
def test_an_observed_sampler_draws_as_before_and_is_remembered(sampler):
    observed = ObservedSampler(taking_labels(sampler))
    positives, negatives = observed(Matches([LABELS], [IOUS], [torch.zeros_like(LABELS)], [torch.zeros(1, 4)]))
    assert positives[0].tolist() == [1, 0, 0, 0, 0]
    assert negatives[0].tolist() == [0, 1, 1, 1, 0]
    assert observed.sampled_ious().tolist() == pytest.approx([0.1, 0.2, 0.4])


def test_labels_of_torchvisions_own_stage_have_no_iou():
    observed = ObservedSampler(BalancedPositiveNegativeSampler(4, 0.5))
    assert observed([LABELS])[1][0].sum() == 3
    assert observed.last == []


@pytest.mark.parametrize("options", [[], ["--no-sampler"], ["--no-sampler", "--no-box-loss"], ["--rpn"]])
def test_observing_changes_nothing(coco_root, tmp_path, options):
    for name, flags in (("plain", []), ("observed", ["--tensorboard"])):
        main(["--data-path", str(coco_root), *SMALL, *options, *flags, "--output-dir", str(tmp_path / name)])
    plain, observed = (torch.load(tmp_path / name / "checkpoint.pth") for name in ("plain", "observed"))
    assert all(torch.equal(value, observed["model"][name]) for name, value in plain["model"].items())


@pytest.mark.parametrize("options", [[], ["--no-sampler"], ["--no-sampler", "--no-box-loss"]])
def test_tensorboard_gets_metrics_and_sampled_ious(coco_root, tmp_path, options):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "events.out.tfevents.1").touch()  # of an earlier process, whose rows are written again
    main(["--data-path", str(coco_root), *SMALL, *options, "--tensorboard", "--output-dir", str(tmp_path)])
    assert len(list(tmp_path.glob("events.*"))) == 1
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "AP", "dAP50/missed", "AP/toothbrush"} <= set(events.Tags()["scalars"])
    has_histogram = "IoU of sampled negatives" in events.Tags()["histograms"]
    assert has_histogram == ("--no-box-loss" not in options)


@pytest.mark.parametrize(("trouble", "reason"), [(filled, NO_ROOM), (removed, NO_FILE)])
def test_an_epoch_that_cannot_be_written_is_told_of_in_one_line(small_disk, capfd, trouble, reason):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = small_disk / "run"
    folder.mkdir()
    board = TensorBoard(SimpleNamespace(folder=folder, epoch=0, model=None, history=[]))
    values = {f"loss {i}": 1.0 for i in range(100)}
    for epoch in range(4):
        with trouble(folder) if epoch in (1, 2) else nullcontext():
            board.write({"epoch": epoch, **values}, folder / "none.png")
    told = [f"warning: {folder}: TensorBoard lacks epoch {epoch} ({reason})" for epoch in (1, 2)]
    assert capfd.readouterr().err.splitlines() == told
    steps = [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("loss 99")]
    assert {0, 3} <= set(steps) <= {0, 1, 2, 3}


def test_a_missing_package_is_named(coco_root, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="--tensorboard: the package is missing; pip install tensorboard"):
        main(["--data-path", str(coco_root), *SMALL, "--tensorboard", "--output-dir", str(tmp_path)])
