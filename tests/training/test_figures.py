import pytest
import torch
from PIL import Image
from torch import nn

from balanced_learning import BalancedL1Loss, IoUBalancedSampler
from balanced_learning.detection.imbalance.sample_level import MatchedProposals, bin_edges, interval_edges
from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.dataset import DetectionDataset
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError
from balanced_learning.training.reporting import evaluation_picture, figures
from balanced_learning.training.reporting.evaluation_picture import (
    CROWD,
    FALSE_ALARM,
    FOUND,
    MISSED,
    choose_images,
    match_detections,
    save_evaluation,
)
from tests.training.disks import NO_ROOM, filled


def boxes_of(*rows) -> dict[str, torch.Tensor]:
    """Boxes of 10 x 10 pixels at (x, 0), with label and perhaps score."""
    x, labels, *scores = torch.tensor(rows, dtype=torch.float32).T if rows else torch.empty(3, 0)
    boxes = torch.stack([x, 0 * x, x + 10, 0 * x + 10], dim=1)
    return {"boxes": boxes, "labels": labels} | ({"scores": scores[0]} if scores else {})


@pytest.mark.parametrize(
    ("truth", "crowds", "detected", "hits", "ignored", "found"),
    [
        # The surer of two detections of an object is the hit, whatever their order and IoUs.
        ([(0, 1)], [], [(0, 1, 0.4), (1, 1, 0.9)], [False, True], [False] * 2, [True]),
        # Another class finds nothing.
        ([(0, 1)], [], [(0, 2, 0.9)], [False], [False], [False]),
        # IoU 7 / 13 is enough, 6 / 14 is not.
        ([(0, 1), (50, 1)], [], [(3, 1, 0.9), (54, 1, 0.9)], [True, False], [False] * 2, [True, False]),
        # A detection takes the object that it overlaps most, and leaves the other to the next.
        ([(0, 1), (2, 1)], [], [(2, 1, 0.9), (1, 1, 0.8)], [True, True], [False] * 2, [True, True]),
        # What is taken is taken: the second best is matched if it overlaps enough.
        ([(0, 1), (3, 1)], [], [(0, 1, 0.9), (0, 1, 0.8), (0, 1, 0.7)], [True, True, False], [False] * 3, [True, True]),
        # In a crowd of its class, what finds nothing is no false alarm; half of the box must lie in it.
        ([(0, 1)], [(0, 1)], [(0, 1, 0.9), (5, 1, 0.8), (6, 1, 0.7), (0, 2, 0.6)], [True, False, False, False],
         [False, True, False, False], [True]),
        ([], [], [(0, 1, 0.9)], [False], [False], []),
        ([(0, 1)], [], [], [], [], [False]),
        ([], [], [], [], [], []),
    ],
)  # fmt: skip
def test_hits_misses_and_false_alarms_are_told_apart(truth, crowds, detected, hits, ignored, found):
    result = match_detections(boxes_of(*truth), boxes_of(*crowds), boxes_of(*detected))
    assert [each.tolist() for each in result] == [hits, ignored, found]


@pytest.fixture
def dataset(coco_root, edit):
    """Eight images to draw, the first two of them without a box, a crowd in the last."""
    for image_id in range(13, 19):
        Image.new("RGB", (64, 48), "navy").save(coco_root / "train2017" / f"{image_id}.png")

    def spoil(content):
        content["images"] += [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(13, 19)]
        box = {"category_id": 90, "iscrowd": 0, "area": 600, "bbox": [4, 4, 30, 20]}
        content["annotations"] = [{**box, "id": i, "image_id": i} for i in range(13, 19)]
        content["annotations"].append({**box, "id": 19, "image_id": 18, "iscrowd": 1, "bbox": [34, 24, 30, 20]})

    edit(spoil)
    split = read_split(coco_root, "train2017")
    return DetectionDataset(split, Labels.of(split).label_of)


def test_images_are_chosen_by_seed_and_those_with_boxes_first(dataset):
    chosen = {tuple(choose_images(dataset, seed, 6)) for seed in range(10)}
    assert len(chosen) == 10
    assert all(sorted(indices) == list(range(2, 8)) for indices in chosen)
    assert choose_images(dataset, 3) == choose_images(dataset, 3)
    assert len(choose_images(dataset, 0)) == 4
    assert set(choose_images(dataset, 0, 20)[-2:]) == {0, 1}


