"""The weights that a run starts from, bit by bit those of a file or of torchvision; otherwise an error in a line."""

import json
import os
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum, get_model
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    fasterrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.ops import FrozenBatchNorm2d

from balanced_learning.detection import libra_fasterrcnn
from balanced_learning.detection.normalization import FrozenStatisticsBatchNorm2d
from balanced_learning.training import load_detector
from balanced_learning.training.checkpoint import save
from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError
from balanced_learning.training.model import build_model, make_model
from balanced_learning.training.weights import choose_labels
from tests.training.small import FIRST_EPOCH, SMALL, config_of

STOCK = {"libra_fasterrcnn": fasterrcnn_resnet50_fpn, "libra_retinanet": retinanet_resnet50_fpn}
PREDICTORS = ("roi_heads.box_predictor.", "head.classification_head.cls_logits.")
COCO_FILE = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url.rsplit("/", 1)[1]
BACKBONE = "mobilenet_v3_small"


def random_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: torch.rand_like(v) if v.is_floating_point() else v for key, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def stock():
    """Weights as torchvision offers them for its detectors."""
    return {
        name: random_state(builder(weights=None, weights_backbone=None, num_classes=91))
        for name, builder in STOCK.items()
    }


@pytest.fixture
def own_root(coco_root):
    """The data of ``coco_root`` with categories that COCO does not have."""
    for file in (coco_root / "annotations").iterdir():
        content = json.loads(file.read_text())
        content["categories"] = [{"id": 90, "name": "platelet"}, {"id": 3, "name": "car"}]
        file.write_text(json.dumps(content))
    return coco_root


def start(root, *flags):
    """The detector of a run that begins so, and its labels."""
    config = config_of("--data-path", root, "--device", "cpu", *flags)
    labels = choose_labels(config, read_split(root, "train2017"), None)
    return make_model(config, labels, None), labels


def differences(model: nn.Module, state: dict[str, torch.Tensor]) -> set[str]:
    """The parts of the model that are not bit by bit those of the state dict."""
    found = model.state_dict()
    odd = [k for k, v in found.items() if k not in state or v.shape != state[k].shape or not v.equal(state[k])]
    return {".".join(key.split(".")[: 3 if "cls_logits" in key else 2]) for key in odd}


@pytest.mark.parametrize("source", ["DEFAULT", "file"])
@pytest.mark.parametrize("model", STOCK)
def test_other_categories_start_the_predictors_anew(own_root, tmp_path, monkeypatch, capsys, stock, model, source):
    if source == "file":
        source = tmp_path / "stock.pth"
        torch.save(stock[model], source)
        monkeypatch.setattr(WeightsEnum, "get_state_dict", refuse)
    else:
        monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: stock[model])
    detector, labels = start(own_root, "--model", model, "--weights", source)
    anew = "roi_heads.box_predictor" if model == "libra_fasterrcnn" else "head.classification_head.cls_logits"
    assert differences(detector, stock[model]) == {anew, "backbone.bfp"}
    assert labels == Labels({1: "car", 2: "platelet"}, {1: 3, 2: 90}, 3)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith(f"--weights {source}: takes backbone.body, backbone.fpn, ")
    assert said.endswith(f"starts anew: backbone.bfp, {anew} (it knows no category 'platelet')\n")


def test_of_known_categories_the_whole_detector_is_taken(coco_root, tmp_path, monkeypatch, capsys, stock):
    state = stock["libra_fasterrcnn"]
    torch.save(state, tmp_path / "stock.pth")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)
    for source in ("DEFAULT", tmp_path / "stock.pth"):
        detector, labels = start(coco_root, "--weights", source, "--no-pyramid", "--test-only")
        assert differences(detector, state) == set()
        assert labels == Labels({90: "toothbrush", 3: "car"}, {90: 90, 3: 3}, 91)
        assert "anew" not in capsys.readouterr().out


@pytest.fixture
def run(tmp_path):
    """A checkpoint of a small detector of cars and toothbrushes, and its weights."""
    config = config_of("--data-path", "-", *SMALL, "--output-dir", tmp_path)
    model = build_model(config, 4)
    model.load_state_dict(random_state(model))
    labels = Labels({3: "car", 1: "toothbrush"}, {3: 1, 1: 2}, 4)
    save(tmp_path / "run.pth", {"model": model}, config=config, labels=labels, position=FIRST_EPOCH)
    return tmp_path / "run.pth", model.state_dict()


