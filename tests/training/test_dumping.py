import copy
import math
import os
import signal
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype, to_image

from balanced_learning.detection.proposals import first_stage, second_stage
from balanced_learning.training import distributed
from balanced_learning.training.data import proposal_writer
from balanced_learning.training.data.batching import make_loaders
from balanced_learning.training.data.coco import NAMES, read_split
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.data.proposal_writer import ProposalWriter
from balanced_learning.training.data.proposals import ProposalFile
from balanced_learning.training.dumping import dump_proposals
from balanced_learning.training.endings import ends_in_one_line
from balanced_learning.training.errors import SharedError, UserError
from balanced_learning.training.inference import predict
from balanced_learning.training.model import build_model
from balanced_learning.training.optimization import Precision
from balanced_learning.training.signals import EXIT_CODE, Stopped, StopSignals
from tests.training.small import SMALL, config_of
from tests.training.toy import run_processes, write_noise

CPU = torch.device("cpu")
LIMIT = 6


class Proposer(nn.Module):
    """In place of an RPN: as many boxes as the image says, from 0 to more than there are places for."""

    def __init__(self, log=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))
        self.log = log

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training
        assert len(images) == 1
        total = round(images[0].double().sum().item() * 255)
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{total}\n")
        count = total % (LIMIT + 3)
        corner = images[0][:2, :count, 0].T * self.weight
        boxes = torch.cat([corner, corner + 2 + images[0][:2, :count, 1].T], 1)
        return [{"boxes": boxes, "scores": torch.linspace(1, 0.1, count), "labels": torch.ones(count)}]


@pytest.fixture
def root(tmp_path):
    return write_noise(tmp_path / "data", 7, 4)


def dump(data, path, model=None, signals=None, **options):
    splits = data if isinstance(data, list) else [read_split(data, name) for name in NAMES]
    options = {"settings": {"min_size": 64}, "workers": 0, "max_unreadable": 0, "limit": LIMIT} | options
    dump_proposals(model or Proposer(), Precision(None, CPU), path, splits, signals or StopSignals(), **options)


def test_the_file_holds_what_the_detector_proposes_for_every_image(root, tmp_path, capsys):
    path = tmp_path / "new" / "p.npy"
    dump(root, path)
    file = ProposalFile.open(path)
    assert [each.name for each in path.parent.iterdir()] == ["p.npy"]
    assert file.limit == LIMIT
    counts = []
    for name in NAMES:
        split = read_split(root, name)
        file.require(split)
        for position, image_id in enumerate(split.columns.image_ids.tolist()):
            (expected,) = Proposer().eval()([to_dtype(to_image(split.load_image(position)), scale=True)])
            assert np.array_equal(file.boxes(name, image_id), expected["boxes"][:LIMIT].detach().numpy())
            counts.append(len(file.boxes(name, image_id)))
            row = file.rows[len(counts) - 1]
            assert np.array_equal(row["scores"][: counts[-1]], expected["scores"][:LIMIT].numpy())
            assert not row["scores"][counts[-1] :].any()
    assert min(counts) < max(counts) == LIMIT
    out = capsys.readouterr().out
    assert "11 images x 6 proposals: 0.0 MB" in out
    assert "proposals of train2017 [7/7]" in out


def test_a_fast_rcnn_with_the_file_learns_from_and_finds_what_the_faster_rcnn_does(root, tmp_path):
    config = config_of("--data-path", root, *SMALL, "--rpn-post-nms-top-n-train", 200)
    splits = [read_split(root, name) for name in NAMES]
    whole = build_model(config, 2).eval()
    whole.roi_heads.score_thresh = 0.0
    rpn, fast = first_stage(copy.deepcopy(whole)), second_stage(copy.deepcopy(whole))
    dump(splits, tmp_path / "p.npy", rpn, limit=200)
    labels, device = Labels.of(splits[0]), torch.device("cpu")
    _, own = make_loaders(config, device, *splits, labels)
    given = replace(config, data=replace(config.data, proposals=tmp_path / "p.npy", data_augmentation="none"))
    loader, val_loader = make_loaders(given, device, *splits, labels)
    expected, found = (predict(*each, Precision(None, device), 20) for each in ((whole, own), (fast, val_loader)))
    for image_id, output in found.items():
        assert len(output["boxes"]) > 50
        torch.testing.assert_close(output, expected[image_id], rtol=1e-4, atol=1e-3)

    batch = next(iter(loader)).to(device)
    sampled = []
    for model in (whole, fast):
        images, targets = model.transform(batch.images, batch.targets)
        model.rpn.training = True
        with torch.no_grad():
            proposals = model.rpn(images, model.backbone(images.tensors), targets)[0]
        torch.manual_seed(0)
        sampled.append(model.roi_heads.select_training_samples(proposals, targets))
    assert sum(len(boxes) for boxes in sampled[0][0]) > 100
    torch.testing.assert_close(sampled[0], sampled[1], rtol=1e-4, atol=1e-3)


