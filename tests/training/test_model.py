from operator import attrgetter

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d

from balanced_learning.detection.normalization import FrozenStatisticsBatchNorm2d
from balanced_learning.training.data.coco import read_split
from balanced_learning.training.data.dataset import DetectionDataset
from balanced_learning.training.model import build_model
from tests.training.small import config_of


@pytest.mark.parametrize("size", [(40, 33), (128, 96)])
def test_strides_do_not_depend_on_the_first_images(size):
    """Torchvision's pooler would take 1/2 for 1/4 from an image of 33 pixels that is padded to 64."""
    detector = build_model(config_of("--data-path", "-", "--small", "--min-size", 33, "--max-size", 200), 3).eval()
    detector([torch.rand(3, *size)])
    assert detector.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16]


@pytest.mark.parametrize("model", ["libra_fasterrcnn", "libra_retinanet"])
def test_a_small_detector_learns_from_one_icon(model):
    """Batch norm refuses a single value a channel: a batch of one image whose coarsest map is one pixel."""
    flags = ["--model", model, "--small", "--min-size", 16, "--max-size", 16]
    detector = build_model(config_of("--data-path", "-", *flags), 3).train()
    targets = [{"boxes": torch.tensor([[2.0, 2, 12, 12]]), "labels": torch.tensor([1])}]
    assert sum(detector([torch.rand(3, 16, 16)], targets).values()).isfinite()


@pytest.mark.parametrize("flags", [["--model", "libra_rpn"], ["--rpn"]])
@pytest.mark.parametrize("more", [[], ["--beta", 1], ["--box-loss-weight", 2]])
def test_the_rpn_keeps_smooth_l1_without_balanced_l1_whatever_the_loss_of_the_second_stage(flags, more):
    config = config_of("--data-path", "-", "--small", "--no-box-loss", *flags, *more)
    loss = build_model(config, 3).rpn.box_loss
    assert isinstance(loss, torch.nn.SmoothL1Loss)
    assert loss.beta == 1 / 9


@pytest.mark.parametrize(
    ("flags", "part", "expected"),
    [
        ([], "roi_heads.box_loss.beta", 1.0),
        (["--beta", 0.5], "roi_heads.box_loss.beta", 0.5),
        (["--model", "libra_retinanet"], "head.regression_head.box_loss.beta", 0.11),
        (["--no-box-loss", "--box-loss-weight", 2], "roi_heads.box_loss.loss.beta", 1 / 9),
        (
            ["--model", "libra_retinanet", "--no-box-loss", "--box-loss-weight", 2],
            "head.regression_head.box_loss.loss.beta",
            0.0,
        ),
        (["--rpn", "--alpha", 0.2], "rpn.box_loss.alpha", 0.2),
        (["--rpn", "--gamma", 1.0], "rpn.box_loss.gamma", 1.0),
        (["--rpn", "--num-bins", 5], "rpn.fg_bg_sampler.num_bins", 5),
        (["--rpn", "--no-instance-balanced"], "rpn.fg_bg_sampler.instance_balanced", False),
        (["--no-instance-balanced"], "roi_heads.fg_bg_sampler.instance_balanced", False),
        (["--rpn-pre-nms-top-n-train", 7], "rpn._pre_nms_top_n", {"training": 7, "testing": 200}),
        (["--rpn-pre-nms-top-n-test", 7], "rpn._pre_nms_top_n", {"training": 200, "testing": 7}),
        (["--rpn-post-nms-top-n-train", 7], "rpn._post_nms_top_n", {"training": 7, "testing": 200}),
        (["--rpn-post-nms-top-n-test", 7], "rpn._post_nms_top_n", {"training": 100, "testing": 7}),
        (["--rpn-score-thresh", 0.25], "rpn.score_thresh", 0.25),
        (["--detections-per-image", 7], "roi_heads.detections_per_img", 7),
        (["--detections-per-image", 7, "--model", "libra_retinanet"], "detections_per_img", 7),
    ],
)
def test_a_setting_reaches_its_part_of_the_detector(flags, part, expected):
    detector = build_model(config_of("--data-path", "-", "--small", *flags), 3)
    assert attrgetter(part)(detector) == expected


@pytest.mark.parametrize(
    ("norm", "cls"),
    [
        ("batch", torch.nn.BatchNorm2d),
        ("frozen", FrozenBatchNorm2d),
        ("frozen_statistics", FrozenStatisticsBatchNorm2d),
    ],
)
def test_the_backbone_has_the_batch_norm_that_is_asked_for(norm, cls):
    with torch.device("meta"):
        detector = build_model(config_of("--data-path", "-", "--backbone", "resnet18", "--norm", norm), 3)
    assert type(detector.backbone.body.bn1) is cls


@pytest.mark.slow
@pytest.mark.parametrize("model", ["libra_fasterrcnn", "libra_retinanet"])
def test_four_real_images_are_learned_by_heart(real_data, model):
    split = read_split(real_data("bccd"), "train2017", limit=4)
    images, targets = zip(*DetectionDataset(split, {1: 1, 2: 2, 3: 3}), strict=True)
    config = config_of("--data-path", "-", "--model", model, "--small", "--min-size", 160, "--max-size", 240)
    detector = build_model(config, 4).train()
    optimizer = torch.optim.AdamW(detector.parameters(), 0.001)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [200])
    history = []
    for _ in range(240):
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        history.append(loss.item())
    assert sum(history[-10:]) / 10 < history[0] / 10
