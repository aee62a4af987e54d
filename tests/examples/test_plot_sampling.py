import pytest
import torch
from PIL import Image

from balanced_learning import IoUBalancedSampler
from balanced_learning.detection.imbalance.sample_level import interval_edges, interval_shares
from examples import plot_sampling, train_torchvision_libra
from tests.training.coco_data import add_images
from tests.training.small import SMALL
from tests.training.test_proposals import write


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the pictures out."""
    monkeypatch.setattr(plot_sampling, "save_iou_shares", lambda *_: None)
    monkeypatch.setattr(plot_sampling, "save_sampled_boxes", lambda *_: None)


def test_the_table_tells_how_much_is_above_a_low_iou_and_of_how_many():
    edges = torch.tensor([0.0, 0.25, 0.5])
    negatives = {
        "all": torch.tensor([0.0, 0.05, 0.06, 0.4]),
        "hard": torch.tensor([0.4]),
        "random": torch.tensor([0.0, 0.01, 0.02, 0.06, 0.06]).repeat(plot_sampling.DRAWS),
        "IoU-balanced": torch.tensor([0.0, 0.4]).repeat(plot_sampling.DRAWS),
    }
    shares = {name: interval_shares(ious, edges) for name, ious in negatives.items()}
    rows = [line.split() for line in plot_sampling.table(negatives, shares, edges).splitlines()]
    assert rows[0] == ["negatives", "all", "hard", "random", "IoU-balanced"]
    assert rows[1] == ["number", "4", "1", "5", "2"]
    assert rows[2] == ["share", "with", "IoU", "0.00", "to", "0.25", "75.0", "%", "0.0", "%", "100.0", "%", "50.0", "%"]
    assert rows[4] == ["share", "with", "IoU", "above", "0.05", "50.0", "%", "100.0", "%", "40.0", "%", "50.0", "%"]
    assert rows[5][-5:] == [">", "60", "%", "about", "30", "%"][-5:]


def test_it_prints_a_table_and_draws_two_pictures(coco_root, tmp_path, capsys):
    plot_sampling.main(["--data-path", str(coco_root), *SMALL, "--output-dir", str(tmp_path / "out")])
    _, origin, _, heading, *lines = capsys.readouterr().out.splitlines()
    assert origin == "the negatives of 2 training images; an untrained detector, whose errors say little"
    assert heading.split()[-4:] == ["all", "hard", "random", "IoU-balanced"]
    assert len(lines) == 1 + len(interval_edges(IoUBalancedSampler(), plot_sampling.INTERVALS)) - 1 + 2 + 1
    for name in ("sampling_ious.png", "sampling_boxes.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 100


@pytest.mark.parametrize(("batches", "num_images"), [(2, 4), (99, 5)])
def test_as_many_batches_are_measured_as_asked_for(
    coco_root, tmp_path, capsys, monkeypatch, undrawn, batches, num_images
):
    add_images(coco_root, "train", 3)
    sizes = []
    match = plot_sampling.match_proposals
    monkeypatch.setattr(plot_sampling, "match_proposals", lambda *args: [sizes.append(len(args[1])), match(*args)][1])
    options = ["--data-path", str(coco_root), *SMALL, "--output-dir", str(tmp_path), "--batches", str(batches)]
    plot_sampling.main(options)
    assert f"the negatives of {num_images} training images" in capsys.readouterr().out
    assert sizes == [2, 2, 1][: len(sizes)]
    assert sum(sizes) == num_images


def test_real_images(real_data, tmp_path, capsys):
    options = ["--data-path", str(real_data("coco_tiny")), *SMALL, "--batches", "1", "--output-dir", str(tmp_path)]
    plot_sampling.main(options)
    assert "IoU-balanced" in capsys.readouterr().out
    assert (tmp_path / "sampling_boxes.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "libra_retinanet"], "--model libra_retinanet: it has no second stage"),
        (["--model", "libra_rpn"], "--model libra_rpn: it has no second stage"),
        (["--no-sampler"], "--no-sampler: there is no IoU-balanced sampling to draw"),
    ],
)
def test_what_cannot_be_drawn_is_named(coco_root, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        plot_sampling.main(["--data-path", str(coco_root), *SMALL, "--output-dir", str(tmp_path), *options])


def test_a_trained_baseline_is_drawn_with_another_batch_size(coco_root, tmp_path, capsys):
    options = ["--data-path", str(coco_root), *SMALL, "--no-sampler"]
    train_torchvision_libra.main([*options, "--output-dir", str(tmp_path)])
    plot_sampling.main(["--resume", str(tmp_path / "checkpoint.pth"), "-b", "1", "--sampler"])
    assert (tmp_path / "sampling_ious.png").exists()
    assert f"2 training images; weights of {tmp_path}/checkpoint.pth, after 1 of 1 epochs" in capsys.readouterr().out


def test_a_fast_rcnn_is_measured_on_the_proposals_it_is_given(coco_root, tmp_path, capsys, undrawn):
    boxes = [[5, 5, 34, 24], [0, 0, 40, 40], [30, 20, 60, 40]]
    file = write(tmp_path / "proposals.npy", {(0, 11): boxes, (0, 12): boxes})
    options = ["--data-path", str(coco_root), *SMALL, "--model", "libra_fastrcnn", "--proposals", str(file)]
    plot_sampling.main([*options, "--output-dir", str(tmp_path)])
    assert "number             4             2             4             4" in capsys.readouterr().out