def test_what_is_there_is_not_written_over(root, tmp_path):
    path = tmp_path / "p.npy"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"p\.npy: is there already"):
        dump(root, path)
    assert path.read_text() == "mine"


def room(free):
    """In place of shutil.disk_usage."""
    return lambda folder: SimpleNamespace(free=free)


def test_a_disk_that_is_too_small_is_found_before(root, tmp_path, monkeypatch):
    monkeypatch.setattr(proposal_writer.shutil, "disk_usage", room(123_456_789))
    with pytest.raises(UserError, match=r"p\.npy: needs 22\.0 GB, and 0\.1 GB are free there"):
        dump(root, tmp_path / "p.npy", limit=10**8)
    assert not list(tmp_path.glob("p.npy*"))


def test_a_full_disk_ends_in_one_line(root, small_disk, monkeypatch):
    monkeypatch.setattr(proposal_writer.shutil, "disk_usage", room(10**9))
    with pytest.raises(UserError, match=r"unfinished: cannot be written .No space left"):
        dump(root, small_disk / "p.npy", limit=100_000)
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_has_no_proposals(root, tmp_path, capsys, workers):
    splits = [read_split(root, name) for name in NAMES]
    dump(splits, tmp_path / "whole.npy")
    (root / "train2017" / "4.png").write_bytes(b"no image")
    (root / "val2017" / "9.png").unlink()
    with pytest.raises(SharedError, match="1 images cannot be read, more than --max-unreadable 0"):
        dump(splits, tmp_path / "p.npy", workers=workers)
    assert "4.png is unreadable" in capsys.readouterr().err
    dump(splits, tmp_path / "p.npy", workers=workers, max_unreadable=2)
    assert capsys.readouterr().err.count("warning: ") == 2
    whole, file = (ProposalFile.open(tmp_path / name) for name in ("whole.npy", "p.npy"))
    for row, expected in zip(file.rows, whole.rows, strict=True):
        assert row == expected if row["image_id"] not in (4, 9) else row["count"] == 0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_proposals_that_are_no_boxes_are_not_written(root, tmp_path, wrong):
    model = Proposer()
    model.weight.data.fill_(wrong)
    with pytest.raises(UserError, match=r"image 1: what the detector proposes: proposal 0 is no box: \["):
        dump(root, tmp_path / "p.npy", model)
    with pytest.raises(UserError, match="not finished, 11 of 11 images"):
        ProposalFile.open(next(tmp_path.glob("p.npy.*")))