def test_a_checkpoint_is_taken_whole_for_its_own_categories(coco_root, run, capsys):
    file, state = run
    detector, labels = start(coco_root, *SMALL, "--weights", file)
    assert differences(detector, state) == set()
    assert labels == Labels({1: "toothbrush", 3: "car"}, {1: 90, 3: 3}, 4)
    assert "anew" not in capsys.readouterr().out


def test_a_checkpoint_is_taken_without_predictors_for_other_categories(own_root, run):
    file, state = run
    detector, labels = start(own_root, *SMALL, "--weights", file, "--path-aggregation")
    assert differences(detector, state) == {"roi_heads.box_predictor", "backbone.path_aggregation"}
    assert labels == Labels({1: "car", 2: "platelet"}, {1: 3, 2: 90}, 3)


def test_predictors_anew_follow_from_the_seed(own_root, run):
    first, again, other = (start(own_root, *SMALL, "--weights", run[0], "--seed", s)[0].state_dict() for s in (0, 0, 1))
    odd = [key for key in first if not first[key].equal(other[key])]
    assert all(first[key].equal(again[key]) for key in first)
    assert odd
    assert all(key.startswith("roi_heads.box_predictor.") for key in odd)


def test_several_categories_of_one_name_start_the_predictors_anew(own_root, edit, run, capsys):
    edit(lambda content: content["categories"][0].update(name="car"))
    _, labels = start(own_root, *SMALL, "--weights", run[0])
    assert labels.names == {1: "car", 2: "car"}
    assert "(there are several categories 'car')" in capsys.readouterr().out


def test_a_file_that_tells_no_categories_starts_the_predictors_anew(coco_root, tmp_path, run, capsys):
    torch.save(run[1], tmp_path / "bare.pth")
    detector, labels = start(coco_root, *SMALL, "--weights", tmp_path / "bare.pth")
    assert differences(detector, run[1]) == {"roi_heads.box_predictor"}
    assert labels.num_classes == 3
    assert "(nothing tells its categories)" in capsys.readouterr().out


def test_weights_are_not_evaluated_on_categories_that_they_do_not_know(own_root, run):
    with pytest.raises(UserError, match=r"run\.pth: cannot be evaluated on .*: it knows no category 'platelet'"):
        start(own_root, *SMALL, "--weights", run[0], "--test-only")


def test_keys_of_earlier_versions_of_torchvision_are_taken(own_root, tmp_path, stock):
    state = stock["libra_fasterrcnn"]
    old = {
        key.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        if key.startswith(("backbone.fpn.", "rpn.head.conv.0.0."))
        else key: value
        for key, value in state.items()
    }
    old = {key.replace("rpn.head.conv.0.", "rpn.head.conv."): value for key, value in old.items()}
    assert {"backbone.fpn.inner_blocks.3.weight", "rpn.head.conv.bias"} <= old.keys()
    torch.save(old, tmp_path / "old.pth")
    assert differences(start(own_root, "--weights", tmp_path / "old.pth")[0], state) == {
        "backbone.bfp",
        "roi_heads.box_predictor",
    }


def test_labels_are_chosen_without_a_download(own_root, monkeypatch):
    monkeypatch.setattr(WeightsEnum, "get_state_dict", refuse)
    config = config_of("--data-path", own_root, "--weights", "DEFAULT")
    assert choose_labels(config, read_split(own_root, "train2017"), None).num_classes == 3


def test_other_tasks_are_left_out_aloud(own_root, tmp_path, capsys):
    state = random_state(maskrcnn_resnet50_fpn(weights=None, weights_backbone=None))
    torch.save({"model": state, "args": Namespace(lr=0.02), "epoch": 25}, tmp_path / "mask.pth")
    detector, _ = start(own_root, "--weights", tmp_path / "mask.pth", "--no-pyramid")
    assert differences(detector, state) == {"roi_heads.box_predictor"}
    assert capsys.readouterr().out.endswith("; leaves out: roi_heads.mask_head, roi_heads.mask_predictor\n")


def norm_eps(model):
    frozen = FrozenBatchNorm2d, FrozenStatisticsBatchNorm2d
    (eps,) = {module.eps for module in model.modules() if isinstance(module, frozen)}
    return eps


