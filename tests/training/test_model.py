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
        (["--box-batch-size-per-image", 32], "roi_heads.fg_bg_sampler.batch_size_per_image", 32),
        (["--box-batch-size-per-image", 32, "--no-sampler"], "roi_heads.fg_bg_sampler.batch_size_per_image", 32),
        ([], "roi_heads.fg_bg_sampler.batch_size_per_image", 64),
    ],
)
def test_a_setting_reaches_its_part_of_the_detector(flags, part, expected):
    detector = build_model(config_of("--data-path", "-", "--small", *flags), 3)
    assert attrgetter(part)(detector) == expected


@pytest.mark.parametrize(
    ("flags", "part", "expected"),
    [
        ([], "rpn.anchor_generator.sizes", tuple((size,) for size in (32, 64, 128, 256, 512))),
        (["--anchor-size", 8], "rpn.anchor_generator.sizes", [(8,), (16,), (32,), (64,), (128,)]),
        (["--model", "libra_retinanet", "--anchor-size", 10], "anchor_generator.sizes.2", (40, 50, 63)),
        (["--model", "libra_retinanet"], "anchor_generator.sizes.2", (128, 161, 203)),
        (["--anchor-size", 8], "roi_heads.box_roi_pool.canonical_scale", 56),
        (["--anchor-size", 8], "roi_heads.box_roi_pool.output_size", (7, 7)),
        ([], "roi_heads.box_roi_pool.canonical_scale", 224),
        ([], "roi_heads.fg_bg_sampler.batch_size_per_image", 512),
        (["--fpn-channels", 48], "backbone.bfp.in_channels", 48),
        (["--fpn-channels", 48], "roi_heads.box_head.fc6.in_features", 48 * 7 * 7),
        (["--model", "libra_retinanet", "--fpn-channels", 48], "backbone.fpn.extra_blocks.p7.out_channels", 48),
        (["--backbone", "mobilenet_v2", "--fpn-channels", 48], "backbone.out_channels", 48),
    ],
)
def test_a_setting_reaches_its_part_of_a_detector_of_torchvision(flags, part, expected):
    with torch.device("meta"):
        found = build_model(config_of("--data-path", "-", "--backbone", "resnet18", *flags), 3)
    for name in part.split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    assert found == expected


@pytest.mark.parametrize("side", [8, 13, 20, 31])
def test_small_anchors_are_for_small_boxes(side):
    """A box of half the size has the anchors, and is pooled from the level, that the whole one has by default."""
    boxes = [torch.tensor([[0.0, 0, side, side]])]
    levels, shapes = [], []
    for flags, factor in (([], 4), (["--anchor-size", 8], 1)):
        detector = build_model(config_of("--data-path", "-", "--backbone", "resnet18", *flags), 3)
        levels.append(detector.roi_heads.box_roi_pool.map_levels([boxes[0] * factor]))
        shapes.append(torch.cat([cell / factor for cell in detector.rpn.anchor_generator.cell_anchors]))
    assert torch.equal(*levels)
    assert torch.allclose(*shapes, atol=0.5)  # torchvision rounds them to pixels


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
