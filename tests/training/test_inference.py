import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum, resnet50
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

from balanced_learning.detection.imbalance.objective_level import box_errors
from balanced_learning.training import load_detector
from balanced_learning.training.checkpoint import save
from balanced_learning.training.data.batching import DetectionLoader, OneByOne
from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.dataset import DetectionDataset
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.data.proposals import ProposalFile, row_type
from balanced_learning.training.errors import UserError
from balanced_learning.training.inference import predict
from balanced_learning.training.measuring import batches_to_measure, detector_and_images
from balanced_learning.training.model import build_model, make_model
from balanced_learning.training.optimization import Precision, make_average
from examples import train_torchvision_libra
from tests.training.small import FIRST_EPOCH, SMALL, config_of


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


def test_the_average_of_the_weights_is_loaded_where_there_is_one(tmp_path):
    config = config_of("--data-path", "-", *SMALL, "--ema", 0.9, "--output-dir", tmp_path)
    labels = Labels({1: "person"}, {1: 1}, 2)
    model = build_model(config, 2)
    average = make_average(model, 0.9)
    for tensor in average.module.state_dict().values():
        tensor.add_(1)
    path = tmp_path / "checkpoint.pth"
    save(path, {"model": model, "ema": average}, config=config, labels=labels, position=FIRST_EPOCH)
    loaded = load_detector(path).state_dict()
    assert loaded.keys() == average.module.state_dict().keys()
    assert all(value.equal(loaded[name]) for name, value in average.module.state_dict().items())
    fine_tuned = make_model(config_of("--data-path", "-", *SMALL, "--weights", path), labels, None).state_dict()
    assert all(value.equal(loaded[name]) for name, value in fine_tuned.items())
    content = torch.load(path)
    for entry, message in ((3, "is no tensor of plain numbers"), (torch.zeros(2), "does not fit the model")):
        torch.save(content | {"ema": {"module.x": entry}}, path)
        with pytest.raises(UserError, match=message):
            load_detector(path)


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
    """Of the same layers, settings, weights and trained parameters, though nothing can be downloaded again."""
    config = config_of("--data-path", "-", "--model", model, "--output-dir", tmp_path, *flags)
    num_classes = 91 if "--weights" in flags else 4
    labels = Labels({1: "person"}, {1: 1}, num_classes)
    with_heads = {"libra_fasterrcnn": fasterrcnn_resnet50_fpn, "libra_retinanet": retinanet_resnet50_fpn}[model]
    stock = with_heads(weights=None, weights_backbone=None) if "--weights" in flags else resnet50()
    with monkeypatch.context() as patched:
        patched.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: stock.state_dict())
        original = make_model(config, labels, None)
    save(tmp_path / "checkpoint.pth", {"model": original}, config=config, labels=labels, position=FIRST_EPOCH)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", refuse)
    rebuilt = load_detector(tmp_path / "checkpoint.pth")
    assert str(rebuilt) == str(original)
    assert all(value.equal(original.state_dict()[name]) for name, value in rebuilt.state_dict().items())
    trained = [[name for name, p in each.named_parameters() if p.requires_grad] for each in (rebuilt, original)]
    assert trained[0] == trained[1]


def refuse(*_, **__):
    raise AssertionError("a download")


class Sees(nn.Module):
    """Remembers what it is called with, and finds what is proposed."""

    def forward(self, images, targets=None):
        self.targets = targets
        return [{"boxes": target["proposals"]} for target in targets] if targets else [{} for _ in images]


@pytest.fixture
def proposals(tmp_path):
    """For coco_root: the objects."""
    rows = np.zeros(3, row_type(2))
    rows["split"], rows["image_id"], rows["count"], rows["boxes"][:, 0] = [0, 0, 1], [11, 12, 21], 1, [4, 4, 34, 24]
    np.save(tmp_path / "p.npy", rows)
    return tmp_path / "p.npy"


@pytest.mark.parametrize("has_proposals", [False, True])
def test_a_detector_is_given_the_proposals_of_its_data_alone(coco_root, proposals, has_proposals):
    given = ProposalFile.open(proposals) if has_proposals else None
    images = DetectionDataset(read_split(coco_root, "val2017"), {90: 1, 3: 2}, proposals=given)
    loader = DetectionLoader(images, OneByOne(1), 0, torch.device("cpu"))
    detector = Sees()
    found = predict(detector, loader, Precision(None, torch.device("cpu")), 20)
    if has_proposals:
        assert found[21]["boxes"].tolist() == [[4, 4, 34, 24]]
    else:
        assert found == {21: {}}
        assert detector.targets is None


def test_a_fast_rcnn_is_measured_on_its_proposals_and_not_loaded_for_images(coco_root, proposals, tmp_path):
    flags = ["--data-path", coco_root, *SMALL, "--model", "libra_fastrcnn", "--proposals", proposals]
    config = config_of(*flags, "--output-dir", tmp_path)
    model, dataset = detector_and_images(config, None)
    ((images, targets),) = batches_to_measure("errors", config, model, dataset)
    assert [target["proposals"].tolist() for target in targets] == [[[4, 4, 34, 24]]] * 2
    assert len(box_errors(model, images, targets)) > 0
    labels = Labels({1: "car", 2: "toothbrush"}, {1: 3, 2: 90}, 3)
    save(tmp_path / "checkpoint.pth", {"model": model}, config=config, labels=labels, position=FIRST_EPOCH)
    with pytest.raises(UserError, match=r"checkpoint\.pth: of a Fast R-CNN, .* it needs proposals"):
        load_detector(tmp_path / "checkpoint.pth")