def test_the_picture_of_an_evaluation_has_a_colour_for_each_outcome(dataset, tmp_path, monkeypatch):
    toothbrush = dataset.label_of[90]
    detections = {image["id"]: boxes_of() for image in dataset.split.images}
    detections[18] = {
        "boxes": torch.tensor([[4.0, 4, 34, 24], [40, 2, 60, 20], [36, 26, 60, 40], [0, 30, 30, 47]]),
        "scores": torch.tensor([0.9, 0.5, 0.8, 0.2]),  # the last is not shown
        "labels": torch.tensor([toothbrush] * 4).float(),
    }

    def colors(*indices) -> set[tuple[int, int, int]]:
        monkeypatch.setattr(evaluation_picture, "choose_images", lambda *_: indices)
        save_evaluation(tmp_path / "evaluation.png", dataset, detections, {toothbrush: "toothbrush"}, 0)
        with Image.open(tmp_path / "evaluation.png") as picture:
            below_legend = picture.crop((0, 80, *picture.size))
        return {color for count, color in below_legend.getcolors(2**24) if count > 500}  # more than smooth text has

    outcomes = {FOUND, MISSED, FALSE_ALARM, CROWD}
    assert colors(7) & outcomes == {FOUND, FALSE_ALARM, CROWD}
    assert colors(2) & outcomes == {MISSED}
    detections[18]["labels"][1] = 77  # of a class that the data has not
    assert colors(7) & outcomes == {FOUND, CROWD}
    assert colors(0) & outcomes == set()
    del detections[18]  # it could not be read, then
    assert colors(7, 2) & outcomes == {MISSED}


def test_an_evaluation_of_odd_shapes_and_names_is_drawn(edit, coco_root, tmp_path):
    names = []
    for i, size in enumerate([(1, 1), (2000, 2), (2, 2000), (64, 48)]):
        names.append("x" * 150 + f"{i}é[0].png")
        Image.new("RGB", size).save(coco_root / "train2017" / names[i])
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    edit(lambda content: content.update(images=images, annotations=[]))
    dataset = DetectionDataset(read_split(coco_root, "train2017"), {})
    save_evaluation(tmp_path / "e.png", dataset, {i: boxes_of() for i in range(4)}, {}, 1)
    assert (tmp_path / "e.png").exists()


@pytest.fixture
def kept(monkeypatch):
    """The figures that are closed, to look at."""
    figures_closed = []
    monkeypatch.setattr(figures.plt, "close", figures_closed.append)
    yield figures_closed
    monkeypatch.undo()
    figures.plt.close("all")


@pytest.mark.parametrize("num_epochs", [1, 2, 12])
def test_curves_have_whole_epochs_and_legends_beside_the_axes(tmp_path, kept, num_epochs):
    rows = [
        {"epoch": 3 + i, "loss": 1 / (i + 1), "loss_box_reg": 0.3, "AP": None, "AP50": 0.1} for i in range(num_epochs)
    ]
    figures.save_curves(tmp_path / "curves.png", rows)
    (figure,) = kept
    for axis in figure.axes:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick in [row["epoch"] for row in rows] for tick in ticks)
        assert axis.get_legend().get_window_extent().x0 >= axis.get_window_extent().x1
        assert axis.get_legend().get_window_extent().x1 <= figure.bbox.x1
    assert [line.get_label() for line in figure.axes[1].lines] == ["AP", "AP50", "AP75"]


def test_the_curves_of_proposals_are_of_their_recall(tmp_path, kept):
    figures.save_curves(tmp_path / "curves.png", [{"epoch": 0, "loss": 1.0, "AP": 0.1, "AR100": 0.2, "AR1000": 0.4}])
    assert [line.get_label() for line in kept[0].axes[1].lines] == ["AR100", "AR300", "AR1000"]
    assert kept[0].axes[1].get_ylabel() == "average recall in %"


def test_losses_are_drawn_with_their_gradients_and_smooth_l1_is_dashed(tmp_path, kept):
    smooth = {"smooth L1": nn.SmoothL1Loss()}
    rows = [smooth | {"ours": BalancedL1Loss()}, smooth | {str(i): BalancedL1Loss(gamma=1.0 + i) for i in range(5)}]
    figures.save_losses(tmp_path / "losses.png", rows, 1.0)
    (figure,) = kept
    gradient, value, *_ = figure.axes
    of_errors = [20, 100, 200, 300]  # 0.1, 0.5, 1 and 1.5
    wanted = {
        gradient: [[0.1, 0.5, 1, 1], [0.534, 1.178, 1.5, 1.5]],
        value: [[0.005, 0.125, 0.5, 1], [0.0314, 0.4006, 1.07859, 1.82859]],
    }
    for axis, curves in wanted.items():
        assert axis.lines[0].get_xdata()[of_errors].tolist() == pytest.approx([0.1, 0.5, 1, 1.5])
        assert [line.get_linestyle() for line in axis.lines[:2]] == ["--", "-"]
        for line, values in zip(axis.lines, curves, strict=False):
            assert [line.get_ydata()[i] for i in of_errors] == pytest.approx(values, abs=1e-3)
    for axis, losses in zip(figure.axes[1::2], rows, strict=True):
        assert [text.get_text() for text in axis.get_legend().get_texts()] == list(losses)
        assert axis.get_legend().get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize("sampler", [IoUBalancedSampler(), IoUBalancedSampler(num_bins=5, floor_iou=0.1, max_iou=None)])
