import pytest
from PIL import Image

from examples import plot_loss
from tests.training.small import SMALL, name_as_untrained, save_untrained
from tests.training.test_proposals import write


def test_the_curves_need_neither_data_nor_detector(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot_loss, "detector_and_images", None)
    plot_loss.main(["--output-dir", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"wrote losses.png to {tmp_path / 'out'}\n"
    with Image.open(tmp_path / "out" / "losses.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 50


@pytest.mark.parametrize(
    "options", [[], ["--no-sampler", "--no-box-loss", "--no-pyramid"], ["--model", "libra_retinanet"]]
)
def test_a_detector_is_measured_under_each_loss(coco_root, tmp_path, capsys, monkeypatch, options):
    monkeypatch.setattr(plot_loss, "save_losses", lambda *_: None)
    options = ["--data-path", str(coco_root), *SMALL, "--output-dir", str(tmp_path), *options]
    plot_loss.main([*options, "--alphas", "0.5", "--gammas", "1", "1.5", "--beta", "0.05", "--batches", "1"])
    _, origin, inliers, _, *rows, paper, _ = capsys.readouterr().out.splitlines()
    assert "positives of 2 training images; an untrained detector" in origin
    assert 0 < float(inliers.split()[0]) < 100
    assert [row.rpartition("gamma")[2].split()[0] for row in rows[1:]] == ["1", "1.5"]
    smooth, *balanced = ([float(word) for word in row.split()[-6::2]] for row in rows)
    for shares in balanced:
        assert all(more > less for more, less in zip(shares, smooth, strict=True))  # what balanced L1 is for
    assert "30 %" in paper


def test_the_weights_are_those_of_the_checkpoint(coco_root, edit, tmp_path, capsys):
    name_as_untrained(edit)
    checkpoint = save_untrained(tmp_path / "run" / "checkpoint.pth")
    plot_loss.main(["--data-path", str(coco_root), "--resume", str(checkpoint), "--batches", "1"])
    assert f"weights of {checkpoint}, after 1 of 1 epochs" in capsys.readouterr().out
    assert (tmp_path / "run" / "losses.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alphas", "0.5", "0.001"], "--alphas, --gammas and --beta: gamma / alpha must be at most 80"),
        (["--beta", "0"], "--beta 0: balanced L1 needs one above 0"),
        (["--model", "libra_rpn", "--recipe", "shapes"], "--model libra_rpn: it has no second stage"),
        (["--resume", "missing.pth"], "--resume missing.pth: no such file"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{message}") as ending:
        plot_loss.main(["--output-dir", str(tmp_path / "out"), *options])
    assert "\n" not in str(ending.value)
    assert not (tmp_path / "out" / "losses.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alphas", "0.5", "0"], "--alphas: must be at least 1e-06, got 0"),
        (["--gammas", "inf"], "--gammas: must be at least 1e-06, got inf"),
        (["--batches", "0"], "--batches: must be at least 1, got 0"),
    ],
)
def test_bad_numbers_are_named(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        plot_loss.main(["--output-dir", str(tmp_path), *options])
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: argument {message}")


def test_a_fast_rcnn_is_measured_on_the_proposals_it_is_given(coco_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot_loss, "save_losses", lambda *_: None)
    boxes = [[5, 5, 34, 24], [0, 0, 40, 40], [30, 20, 60, 40]]
    file = write(tmp_path / "proposals.npy", {(0, 11): boxes, (0, 12): boxes})
    options = ["--data-path", str(coco_root), *SMALL, "--model", "libra_fastrcnn", "--proposals", str(file)]
    plot_loss.main([*options, "--output-dir", str(tmp_path)])
    assert "the 4 positives of 2 training images" in capsys.readouterr().out
