import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from balanced_learning.training.model import build_model
from examples import plot_pyramid, train_torchvision_libra
from tests.training.small import SMALL, config_of


def shape_and_colors(path) -> tuple[tuple[int, int], int]:
    with Image.open(path) as picture:
        return picture.size, len(picture.convert("RGB").getcolors(maxcolors=2**24))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["P2, stride 4", "P3, stride 8", "P4, stride 16", "P5, stride 32"]),
        (["--path-aggregation"], ["P2, stride 4", "P3, stride 8", "P4, stride 16", "P5, stride 32"]),
        (
            ["--model", "libra_retinanet"],
            ["P3, stride 8", "P4, stride 16", "P5, stride 32", "P6, stride 64"],
        ),
    ],
)
def test_heat_is_that_of_what_goes_through_the_pyramid(options, names):
    torch.manual_seed(0)
    model = build_model(config_of("--data-path", "-", *SMALL, *options), 3).eval()
    bfp = model.backbone.bfp
    nn.init.normal_(bfp.refine.out.weight)
    seen = {}
    bfp.register_forward_hook(lambda _, args, output: seen.update(before=args[0], after=output))
    bfp.refine.register_forward_hook(lambda _, args, output: seen.update(average=args[0], refined=output))
    image = torch.rand(3, 60, 85)  # 64 x 90 for the model, in a batch of 64 x 96
    averages, levels = plot_pyramid.find_heat(model, image)
    with torch.no_grad():
        model([image])

    def heat(features: Tensor) -> Tensor:
        height, width = features.shape[2:]
        magnitude = features[0].abs().sum(dim=0) / 64
        return magnitude[torch.arange(64) * height // 64][:, torch.arange(90) * width // 96]

    torch.testing.assert_close(averages, [heat(seen["average"]), heat(seen["refined"])], rtol=1e-3, atol=1e-4)
    assert list(levels) == names
    for i, (before, after) in enumerate(zip(seen["before"].values(), seen["after"].values(), strict=True)):
        size = before.shape[2:]
        there, back = F.interpolate, F.adaptive_max_pool2d
        if i < bfp.refine_level:
            there, back = back, there
        rescaled = there(before, seen["average"].shape[2:])
        expected = [heat(before), heat(rescaled), heat(before + back(seen["average"], size)), heat(after)]
        torch.testing.assert_close(levels[names[i]], expected, rtol=1e-3, atol=1e-4)


def test_a_trained_pyramid_is_drawn_beside_its_checkpoint(coco_root, tmp_path, capsys):
    options = ["--data-path", str(coco_root), *SMALL]
    train_torchvision_libra.main([*options, "-b", "2", "--epochs", "1", "--output-dir", str(tmp_path / "run")])
    plot_pyramid.main([*options, "--resume", str(tmp_path / "run" / "checkpoint.pth")])
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote pyramid.png to {tmp_path / 'run'}"
    assert shape_and_colors(tmp_path / "run" / "pyramid.png")[1] > 100


def test_any_image_can_be_looked_at(coco_root, tmp_path):
    options = ["--data-path", str(coco_root), *SMALL, "--output-dir", str(tmp_path)]
    plot_pyramid.main(options)
    (width, height), _ = shape_and_colors(tmp_path / "pyramid.png")  # of an image of 64 x 48
    Image.effect_noise((40, 120), 80).convert("1").save(tmp_path / "tall.png")
    plot_pyramid.main([*options, "--image", str(tmp_path / "tall.png")])
    (same_width, larger_height), colors = shape_and_colors(tmp_path / "pyramid.png")
    assert same_width == width
    assert larger_height > 2 * height
    assert colors > 100


@pytest.mark.parametrize("model", ["libra_fasterrcnn", "libra_retinanet"])
def test_real_images(real_data, tmp_path, model):
    options = ["--data-path", str(real_data("coco_tiny")), *SMALL, "--model", model, "--output-dir", str(tmp_path)]
    plot_pyramid.main(options)
    assert (tmp_path / "pyramid.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-pyramid"], "--no-pyramid: there is no pyramid to draw"),
        (["--image", "missing.jpg"], "missing.jpg is missing"),
        (["--image", "strip.png"], "strip.png: nothing can be drawn of 4000 x 2 pixels"),
        (["--output-dir", "strip.png"], "--output-dir strip.png: cannot be written"),
    ],
)
def test_what_cannot_be_drawn_is_named(coco_root, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4000, 2)).save("strip.png")
    with pytest.raises(SystemExit, match=f"error: {message}"):
        plot_pyramid.main(["--data-path", str(coco_root), *SMALL, "--output-dir", str(tmp_path), *options])
