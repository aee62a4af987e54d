"""The whole script: run in this process where that is enough, for starting up costs more than training so little."""

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum, get_model
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

from balanced_learning.training import load_detector, step
from balanced_learning.training.data import batching, splits
from balanced_learning.training.data.shapes import shapes_dataset
from balanced_learning.training.optimization import update
from examples import train_torchvision_libra
from tests.training.coco_data import add_images
from tests.training.small import SMALL, fingerprint, scripted
from tests.training.toy import rows


@pytest.fixture
def train(capsys):
    """Runs the script with these options and returns what it prints."""

    def run(*options):
        train_torchvision_libra.main([str(option) for option in options])
        return capsys.readouterr().out

    return run


@pytest.fixture
def error(train):
    """Runs the script, which must end with an error, and returns its one line."""

    def run(*options):
        with pytest.raises(SystemExit) as caught:
            train(*options)
        message = str(caught.value)
        assert message.startswith("error: ")
        assert "\n" not in message
        return message

    return run


def metrics(file):
    """The metrics of an evaluation's JSON, without errors and classes."""
    return {name: value for name, value in json.loads(file.read_text()).items() if name not in ("errors", "classes")}


def test_without_data_it_draws_trains_evaluates_and_reports(tmp_path, monkeypatch, train):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(splits, "shapes_dataset", partial(shapes_dataset, train=8, val=2))
    out = tmp_path / "out"
    said = train("--epochs", 2, "--output-dir", out)
    assert "AP50" in said
    done, *commands = said[said.index("done: ") :].splitlines()
    assert f"look at {out / 'curves.png'} and evaluation_0" in done
    assert 2 <= len(commands) <= 5
    assert f"{out / 'checkpoint_best.pth'} {tmp_path / 'cache/balanced-learning/shapes-8-2-0/val2017'}" in commands[0]
    assert {file.name for file in out.iterdir()} == {
        "args.json",
        "checkpoint.pth",
        "checkpoint_best.pth",
        "checkpoint_previous.pth",
        ".lock",
        "metrics.jsonl",
        "evaluation_00.json",
        "evaluation_00.png",
        "evaluation_01.json",
        "evaluation_01.png",
        "curves.png",
    }
    first, _ = rows(out)
    losses = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert losses | {"epoch", "loss", "lr", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"} <= set(first)
    assert first["loss"] == pytest.approx(sum(first[name] for name in losses), rel=1e-5)
    args = json.loads((out / "args.json").read_text())
    assert args["versions"]["torch"] == torch.__version__
    assert (args["seed"], args["epochs"]) == (0, 2)


@pytest.mark.parametrize("model", ["libra_fasterrcnn", "libra_retinanet"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, coco_root, train, model):
    options = ["--data-path", coco_root, *SMALL, "--model", model, "--lr", 0.01, "--lr-steps", 1, "--warmup-iters", 0]
    train(*options, "--epochs", 2, "--output-dir", tmp_path / "whole")
    train(*options, "--output-dir", tmp_path / "parts")
    train(*options, "--epochs", 2, "--resume", tmp_path / "parts" / "checkpoint.pth")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert [row["lr"] for row in rows(tmp_path / "whole")] == pytest.approx([0.01, 0.001])


@pytest.fixture
def _fingerprint(monkeypatch):
    monkeypatch.setattr(train_torchvision_libra, "evaluate_detections", fingerprint)


@pytest.mark.usefixtures("_fingerprint")
def test_test_only_repeats_the_evaluation(tmp_path, coco_root, train):
    options = ["--data-path", coco_root, *SMALL, "--output-dir", tmp_path]
    train(*options)
    before = [(tmp_path / name).read_bytes() for name in ("checkpoint.pth", "args.json")]
    train(*options, "--test-only", "--resume", tmp_path / "checkpoint.pth")
    tested = metrics(tmp_path / "evaluation_test.json")
    assert tested.items() <= rows(tmp_path)[0].items()
    assert before == [(tmp_path / name).read_bytes() for name in ("checkpoint.pth", "args.json")]
    assert (tmp_path / "evaluation_test.png").exists()


def test_the_other_backend_evaluates_too(tmp_path, coco_root, train):
    options = ["--data-path", coco_root, *SMALL, "--output-dir", tmp_path]
    train(*options)
    train("--resume", tmp_path / "checkpoint.pth", "--test-only", "--coco-backend", "pycocotools")
    assert metrics(tmp_path / "evaluation_test.json").items() <= rows(tmp_path)[0].items()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(tmp_path, coco_root, train, amp):
    train("--data-path", coco_root, *SMALL, "--amp", amp, "--output-dir", tmp_path)
    assert math.isfinite(rows(tmp_path)[0]["loss"])


def test_the_learning_rate_scales_with_the_batch_and_says_so(tmp_path, coco_root, train):
    options = ["--data-path", coco_root, *SMALL]
    scaled = train(*options, "--output-dir", tmp_path / "scaled")
    assert "learning rate 0.0025: 0.02 for 16 images an iteration, scaled linearly to 2" in scaled
    assert "learning rate 0.03, as given" in train(*options, "--lr", 0.03, "--output-dir", tmp_path / "given")


def test_the_number_of_loader_processes_changes_nothing(tmp_path, coco_root, train):
    add_images(coco_root, "train", 4)
    for workers in (0, 1, 3):
        options = ["--data-path", coco_root, *SMALL, "-j", workers, "--epochs", 2, "--data-augmentation", "ssd"]
        train(*options, "--output-dir", tmp_path / str(workers))
    assert rows(tmp_path / "0") == rows(tmp_path / "1") == rows(tmp_path / "3")


def test_a_bare_resume_goes_on_as_the_run_began(tmp_path, coco_root, train):
    flags = ["--no-sampler", "--lr", 0.003, "--data-augmentation", "ssdlite", "--seed", 5, "--clip-grad-norm", 1]
    options = ["--data-path", coco_root, *SMALL, *flags]
    train(*options, "--epochs", 2, "--output-dir", tmp_path / "whole")
    train(*options, "--output-dir", tmp_path / "parts")
    train("--resume", tmp_path / "parts" / "checkpoint.pth", "--epochs", 2)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    weights = [torch.load(tmp_path / name / "checkpoint.pth")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.usefixtures("_fingerprint")
def test_test_only_reads_the_sizes_of_the_checkpoint(tmp_path, coco_root, train, error):
    train("--data-path", coco_root, *SMALL, "--output-dir", tmp_path / "run")
    file = tmp_path / "run" / "checkpoint.pth"
    train("--test-only", "--resume", file, "--output-dir", tmp_path / "test")
    tested = metrics(tmp_path / "test" / "evaluation_test.json")
    assert tested.items() <= rows(tmp_path / "run")[0].items()
    message = error("--test-only", "--resume", file, "--min-size", 800)
    assert message.startswith(f"error: --min-size 800: {file} was made with --min-size 64")
    train("--test-only", "--resume", file, "--lr", 0.5, "--seed", 7)  # of no meaning here


def test_the_best_checkpoint_is_kept(tmp_path, coco_root, train, monkeypatch):
    monkeypatch.setattr(train_torchvision_libra, "evaluate_detections", scripted(0.2, 0.5, 0.5, 0.3))
    train("--data-path", coco_root, *SMALL, "--epochs", 3, "--output-dir", tmp_path)
    train("--resume", tmp_path / "checkpoint.pth", "--epochs", 4)
    epochs = [torch.load(tmp_path / name)["epoch"] for name in ("checkpoint.pth", "checkpoint_best.pth")]
    assert epochs == [4, 2]  # those that are done


TWO_PROCESSES = """
import sys
from examples import train_torchvision_libra
from tests.training.coco_data import add_images
from tests.training.small import fingerprint
train_torchvision_libra.evaluate_detections = fingerprint
train_torchvision_libra.main(sys.argv[1:])
"""


@pytest.mark.usefixtures("_fingerprint")
def test_two_processes_evaluate_an_odd_number_of_images_once_each(tmp_path, coco_root, train):
    add_images(coco_root, "train", 1)
    add_images(coco_root, "val", 2)
    (tmp_path / "program.py").write_text(TWO_PROCESSES)
    options = ["--data-path", coco_root, *SMALL, "-b", 1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command = [*launch, tmp_path / "program.py", *options, "--output-dir", tmp_path / "two"]
    paths = [*(path for path in sys.path if "site-packages" in path), str(Path(__file__).parents[2])]
    result = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("dAP50") == 1
    saved = tmp_path / "two" / "checkpoint.pth"
    train("--test-only", "--resume", saved, "--output-dir", tmp_path / "one")
    alone = metrics(tmp_path / "one" / "evaluation_test.json")
    together = {name: rows(tmp_path / "two")[0][name] for name in alone}
    assert together == pytest.approx(alone, rel=1e-4)


class Recorder(nn.Module):
    """In place of a detector: records the images of each step, and what the model draws."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.steps = []

    def forward(self, images, targets=None):
        if not self.training:
            return [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)} for _ in images]
        self.steps.append((tuple(image.double().sum().item() for image in images), torch.rand(()).item()))
        return {"loss_of_nothing": 0 * self.weight}


def test_seeds_epochs_and_processes_share_no_draw(tmp_path, coco_root, train, monkeypatch):
    add_images(coco_root, "train", 8)
    options = ["--data-path", coco_root, *SMALL, "-b", 1, "--epochs", 3, "--data-augmentation", "ssd"]
    monkeypatch.setattr(train_torchvision_libra, "save_evaluation", lambda *_: None)
    images, draws = [], []
    for rank in (0, 1):
        process = SimpleNamespace(rank=lambda rank=rank: rank, world_size=lambda: 2)
        monkeypatch.setattr(batching, "distributed", process)
        alone = SimpleNamespace(rank=process.rank, world_size=lambda: 1, parallel=lambda module: module)
        monkeypatch.setattr(step, "distributed", alone)
        for seed in (0, 1):
            recorder = Recorder()
            monkeypatch.setattr(train_torchvision_libra, "make_model", lambda *_, recorder=recorder: recorder)
            train(*options, "--seed", seed, "--output-dir", tmp_path / f"{seed}-{rank}")
            images += [step[0] for step in recorder.steps]
            draws += [step[1] for step in recorder.steps]
    assert len(draws) == len(set(draws)) == 2 * 2 * 3 * 5
    assert len(images) == len(set(images))


def test_images_without_boxes_are_trained_on_if_kept(tmp_path, coco_root, edit, train, error):
    edit(lambda content: content.update(annotations=[]))
    options = ["--data-path", coco_root, *SMALL, "--output-dir", tmp_path]
    assert "no image has a box" in error(*options)
    train(*options, "--keep-empty")
    assert rows(tmp_path)[0]["loss_box_reg"] == 0


def test_images_that_are_left_out_are_counted(coco_root, edit, train):
    edit(lambda content: content["annotations"].pop())
    said = train("--data-path", coco_root, *SMALL, "--check-data")
    assert "1 images without a box to learn are left out; --keep-empty takes them" in said
    assert "1 images to train on, 1 to evaluate" in said
    said = train("--data-path", coco_root, *SMALL, "--check-data", "--keep-empty")
    assert "left out;" not in said
    assert "2 images to train on" in said


def test_with_all_parts_off_the_model_is_torchvisions(tmp_path, coco_root, train):
    off = ["--no-sampler", "--no-pyramid", "--no-box-loss"]
    train("--data-path", coco_root, *SMALL, *off, "--output-dir", tmp_path)
    assert not any("bfp" in name for name in torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"])


@pytest.mark.parametrize("model", ["libra_fasterrcnn", "libra_retinanet"])
@pytest.mark.parametrize("pyramid", ["--pyramid", "--no-pyramid"])
def test_path_aggregation_trains_with_and_without_the_pyramid(tmp_path, coco_root, train, model, pyramid):
    train("--data-path", coco_root, *SMALL, "--model", model, "--path-aggregation", pyramid, "--output-dir", tmp_path)
    assert math.isfinite(rows(tmp_path)[0]["loss"])
    weights = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    assert any("path_aggregation" in name for name in weights)
    assert any("bfp" in name for name in weights) == (pyramid == "--pyramid")


def test_a_download_that_cannot_be_had_names_its_flag(tmp_path, coco_root, error, monkeypatch):
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    options = ["--data-path", coco_root, "--device", "cpu", "--output-dir", tmp_path]
    message = error(*options, "--backbone", "resnet18")
    assert "--weights-backbone IMAGENET1K_V1: the weights could not be downloaded" in message
    assert "--weights-backbone FILE takes a local file" in message
    assert "--weights-backbone none" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data-path", "/nowhere"], "/nowhere: no such folder"),
        (["--output-dir", "/dev/null/out"], "--output-dir /dev/null/out: cannot be written"),
        (["--resume", "missing.pth"], "--resume missing.pth: no such file"),
        (["--device", "abacus"], "--device abacus"),
        (["--weights", "DEFAULT"], "--weights DEFAULT: .*--no-small"),
        (["--backbone", "resnet101"], "--backbone resnet101: .*--no-small"),
        (["--weights", "DEFAULT", "--no-small", "--backbone", "resnet18"], "--weights DEFAULT: .*resnet50 alone"),
    ],
)
def test_wrong_options_are_named(tmp_path, coco_root, error, options, message):
    assert re.search(message, error("--data-path", coco_root, "--output-dir", tmp_path, *SMALL, *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--backbone", "vgg16", "--weights-backbone", "none"],
            "--backbone vgg16: .*must be one of .*mobilenet_v2, .*resnet50",
        ),
        (
            ["--weights-backbone", "IMAGENET22K"],
            "--weights-backbone IMAGENET22K: cannot be read .*resnet50 are IMAGENET1K_V1, ",
        ),
    ],
)
def test_a_model_that_torchvision_does_not_have_is_named(tmp_path, coco_root, error, options, message):
    assert re.search(message, error("--data-path", coco_root, "--device", "cpu", "--output-dir", tmp_path, *options))


@pytest.mark.parametrize(
    "flags",
    [
        ["--small"],
        ["--small", "--model", "libra_retinanet"],
        ["--model", "libra_retinanet", "--backbone", "mobilenet_v3_small", "--weights-backbone", "mobilenet.pth"],
    ],
    ids=["detector", "retinanet", "backbone"],
)
def test_a_fine_tuned_run_does_without_the_file(tmp_path, coco_root, edit, train, monkeypatch, flags):
    """Its checkpoint goes on, is evaluated and loaded though the file is gone and nothing can be downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: pytest.fail("a download"))
    options = ["--data-path", coco_root, *SMALL[1:], *flags]
    if "--small" in flags:
        file = tmp_path / "before" / "checkpoint.pth"
        train(*options, "--output-dir", file.parent)
        for part in ("train", "val"):
            edit(lambda content: content["categories"][1].update(name="cart"), part)
        options += ["--weights", file]
        starts_anew = "it knows no category 'cart'"
    else:
        file = tmp_path / "mobilenet.pth"
        torch.save(get_model("mobilenet_v3_small", weights=None).state_dict(), file)
        starts_anew = "takes backbone.body"
    assert starts_anew in train(*options, "--epochs", 2, "--output-dir", tmp_path / "whole")
    train(*options, "--output-dir", tmp_path / "parts")
    file.unlink()
    train(*options, "--epochs", 2, "--resume", tmp_path / "parts" / "checkpoint.pth")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    detectors = [load_detector(tmp_path / name / "checkpoint.pth") for name in ("parts", "whole")]
    weights = [detector.state_dict() for detector in detectors]
    assert str(detectors[0]) == str(detectors[1])
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("model", ["libra_fasterrcnn", "libra_retinanet"])
def test_torchvisions_weights_are_fine_tuned_to_other_categories(tmp_path, coco_root, edit, train, monkeypatch, model):
    for part in ("train", "val"):
        edit(lambda content: content.update(categories=[{"id": 90, "name": "thing"}]), part)
    stock = {"libra_fasterrcnn": fasterrcnn_resnet50_fpn, "libra_retinanet": retinanet_resnet50_fpn}[model]
    weights = stock(weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: weights)
    options = ["--data-path", coco_root, *SMALL[1:], "--model", model, "--weights", "DEFAULT"]
    assert "(it knows no category 'thing')" in train(*options, "--output-dir", tmp_path)
    assert math.isfinite(rows(tmp_path)[0]["loss"])
    assert load_detector(tmp_path / "checkpoint.pth").categories == {1: "thing"}


def test_batch_norm_that_meets_one_pixel_is_named(tmp_path, coco_root, error):
    options = ["--backbone", "resnet18", "--weights-backbone", "none", "--min-size", 24, "--max-size", 32, "-b", 1]
    message = error("--data-path", coco_root, *options, "-j", 0, "--device", "cpu", "--output-dir", tmp_path)
    assert "batch norm cannot train on 1 image so small" in message
    assert "--min-size" in message


def test_a_checkpoint_is_never_lost(tmp_path, coco_root, train, error, monkeypatch):
    options = ["--data-path", coco_root, *SMALL, "--output-dir", tmp_path]
    train(*options)
    file = tmp_path / "checkpoint.pth"
    saved = file.read_bytes()
    assert f"--resume {file}" in error(*options)
    for flags, before in (
        (["--model", "libra_retinanet"], "--model libra_fasterrcnn"),
        (["--no-pyramid"], "--pyramid"),
        (["--path-aggregation"], "--no-path-aggregation"),
        (["--lr", 0.5], "--lr 0.0025"),
        (["--min-size", 128], "--min-size 64"),
        (["--norm-weight-decay", 0.1], "no --norm-weight-decay"),
    ):
        said = " ".join(map(str, flags))
        assert f"error: {said}: {file} was made with {before}" in error(*options, "--resume", file, *flags)

    def explode(model, *_):
        next(model.parameters()).data.fill_(math.inf)

    monkeypatch.setattr(step, "update", lambda *given: (update(*given), explode(*given))[0])
    said = error(*options, "--resume", file, "--epochs", 2)
    assert "training diverged: in epoch 1 after 1 of 1 steps, weights are not finite" in said
    assert file.read_bytes() == saved


def test_categories_of_both_halves_must_agree(tmp_path, coco_root, edit, error):
    edit(lambda content: content["categories"][1].update(name="cart"))
    assert "other categories" in error("--data-path", coco_root, *SMALL, "--output-dir", tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, coco_root, error, workers):
    file = coco_root / "train2017" / "11.png"
    content = file.read_bytes()
    file.write_bytes(content[:60] + content[-12:])  # header and end are whole, so the check before training passes
    message = error("--data-path", coco_root, *SMALL, "--strict-data", "-j", workers, "--output-dir", tmp_path)
    assert f"{file} is unreadable" in message


@pytest.mark.slow
@pytest.mark.parametrize("model", ["libra_fasterrcnn", "libra_retinanet"])
def test_real_coco_images_at_full_size(tmp_path, real_data, train, model):
    """Images with crowds at 800 x 1333 pixels, through training, evaluation and a resume."""
    options = ["--data-path", real_data("coco_tiny"), "--model", model, "--backbone", "resnet18", "--limit", 2]
    options += ["--weights-backbone", "none", "-j", 0, "--device", "cpu", "--output-dir", tmp_path]
    options += ["--rpn"] if model == "libra_fasterrcnn" else []
    assert "AP50" in train(*options, "--epochs", 1)
    train(*options, "--epochs", 2, "--resume", tmp_path / "checkpoint.pth")
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1]
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path))


def test_a_run_that_goes_on_in_another_folder_keeps_its_history(tmp_path, coco_root, train, monkeypatch):
    monkeypatch.setattr(train_torchvision_libra, "evaluate_detections", scripted(0.5, 0.2, 0.3, 0.4, 0.6))
    train("--data-path", coco_root, *SMALL, "--epochs", 2, "--output-dir", tmp_path / "first")
    train("--resume", tmp_path / "first" / "checkpoint_best.pth", "--output-dir", tmp_path / "other", "--epochs", 3)
    assert [row["AP"] for row in rows(tmp_path / "other")] == [0.5, 0.3, 0.4]
    assert not (tmp_path / "other" / "checkpoint_best.pth").exists()
    train("--resume", tmp_path / "other" / "checkpoint.pth", "--epochs", 4)
    assert torch.load(tmp_path / "other" / "checkpoint_best.pth")["epoch"] == 4