def test_what_is_done_before_a_kill_is_not_done_again(root, tmp_path):
    """And the file is that of a run without a kill, bit by bit."""
    dump(root, tmp_path / "whole.npy", Proposer(tmp_path / "all"))
    for images in (5, 9):
        (killed,) = run_processes(1, tmp_path / "said", dump_until, root, tmp_path, images, signal.SIGKILL)
        assert killed.code == -signal.SIGKILL
        assert not (tmp_path / "p.npy").exists()
    dump(root, tmp_path / "p.npy", Proposer(tmp_path / "log"))
    everything, log = ((tmp_path / name).read_text().split() for name in ("all", "log"))
    assert log == [*everything[:5], *everything[4:9], *everything[8:]]  # twice what a kill cut off
    assert (tmp_path / "p.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_a_row_is_on_the_disk_before_it_counts_as_done(root, tmp_path, monkeypatch):
    """Whatever a power cut leaves: between two flushes, any of what was written."""
    on_disk = []
    flush = np.memmap.flush

    def look(rows):
        on_disk.append(rows.copy())
        flush(rows)

    monkeypatch.setattr(proposal_writer, "FLUSH_SECONDS", 0)
    monkeypatch.setattr(np.memmap, "flush", look)
    dump(root, tmp_path / "p.npy")
    assert len(on_disk) > 11
    for before, after in pairwise(on_disk):
        for row in np.flatnonzero(after["count"] >= 0):
            assert np.array_equal(before["boxes"][row], after["boxes"][row])
            assert np.array_equal(before["scores"][row], after["scores"][row])
    assert (on_disk[-1]["count"] >= 0).all()


def test_a_row_that_was_begun_is_filled_anew(root, tmp_path):
    begun = proposal_writer.begin(tmp_path / "p.npy", [read_split(root, "train2017")], LIMIT, "0")
    with ProposalWriter(begun) as writer:
        writer.put(2, np.full((5, 4), 3), np.ones(5))
        writer.put(2, np.full((1, 4), 2), np.ones(1))
        row = writer.rows[2]
        assert (row["boxes"].sum(), row["scores"].sum()) == (8, 1)


def test_processes_share_the_images_and_stop_together(root, tmp_path):
    dump(root, tmp_path / "whole.npy")
    stopped = run_processes(2, tmp_path / "said", dump_until, root, tmp_path, 3, signal.SIGTERM, 1)
    assert [each.code for each in stopped] == [EXIT_CODE] * 2
    assert "in the proposals of train2017; the same command goes on with" in stopped[0].err
    assert not (tmp_path / "p.npy").exists()
    ended = run_processes(3, tmp_path / "said", dump_until, root, tmp_path, 99, None)
    assert [each.code for each in ended] == [0] * 3
    assert (tmp_path / "p.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert len((tmp_path / "log").read_text().split()) == 11


def test_processes_hear_of_the_last_image_that_cannot_be_read(root, tmp_path):
    ended = run_processes(2, tmp_path / "said", dump_without_the_last, root, tmp_path)
    assert [each.code for each in ended] == [1, 1]
    assert "11.png is missing" in ended[0].err
    assert "error: 1 images cannot be read, more than --max-unreadable 0" in ended[0].err


def dump_without_the_last(root, folder):
    distributed.start("cpu", "env://")
    splits = [read_split(root, name) for name in NAMES]
    distributed.barrier()
    (root / "val2017" / "11.png").unlink(missing_ok=True)
    with ends_in_one_line():
        dump(splits, folder / "p.npy")


def dump_until(root, folder, images, number, rank=0):
    """Dumps, and signals the process of a rank after so many different images of all, before they are written down."""
    proposal_writer.FLUSH_SECONDS = 0
    model = Proposer(folder / "log")

    def act(*_):
        if len(set(model.log.read_text().split())) >= images and distributed.rank() == rank:
            os.kill(os.getpid(), number)

    model.register_forward_hook(act)
    with StopSignals() as signals, ends_in_one_line():
        distributed.start("cpu", "env://")
        dump(root, folder / "p.npy", model, signals)


@pytest.mark.parametrize("change", ["weights", "settings", "images", "limit"])
def test_only_the_same_proposals_go_on(root, tmp_path, capsys, change):
    path, model, options = tmp_path / "p.npy", Proposer(), {}
    stop = StopSignals()
    stop.received = "SIGTERM"
    with pytest.raises(Stopped, match=r"stopped by SIGTERM in the proposals of train2017; .*p\.npy\.\w{8}\.unfinished"):
        dump(root, path, model, stop)
    (begun,) = tmp_path.glob("p.npy.*")
    if change == "weights":
        model.weight.data += 1e-7
    elif change == "images":
        root = write_noise(tmp_path / "more", 7, 5)
    else:
        options = {"settings": {"settings": {"min_size": 32}}, "limit": {"limit": 7}}[change]
    dump(root, path, model, **options)
    assert f"{begun}: begun with other weights, settings or data" in capsys.readouterr().err
    assert ProposalFile.open(path).limit == options.get("limit", LIMIT)


def test_a_damaged_unfinished_file_is_named(root, tmp_path):
    path, stop = tmp_path / "p.npy", StopSignals()
    stop.received = "SIGTERM"
    with pytest.raises(Stopped):
        dump(root, path, signals=stop)
    (begun,) = tmp_path.glob("p.npy.*")
    rows = np.load(begun)
    rows["image_id"] += 1
    np.save(begun.open("wb"), rows)
    with pytest.raises(UserError, match=r"unfinished: damaged, its rows are of other images; remove it"):
        dump(root, path)


def test_processes_on_several_machines_are_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda name: [name, "another"])
    with pytest.raises(SharedError, match="several machines"):
        dump(root, tmp_path / "p.npy")