def test_the_epsilon_of_frozen_batch_norm_goes_with_the_weights(own_root, tmp_path, monkeypatch, stock):
    """Torchvision's COCO weights were trained without one; it must survive a run, and a run that starts from that."""
    state = stock["libra_fasterrcnn"]
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)
    named, labels = start(own_root, "--weights", "DEFAULT")
    assert norm_eps(named) == norm_eps(fasterrcnn_resnet50_fpn(weights="DEFAULT")) == 0
    assert norm_eps(start(own_root, "--weights", "DEFAULT", "--norm", "frozen_statistics")[0]) == 0
    for name, expected in ((COCO_FILE, 0), ("another.pth", 1e-5)):
        torch.save(state, tmp_path / name)
        assert norm_eps(start(own_root, "--weights", tmp_path / name)[0]) == expected
    config = config_of("--data-path", own_root, "--weights", tmp_path / COCO_FILE, "--output-dir", tmp_path)
    save(tmp_path / "run.pth", {"model": named}, config=config, labels=labels, position=FIRST_EPOCH)
    (tmp_path / COCO_FILE).unlink()
    assert norm_eps(load_detector(tmp_path / "run.pth")) == 0
    assert norm_eps(start(own_root, "--weights", tmp_path / "run.pth")[0]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-small", "--fpn-channels", 32], "does not fit: .*; made with --small --fpn-channels 256$"),
        (["--model", "libra_retinanet"], "does not fit: .*; made with --model libra_fasterrcnn$"),
        (["--no-pyramid"], r"'backbone\.bfp\..*' has no place in the model; made with --pyramid$"),
    ],
)
def test_a_checkpoint_of_another_detector_is_refused_with_its_flags(own_root, run, flags, message):
    with pytest.raises(UserError, match=f"^--weights {run[0]}: .*{message}"):
        start(own_root, *SMALL, "--weights", run[0], *flags)


def test_a_bare_file_of_another_detector_is_refused(own_root, tmp_path, stock):
    torch.save(stock["libra_retinanet"], tmp_path / "retina.pth")
    torch.save(get_model("resnet50", weights=None).state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(UserError, match=r"mismatch for backbone\.fpn.*; made with --model libra_retinanet$"):
        start(own_root, "--weights", tmp_path / "retina.pth")
    with pytest.raises(UserError, match=r"does not fit: .*; weights of a backbone alone go to --weights-backbone$"):
        start(own_root, "--weights", tmp_path / "backbone.pth")
    stock = {key: value for key, value in stock["libra_fasterrcnn"].items() if key != "rpn.head.bbox_pred.bias"}
    torch.save(stock, tmp_path / "lacking.pth")
    with pytest.raises(UserError, match=r"does not fit: it has no rpn\.head\.bbox_pred\.bias$"):
        start(own_root, "--weights", tmp_path / "lacking.pth")


class Code:
    def __reduce__(self):
        return os.system, ("exit 1",)


def bad_files(folder):
    """Files that hold no weights, with what is said of each."""
    contents = {
        "code.pth": (Code(), r"not a checkpoint of tensors and plain values: with a posix\.system in it"),
        "whole.pth": (nn.Linear(1, 1), r"with a torch\.nn\.modules\.linear\.Linear in it; save a state_dict\(\) alone"),
        "list.pth": ([torch.ones(1)], "holds no state dict"),
        "nothing.pth": ({}, "holds no state dict"),
        "number.pth": ({"conv1.weight": 5}, "no state dict: 'conv1.weight' is a int"),
        "index.pth": ({3: torch.ones(1)}, "no state dict: 3 is a Tensor"),
        "line.pth": ({"a\nb": torch.ones(1)}, r"does not fit: .*(no [\w.]+|'a\\nb')"),
    }
    for name, (content, message) in contents.items():
        torch.save(content, folder / name)
        yield folder / name, message
    damaged = folder / "damaged.pth"
    torch.save({"conv1.weight": torch.ones(1000)}, damaged)
    damaged.write_bytes(damaged.read_bytes()[:900])
    yield damaged, "damaged, or another kind of file"
    for name, content in (("empty.pth", b""), ("text.pth", b"weights"), ("text.safetensors", b"weights")):
        (folder / name).write_bytes(content)
        yield folder / name, "damaged, or another kind of file|needs the package safetensors"
    os.mkfifo(folder / "pipe.pth")
    yield folder / "pipe.pth", "not a file but a folder, pipe or device"
    yield folder, "not a file but a folder, pipe or device"
    yield folder / "missing.pth", r"cannot be read \(No such file or directory\); torchvision's weights .*are .*_V1"
    yield folder / "empty.pth" / "below.pth", r"cannot be read \(Not a directory\)"
    yield folder / ("long" * 99), r"cannot be read \(File name too long\)"


def test_files_that_hold_no_weights_are_refused_in_a_line(own_root, tmp_path):
    for file, message in bad_files(tmp_path):
        for flags in ([*SMALL, "--weights", file], ["--backbone", "resnet18", "--weights-backbone", file]):
            with pytest.raises(UserError, match=message) as caught:
                start(own_root, *flags)
            assert str(caught.value).startswith(f"{flags[-2]} {file}: ")
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "form",
    [
        lambda state: state,
        lambda state: OrderedDict((key, value.half()) for key, value in state.items()),
        lambda state: {key: value for key, value in state.items() if not key.startswith("classifier.")},
        lambda state: {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3},
        lambda state: {"model": state, "args": Namespace(lr=0.1), "optimizer": {}},
        lambda state: {"state_dict": {f"model._orig_mod.{key}": value for key, value in state.items()}},
        lambda state: {f"module.{key}": value for key, value in state.items()} | {"n_averaged": torch.ones(())},
    ],
    ids=["bare", "half", "headless", "features", "untracked", "DataParallel", "torchvision", "Lightning", "average"],
)
def test_a_backbone_is_taken_from_the_forms_that_people_save(own_root, tmp_path, monkeypatch, capsys, form):
    monkeypatch.setattr(WeightsEnum, "get_state_dict", refuse)
    state = {key: value.half().float() for key, value in random_state(get_model(BACKBONE, weights=None)).items()}
    torch.save(form(state), tmp_path / "backbone.pth")
    detector, _ = start(own_root, "--backbone", BACKBONE, "--weights-backbone", tmp_path / "backbone.pth")
    body = detector.backbone.body.state_dict()
    assert all(value.equal(state[f"features.{key}"]) for key, value in body.items())
    assert capsys.readouterr().out == f"--weights-backbone {tmp_path / 'backbone.pth'}: takes backbone.body\n"