def test_bars_lie_between_the_edges_and_the_sampler_s_bins_are_marked(tmp_path, kept, sampler):
    edges = interval_edges(sampler, at_least=10)
    shares = {name: torch.rand(len(edges) - 1) for name in ("random", "IoU-balanced")}
    figures.save_iou_shares(tmp_path / "ious.png", shares, edges, bin_edges(sampler))
    (figure,) = kept
    (axis,) = figure.axes
    assert [line.get_xdata()[0] for line in axis.lines] == bin_edges(sampler)
    for bars, share in zip(axis.containers, shares.values(), strict=True):
        for bar, low, high, height in zip(bars, edges[:-1].tolist(), edges[1:].tolist(), share.tolist(), strict=True):
            assert low < bar.get_x()
            assert bar.get_x() + bar.get_width() < high
            assert bar.get_height() == pytest.approx(100 * height)


@pytest.mark.parametrize("num_bins", [1, 3, 9])
def test_sampled_boxes_are_drawn_for_any_number_of_bins(tmp_path, num_bins):
    ious = torch.linspace(0, 0.5, 80)
    boxes = torch.rand(80, 4).cumsum(dim=1) * 10
    nothing = torch.zeros(80, dtype=torch.int64)
    proposals = MatchedProposals(torch.rand(3, 48, 64), boxes[:2], boxes, nothing, ious, nothing, ious)
    masks = {"all": [torch.ones(80, dtype=torch.bool)], "none": [torch.zeros(80, dtype=torch.bool)]}
    figures.save_sampled_boxes(tmp_path / "b.png", [proposals], masks, bin_edges(IoUBalancedSampler(num_bins=num_bins)))
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_the_pyramid_outlines_the_ground_truth_on_image_and_levels(tmp_path, kept):
    heat = torch.rand(30, 40)
    levels = {"P2": [heat] * 4, "P3": [heat] * 4}
    boxes = torch.tensor([[20.0, 20, 60, 50]])
    figures.save_pyramid(tmp_path / "pyramid.png", torch.zeros(3, 60, 80), boxes, [heat] * 2, levels, "FPN")
    panels = [axis for axis in kept[0].axes if axis.images]
    assert len(panels) == 11
    for axis in panels:
        (patch,) = axis.patches
        assert patch.get_bbox().extents.tolist() == [20, 20, 60, 50]
        assert axis.images[0].get_extent() == [-0.5, 79.5, 59.5, -0.5]  # heat and image in the pixels of the boxes


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1)])
def test_strips_make_no_endless_figures(tmp_path, size):
    heat = torch.rand(4, 4)
    levels = {"P2": [heat] * 4, "P3": [heat] * 4}
    boxes = torch.tensor([[0.0, 0, 1, 1]])
    figures.save_pyramid(tmp_path / "p.png", torch.rand(3, *size), boxes, [heat] * 2, levels, "FPN")
    nothing = torch.zeros(1, dtype=torch.int64)
    proposals = MatchedProposals(torch.rand(3, *size), boxes, boxes, nothing, torch.zeros(1), nothing, torch.zeros(1))
    masks = {"all": [torch.ones(1, dtype=torch.bool)] * 3}
    figures.save_sampled_boxes(tmp_path / "b.png", [proposals] * 3, masks, [0.0, 0.25, 0.5])
    for name in ("p.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert max(picture.size) < 8000


def test_a_figure_that_cannot_be_written_is_named_and_curves_are_gone_without(small_disk, capsys):
    shares, edges = {"random": torch.rand(3)}, torch.linspace(0, 0.6, 4)
    with filled(small_disk):
        with pytest.raises(UserError, match=rf"/ious\.png: cannot be written \({NO_ROOM}\)"):
            figures.save_iou_shares(small_disk / "ious.png", shares, edges, [0.0, 0.6])
        figures.save_curves(small_disk / "curves.png", [{"epoch": 0, "loss": 1.0}])
    assert capsys.readouterr().err == f"warning: {small_disk}/curves.png: cannot be written ({NO_ROOM})\n"
    assert not list(small_disk.iterdir())
    assert not figures.plt.get_fignums()


def test_the_real_sheet(real_data, tmp_path):
    """Every object is found by itself."""
    split = read_split(real_data("coco_tiny"), "val2017")
    labels = Labels.of(split)
    dataset = DetectionDataset(split, labels.label_of)
    detections = {}
    for index in choose_images(dataset, 0):
        _, target = dataset[index]
        detections[target["image_id"]] = {**target, "scores": torch.ones(len(target["boxes"]))}
    save_evaluation(tmp_path / "evaluation.png", dataset, detections, labels.names, 0)
    assert (tmp_path / "evaluation.png").stat().st_size > 100_000
