import pytest
from PIL import Image

from examples import plot_loss
from tests.training.small import SMALL, save_untrained


def test_the_curves_need_neither_data_nor_detector(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot_loss, "detector_and_images", None)
    plot_loss.main(["--output-dir", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"wrote losses.png to {tmp_path / 'out'}\n"
    with Image.open(tmp_path / "out" / "losses.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 50


@pytest.mark.parametrize(
    "options", [[], ["--no-sampler", "--no-box-loss", "--no-pyramid"], ["--model", "libra_retinanet"]]
)
def test_a_detector_is_measured_under_each_loss(coco_root, tmp_path, capsys, options):
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
    def rename(content):
        content["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog [old]"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 1

    edit(rename)
    edit(rename, "val")
    checkpoint = save_untrained(tmp_path / "run" / "checkpoint.pth")
    plot_loss.main(["--data-path", str(coco_root), "--resume", str(checkpoint), "--batches", "1"])
    assert f"weights of {checkpoint}, after 1 of 1 epochs" in capsys.readouterr().out
    assert (tmp_path / "run" / "losses.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alphas", "0.5", "0"], "alpha must be finite and > 0, got 0.0"),
        (["--gammas", "inf"], "gamma must be finite and > 0, got inf"),
        (["--alphas", "0.001"], "gamma / alpha must be at most 80"),
        (["--beta", "-1"], "beta must be finite and > 0, got -1.0"),
        (["--batches", "-2", "--recipe", "shapes"], "--batches -2: must be at least 1"),
        (["--resume", "missing.pth"], "--resume missing.pth: no such file"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{message}") as ending:
        plot_loss.main(["--output-dir", str(tmp_path / "out"), *options])
    assert "\n" not in str(ending.value)
    assert not (tmp_path / "out" / "losses.png").exists()
