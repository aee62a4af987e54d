import pytest
import torch
from torch import nn
from torchvision.models import ResNet50_Weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, RetinaNet_ResNet50_FPN_Weights

from balanced_learning.training import load_detector
from balanced_learning.training.checkpoint import save
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError
from balanced_learning.training.model import build_model
from examples import train_torchvision_libra
from tests.training.small import SMALL, config_of


def test_a_trained_detector_is_loaded_with_its_categories(coco_root, tmp_path):
    train_torchvision_libra.main(["--data-path", str(coco_root), *SMALL, "--output-dir", str(tmp_path)])
    detector = load_detector(str(tmp_path / "checkpoint.pth"))
    assert detector.categories == {1: "car", 2: "toothbrush"}
    assert not detector.training
    assert detector.transform.min_size == (64,)
    content = torch.load(tmp_path / "checkpoint.pth")
    assert all(torch.equal(value, content["model"][name]) for name, value in detector.state_dict().items())
    with torch.no_grad():
        (output,) = detector([torch.rand(3, 48, 64)])
    assert output.keys() == {"boxes", "labels", "scores"}


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"missing\.pth: cannot be read"):
        load_detector(tmp_path / "missing.pth")


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("libra_fasterrcnn", ["--weights", "DEFAULT"]),
        ("libra_retinanet", ["--weights", "DEFAULT"]),
        ("libra_fasterrcnn", ["--path-aggregation"]),
        ("libra_retinanet", ["--weights-backbone", "none"]),
    ],
)
def test_a_detector_that_began_with_weights_is_rebuilt_without_them(tmp_path, monkeypatch, model, flags):
    """Of the same layers, settings and trained parameters, though nothing can be downloaded the second time."""
    config = config_of("--data-path", "-", "--model", model, "--output-dir", tmp_path, *flags)
    num_classes = 91 if "--weights" in flags else 4
    offered = FasterRCNN_ResNet50_FPN_Weights if model == "libra_fasterrcnn" else RetinaNet_ResNet50_FPN_Weights
    with monkeypatch.context() as patched:
        patched.setattr(torch.hub, "load_state_dict_from_url", refuse)
        patched.setattr(ResNet50_Weights, "get_state_dict", lambda *_, **__: without_weights(nn.Module()))
        patched.setattr(offered, "get_state_dict", lambda *_, **__: without_weights(nn.Module()))
        patched.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        original = build_model(config, num_classes)
    labels = Labels({1: "thing"}, {1: 1}, num_classes)
    save(tmp_path / "checkpoint.pth", {"model": original}, config=config, labels=labels, epoch=0, iterations=1)
    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", refuse)
    monkeypatch.setattr(offered, "get_state_dict", refuse)
    rebuilt = load_detector(tmp_path / "checkpoint.pth")
    assert str(rebuilt.backbone) == str(original.backbone)
    assert str(rebuilt) == str(original)
    trained = [[name for name, p in each.named_parameters() if p.requires_grad] for each in (rebuilt, original)]
    assert trained[0] == trained[1]


def refuse(*_, **__):
    raise AssertionError("a download")


def without_weights(module):
    return module.state_dict()