def test_safetensors_are_taken(own_root, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = random_state(get_model(BACKBONE, weights=None))
    safetensors.save_file(state, tmp_path / "backbone.safetensors")
    detector, _ = start(own_root, "--backbone", BACKBONE, "--weights-backbone", tmp_path / "backbone.safetensors")
    assert all(v.equal(state[f"features.{k}"]) for k, v in detector.backbone.body.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", BACKBONE])
def test_a_file_starts_a_backbone_as_the_name_of_the_same_weights(own_root, tmp_path, monkeypatch, name):
    """And as the library's builder, and so torchvision's: frozen batch norm, as many stages trained."""
    state = random_state(get_model(name, weights=None))
    torch.save(state, tmp_path / "backbone.pth")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: state)
    flags = ["--backbone", name, "--weights-backbone"]
    of_file, of_name = (start(own_root, *flags, weights)[0] for weights in (tmp_path / "backbone.pth", "IMAGENET1K_V1"))
    with torch.random.fork_rng():
        built = libra_fasterrcnn(backbone_name=name, num_classes=3)
    assert str(of_file) == str(of_name)
    assert str(of_file.backbone) == str(built.backbone)
    assert all(value.equal(of_name.state_dict()[key]) for key, value in of_file.state_dict().items())
    body = built.backbone.body.state_dict()
    assert all(value.equal(body[key]) for key, value in of_file.backbone.body.state_dict().items())
    trained = [[k for k, p in each.named_parameters() if p.requires_grad] for each in (of_file, of_name, built)]
    assert trained[0] == trained[1] == trained[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "resnet34",
            r"'layer1\.2\.conv1\.weight' has no place in the model; it must be a resnet18, ",
        ),
        ("resnet50", r"size mismatch for layer1\.0\.conv1\.weight: .*; it must be a resnet18"),
        (BACKBONE, r"it has no conv1\.weight; it must be a resnet18"),
        ("detector", "does not fit: .*; weights of a detector go to --weights$"),
    ],
)
def test_a_backbone_of_another_kind_is_refused(own_root, tmp_path, content, message, run):
    file = run[0] if content == "detector" else tmp_path / "backbone.pth"
    if content != "detector":
        torch.save(get_model(content, weights=None).state_dict(), file)
    with pytest.raises(UserError, match=f"^--weights-backbone {file}: .*{message}"):
        start(own_root, "--backbone", "resnet18", "--weights-backbone", file)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--small", "--weights-backbone", "x.pth"], r"--weights-backbone x\.pth: a --small detector .*leave one"),
        (["--weights", "x.pth", "--weights-backbone", "y.pth"], r"--weights-backbone y\.pth: .*--weights .*leave one"),
        (["--weights", "DEFAULT", "--backbone", "mobilenet_v2"], "--weights DEFAULT: .*resnet50 alone"),
    ],
)
def test_weights_that_exclude_each_other_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        config_of("--data-path", "-", *flags)


def refuse(*_, **__):
    raise AssertionError("a download")
