import pytest
import torch
from PIL import Image
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning import IoUBalancedSampler
from balanced_learning.detection.imbalance import MatchedProposals, bin_edges, interval_edges, negative_iou_shares
from balanced_learning.samplers import iou_bins
from examples import plot_sampling, train_torchvision_libra
from tests.training.small import SMALL


def proposals(ious: torch.Tensor) -> MatchedProposals:
    """Negatives alone; the last are the hardest."""
    size = len(ious)
    nothing = torch.zeros(size, dtype=torch.int64)
    hardness = torch.arange(size).float()
    return MatchedProposals(
        torch.rand(3, 32, 32), torch.rand(1, 4), torch.rand(size, 4), nothing, ious, nothing, hardness
    )


def test_shares_are_those_that_the_samplers_draw():
    ious = torch.cat([torch.full((900,), 0.01), torch.full((60,), 0.21), torch.full((40,), 0.46)])
    balanced, random = IoUBalancedSampler(90, 0.0), BalancedPositiveNegativeSampler(90, 0.0)
    edges = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    shares = negative_iou_shares([proposals(ious)], balanced, random, edges=edges, draws=50)
    assert shares["all"].tolist() == pytest.approx([0.9, 0, 0.06, 0.04])
    assert shares["hard"].tolist() == pytest.approx([0, 0, 50 / 90, 40 / 90])
    assert shares["random"].tolist() == pytest.approx([0.9, 0, 0.06, 0.04], abs=0.02)
    assert shares["IoU-balanced"].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


def test_fewer_candidates_than_wanted_are_all_drawn():
    both = IoUBalancedSampler(90, 0.25), BalancedPositiveNegativeSampler(90, 0.25)
    edges = torch.tensor([0.0, 0.2, 0.4, 0.5])
    shares = negative_iou_shares([proposals(torch.tensor([0.0, 0.3, 0.5]))], *both, edges=edges, draws=50)
    for share in shares.values():
        assert share.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    "sampler",
    [
        IoUBalancedSampler(),
        IoUBalancedSampler(num_bins=1),
        IoUBalancedSampler(num_bins=7, max_iou=0.6, floor_iou=0.1),
        IoUBalancedSampler(num_bins=20, max_iou=None),
    ],
)
def test_intervals_are_parts_of_the_bins_that_the_sampler_draws_from(sampler):
    edges = interval_edges(sampler, at_least=10)
    assert edges.diff().min() > 0
    num_intervals = int((edges[:-1] >= sampler.floor_iou).sum())
    assert num_intervals >= 10
    assert num_intervals % sampler.num_bins == 0
    assert (edges[0], edges[-1]) == (0, bin_edges(sampler)[-1])
    ceiling = sampler.max_iou or 1.0
    just_inside = torch.cat([edges[:-1] + 1e-5, edges[1:] - 1e-5])
    bins = iou_bins(just_inside, sampler.floor_iou, ceiling, sampler.num_bins)
    first, last = bins.chunk(2)
    assert torch.equal(first, last)  # no interval is in two bins
    counts = first[first >= 0].bincount()
    assert counts.tolist() == [num_intervals // sampler.num_bins] * sampler.num_bins
    steps = torch.tensor(bin_edges(sampler)[1:-1])
    assert torch.equal(
        iou_bins(steps - 1e-5, sampler.floor_iou, ceiling, sampler.num_bins) + 1, torch.arange(len(steps)) + 1
    )
    assert torch.equal(
        iou_bins(steps + 1e-5, sampler.floor_iou, ceiling, sampler.num_bins), torch.arange(len(steps)) + 1
    )


def test_it_prints_a_table_and_draws_two_pictures(coco_root, tmp_path, capsys):
    plot_sampling.main(["--data-path", str(coco_root), *SMALL, "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(interval_edges(IoUBalancedSampler(), plot_sampling.INTERVALS)) - 1 + 1
    assert printed[0].split()[-4:] == ["all", "hard", "random", "IoU-balanced"]
    for name in ("sampling_ious.png", "sampling_boxes.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 100


def test_real_images(real_data, tmp_path, capsys):
    options = ["--data-path", str(real_data("coco_tiny")), *SMALL, "-b", "2", "--output-dir", str(tmp_path)]
    plot_sampling.main(options)
    assert "IoU-balanced" in capsys.readouterr().out
    assert (tmp_path / "sampling_boxes.png").stat().st_size > 20_000


def test_retinanet_samples_nothing(coco_root, tmp_path):
    with pytest.raises(SystemExit, match="--model libra_retinanet: it trains on all anchors"):
        plot_sampling.main(["--data-path", str(coco_root), "--model", "libra_retinanet", "--output-dir", str(tmp_path)])


def test_a_trained_baseline_is_drawn_with_another_batch_size(coco_root, tmp_path, capsys):
    options = ["--data-path", str(coco_root), *SMALL, "--no-sampler"]
    train_torchvision_libra.main([*options, "--output-dir", str(tmp_path)])
    plot_sampling.main(["--resume", str(tmp_path / "checkpoint.pth"), "-b", "1", "--sampler"])
    assert (tmp_path / "sampling_ious.png").exists()
