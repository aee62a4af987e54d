"""The recipes of the paper's tables: what they build and how they train, written out from the paper and mmdetection."""

from importlib import resources

import pytest
import torch
from torch import nn

from balanced_learning.training.command_line import read_command_line
from balanced_learning.training.flags import make_parser
from balanced_learning.training.model import build_model

# All of these settings are of 5.2 of the paper's baseline, Faster R-CNN R-50 1x, unless a recipe changes them.
FASTER = {
    "backbone": ("Bottleneck", [3, 4, 6, 3], 1, 64),
    "norm": "FrozenStatisticsBatchNorm2d",
    "trained": ["layer2", "layer3", "layer4"],
    "channels": 256,
    "path": False,
    "pyramid": None,
    "levels": 5,
    "strides": [4, 8, 16, 32, 64],
    "sizes": [(32,), (64,), (128,), (256,), (512,)],
    "ratios": (0.5, 1.0, 2.0),
    "corners": "centered",
    "rpn thresholds": (0.7, 0.3, True),
    "rpn sampler": (256, 0.5, "random", None),
    "rpn border": 0,
    "rpn loss": ("SmoothL1Loss", pytest.approx(1 / 9), None, None),
    "rpn coder": (1.0, 1.0, 1.0, 1.0),
    "rpn before NMS": (2000, 1000),
    "rpn NMS": 0.7,
    "rpn after NMS": (2000, 1000),
    "thresholds": (0.5, 0.5, False),
    "sampler": (512, 0.25, "random", None),
    "pool": ((7, 7), 2, False),
    "head": (1024, 91, 364),
    "coder": (10.0, 10.0, 5.0, 5.0),
    "loss": ("SmoothL1Loss", 1.0, None, None, 1.0),
    "test": (0.05, 0.5, 100),
    "size": ((800,), 1333),
    "mean, std": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "init": ("mmdet", "xavier"),
    "schedule": (12, (8, 11), 0.1, "multisteplr"),
    "warm-up": (500, pytest.approx(1 / 3)),
    "optimizer": ("sgd", 0.02, 0.9, 1e-4, None, 35.0),
    "data": ("hflip", 0, None),
}
LIBRA_SAMPLER = (512, 0.25, (3, 0.5, True), None)
NON_LOCAL = ("NonLocal", 2)
LIBRA_LOSS = ("BalancedL1Loss", 1.0, 0.5, 1.5, 1.0)
LIBRA = {
    "rpn border": None,
    "rpn sampler": (256, 0.5, (1, 0.5, False), 5),
    "sampler": LIBRA_SAMPLER,
    "pyramid": NON_LOCAL,
    "loss": LIBRA_LOSS,
}
R101 = {"backbone": ("Bottleneck", [3, 4, 23, 3], 1, 64)}
X101 = {"backbone": ("Bottleneck", [3, 4, 23, 3], 64, 4)}
TWICE = {"schedule": (24, (16, 22), 0.1, "multisteplr")}

THIRDS = [tuple(4 * stride * 2 ** (third / 3) for third in range(3)) for stride in (8, 16, 32, 64, 128)]
RETINANET = {
    **{name: FASTER[name] for name in ("backbone", "norm", "trained", "channels", "path", "pyramid", "levels")},
    **{
        name: FASTER[name] for name in ("ratios", "corners", "size", "mean, std", "init", "schedule", "warm-up", "data")
    },
    "strides": [8, 16, 32, 64, 128],
    "sizes": [pytest.approx(level) for level in THIRDS],
    "P6 and P7": (2048, False),
    "thresholds": (0.5, 0.4, True),
    "head": (9 * 91, 36),
    "normalizer": "BatchNormalizedRetinaNetHead",
    "loss": ("SmoothL1Loss", 0.11, None, None, 1.0),
    "test": (0.05, 0.5, 100),
    "optimizer": ("sgd", 0.01, 0.9, 1e-4, None, 35.0),
}
LIBRA_RETINANET = {"pyramid": ("NonLocal", 1), "loss": ("BalancedL1Loss", 0.11, 0.5, 1.5, 1.0)}

OF_SECOND_STAGE = ("thresholds", "sampler", "pool", "head", "coder", "loss", "test")
OF_RPN = [name for name in FASTER if name.startswith("rpn") or name in ("strides", "sizes", "ratios", "corners")]
RPN = {name: value for name, value in FASTER.items() if name not in OF_SECOND_STAGE} | {
    "rpn before NMS": (2000, 2000),
    "rpn after NMS": (2000, 2000),
}
LIBRA_RPN = {
    "pyramid": NON_LOCAL,
    "rpn border": None,
    "rpn sampler": (256, 0.5, (3, 0.3, True), 5),
    "rpn loss": ("BalancedL1Loss", pytest.approx(1 / 9), 0.5, 1.5),
}
FAST = {name: value for name, value in FASTER.items() if name not in OF_RPN} | {"data": ("hflip", 0, 1000)}

MODERN = {
    "corners": "exact",
    "warm-up": (500, 0.001),
}
MODERN_RPN = {"rpn border": None, "rpn loss": ("SmoothL1Loss", 0.0, None, None)}
MODERN_SECOND = {"pool": ((7, 7), 0, True), "loss": ("SmoothL1Loss", 0.0, None, None, 1.0)}
MODERN_FASTER = FASTER | MODERN | MODERN_RPN | MODERN_SECOND | {"rpn after NMS": (1000, 1000)}
MODERN_LIBRA = MODERN_FASTER | {name: LIBRA[name] for name in ("rpn sampler", "sampler", "pyramid", "loss")}
MODERN_FAST = {name: value for name, value in MODERN_FASTER.items() if name not in OF_RPN} | {
    "data": ("hflip", 0, 2000)
}


def l1(weight):
    return {"loss": ("SmoothL1Loss", 0.0, None, None, weight)}


def smooth_l1(weight):
    return {"loss": ("SmoothL1Loss", 1.0, None, None, weight)}


def balanced(alpha, gamma):
    return {"loss": ("BalancedL1Loss", 1.0, alpha, gamma, 1.0)}


TABLE_4 = {
    "pos_balance": {"sampler": (512, 0.25, (1, 0.5, True), None)},
    **{f"k{k}": {"sampler": (512, 0.25, (k, 0.5, False), None)} for k in (2, 3, 5)},
}
TABLE_5 = {
    "integration": {"pyramid": ("Identity", 2)},
    "refinement": {"pyramid": NON_LOCAL},
    "pafpn": {"path": True},
    "balanced_pafpn": {"path": True, "pyramid": NON_LOCAL},
}
TABLE_6 = {
    "smooth_l1_w1.5": smooth_l1(1.5),
    "smooth_l1_w2": smooth_l1(2.0),
    "l1_w1": l1(1.0),
    "l1_w1.5": l1(1.5),
    "l1_w2": l1(2.0),
    "a0.2_g1": balanced(0.2, 1.0),
    "a0.3_g1": balanced(0.3, 1.0),
    "a0.5_g1": balanced(0.5, 1.0),
    "a0.5_g1.5": balanced(0.5, 1.5),
    "a0.5_g2": balanced(0.5, 2.0),
}
FAMILIES = {
    "paper": {
        "faster_rcnn_r50_1x": FASTER,
        "faster_rcnn_r101_1x": FASTER | R101,
        "faster_rcnn_r101_2x": FASTER | R101 | TWICE,
        "faster_rcnn_x101_64x4d_1x": FASTER | X101,
        "libra_faster_rcnn_r50_1x": FASTER | LIBRA,
        "libra_faster_rcnn_r101_1x": FASTER | LIBRA | R101,
        "libra_faster_rcnn_r101_2x": FASTER | LIBRA | R101 | TWICE,
        "libra_faster_rcnn_x101_64x4d_1x": FASTER | LIBRA | X101,
        "retinanet_r50_1x": RETINANET,
        "libra_retinanet_r50_1x": RETINANET | LIBRA_RETINANET,
        "rpn_r50_1x": RPN,
        "rpn_r101_1x": RPN | R101,
        "rpn_x101_64x4d_1x": RPN | X101,
        "libra_rpn_r50_1x": RPN | LIBRA_RPN,
        "fast_rcnn_r50_1x": FAST,
        "fast_rcnn_r50_1x_sampler": FAST | {"sampler": LIBRA_SAMPLER},
        "fast_rcnn_r50_1x_sampler_pyramid": FAST | {"sampler": LIBRA_SAMPLER, "pyramid": NON_LOCAL},
        "libra_fast_rcnn_r50_1x": FAST | {"sampler": LIBRA_SAMPLER, "pyramid": NON_LOCAL, "loss": LIBRA_LOSS},
        **{f"fast_rcnn_r50_1x_{name}": FAST | change for name, change in (TABLE_4 | TABLE_5 | TABLE_6).items()},
    },
    "modern": {
        "faster_rcnn_r50_1x": MODERN_FASTER,
        "faster_rcnn_r101_1x": MODERN_FASTER | R101,
        "faster_rcnn_x101_64x4d_1x": MODERN_FASTER | X101,
        "libra_faster_rcnn_r50_1x": MODERN_LIBRA,
        "libra_faster_rcnn_r101_1x": MODERN_LIBRA | R101,
        "libra_faster_rcnn_x101_64x4d_1x": MODERN_LIBRA | X101,
        "retinanet_r50_1x": RETINANET | MODERN | {"loss": ("SmoothL1Loss", 0.0, None, None, 1.0)},
        "libra_retinanet_r50_1x": RETINANET | MODERN | LIBRA_RETINANET,
        "rpn_r50_1x": RPN | MODERN | MODERN_RPN | {"rpn after NMS": (2000, 1000)},
        "rpn_x101_64x4d_1x": RPN | MODERN | MODERN_RPN | X101 | {"rpn after NMS": (2000, 1000)},
        "fast_rcnn_r50_1x": MODERN_FAST,
        "libra_fast_rcnn_r50_1x": MODERN_FAST | {"sampler": LIBRA_SAMPLER, "pyramid": NON_LOCAL, "loss": LIBRA_LOSS},
    },
}
for name, expected in FAMILIES["modern"].items():  # no clipping, and mmdetection's own start of the non-local block
    expected = FAMILIES["modern"][name] = dict(expected)
    expected["optimizer"] = (*expected["optimizer"][:-1], 0.0)
    expected["init"] = ("mmdet", "zero")
EXPECTED = {f"{family}/{name}": facts for family, recipes in FAMILIES.items() for name, facts in recipes.items()}


def loss_of(loss):
    weight, loss = (loss.weight, loss.loss) if hasattr(loss, "loss") else (1.0, loss)
    return (type(loss).__name__, loss.beta, getattr(loss, "alpha", None), getattr(loss, "gamma", None), weight)


def sampler_of(sampler):
    drawn = "random"
    if hasattr(sampler, "num_bins"):
        drawn = (sampler.num_bins, sampler.max_iou, sampler.instance_balanced)
    negatives = getattr(sampler, "max_negatives_per_positive", None)
    return (sampler.batch_size_per_image, sampler.positive_fraction, drawn, negatives)


def thresholds_of(matcher):
    return (matcher.high_threshold, matcher.low_threshold, matcher.allow_low_quality_matches)


def facts_of(config, model):
    """What is to be known of a recipe, read from what it builds wherever that shows it."""
    body, fpn = model.backbone.body, model.backbone.fpn
    layers = [body[f"layer{i}"] for i in range(1, 5)]
    is_retinanet = config.model.model == "libra_retinanet"
    has_rpn = config.model.model in ("libra_fasterrcnn", "libra_rpn")
    bfp = getattr(model.backbone, "bfp", None)
    trained = {name.split(".")[0] for name, weight in body.named_parameters() if weight.requires_grad}
    training = config.training
    facts = {
        "backbone": (
            type(layers[0][0]).__name__,
            list(map(len, layers)),
            layers[0][0].conv2.groups,
            layers[0][0].conv2.out_channels // layers[0][0].conv2.groups,
        ),
        "norm": type(body["bn1"]).__name__,
        "trained": sorted(trained),
        "channels": model.backbone.out_channels,
        "path": hasattr(model.backbone, "path_aggregation"),
        "pyramid": bfp and (type(bfp.refine).__name__, bfp.refine_level),
        "levels": len(fpn.inner_blocks) + (2 if is_retinanet else 1),
        "size": (model.transform.min_size, model.transform.max_size),
        "mean, std": (model.transform.image_mean, model.transform.image_std),
        "init": (config.conventions.init, config.libra.pyramid_init),
        "schedule": (training.epochs, training.lr_steps, training.lr_gamma, training.lr_scheduler),
        "warm-up": (training.warmup_iters, training.warmup_factor),
        "optimizer": (
            training.opt,
            pytest.approx(training.lr),
            training.momentum,
            training.weight_decay,
            training.norm_weight_decay,
            training.clip_grad_norm,
        ),
        "data": (
            config.data.data_augmentation,
            config.data.aspect_ratio_group_factor,
            config.data.max_proposals if config.model.model == "libra_fastrcnn" else None,
        ),
    }
    if is_retinanet or has_rpn:
        generator = model.anchor_generator if is_retinanet else model.rpn.anchor_generator
        facts |= {
            "strides": generator.strides,
            "sizes": generator.sizes,
            "ratios": generator.aspect_ratios[0],
            "corners": "centered" if generator.centered else "rounded" if generator.rounded else "exact",
        }
    if is_retinanet:
        return facts | {
            "P6 and P7": (fpn.extra_blocks.p6.in_channels, type(fpn.extra_blocks).__name__ == "LastLevelP6P7"),
            "thresholds": thresholds_of(model.proposal_matcher),
            "head": (
                model.head.classification_head.cls_logits.out_channels,
                model.head.regression_head.bbox_reg.out_channels,
            ),
            "normalizer": type(model.head).__name__,
            "loss": loss_of(model.head.regression_head.box_loss),
            "test": (model.score_thresh, model.nms_thresh, model.detections_per_img),
        }
    if has_rpn:
        rpn = model.rpn
        facts |= {
            "rpn thresholds": thresholds_of(rpn.proposal_matcher),
            "rpn sampler": sampler_of(rpn.fg_bg_sampler),
            "rpn border": getattr(rpn, "allowed_border", None),
            "rpn loss": loss_of(rpn.box_loss)[:-1],
            "rpn coder": rpn.box_coder.weights,
            "rpn before NMS": (rpn._pre_nms_top_n["training"], rpn._pre_nms_top_n["testing"]),
            "rpn NMS": rpn.nms_thresh,
            "rpn after NMS": (rpn._post_nms_top_n["training"], rpn._post_nms_top_n["testing"]),
        }
    if config.model.model != "libra_rpn":
        heads = model.roi_heads
        pool, predictor = heads.box_roi_pool, heads.box_predictor
        facts |= {
            "thresholds": thresholds_of(heads.proposal_matcher),
            "sampler": sampler_of(heads.fg_bg_sampler),
            "pool": (pool.output_size, pool.sampling_ratio, type(pool).__name__.startswith("Aligned")),
            "head": (
                heads.box_head.fc7.out_features,
                predictor.cls_score.out_features,
                predictor.bbox_pred.out_features,
            ),
            "coder": heads.box_coder.weights,
            "loss": loss_of(heads.box_loss),
            "test": (heads.score_thresh, heads.nms_thresh, heads.detections_per_img),
        }
    return facts


def build(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    flags = ["--recipe", name, "--data-path", "coco"]
    flags += ["--proposals", "x.npy"] if "fast_rcnn" in name else []
    config, _ = read_command_line(make_parser().parse_args(flags))
    with torch.device("meta"):
        return config, build_model(config, 91)


def test_every_recipe_is_expected():
    folder = resources.files("balanced_learning.training") / "recipes"
    bases = {"base", "faster_rcnn", "retinanet", "rpn", "fast_rcnn", "second_stage"}
    found = {
        f"{family}/{file.name.removesuffix('.toml')}" for family in FAMILIES for file in (folder / family).iterdir()
    }
    assert {name for name in found if name.split("/")[1] not in bases} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_is_what_the_paper_or_mmdetection_has(name, monkeypatch):
    assert facts_of(*build(name, monkeypatch)) == EXPECTED[name]


@pytest.mark.parametrize(
    ("rows", "part"), [(TABLE_4, {"sampler"}), (TABLE_5, {"path", "pyramid"}), (TABLE_6, {"loss"})]
)
def test_rows_of_a_table_differ_in_its_part_alone(rows, part, monkeypatch):
    config, model = build("paper/fast_rcnn_r50_1x", monkeypatch)
    facts = facts_of(config, model)
    of_parts = {"sampler", "num_bins", "instance_balanced", "pyramid", "refine", "path_aggregation"}
    of_parts |= {"box_loss", "alpha", "gamma", "beta", "box_loss_weight"}
    for row in rows:
        of_row, built = build(f"paper/fast_rcnn_r50_1x_{row}", monkeypatch)
        other, values = facts_of(of_row, built), of_row.values()
        differing = {name for name in facts if facts[name] != other[name]}
        assert differing
        assert differing <= part
        assert {name for name, value in config.values().items() if value != values[name]} <= of_parts


def test_r50_trains_the_affine_of_50176_values_of_batch_norm(monkeypatch):
    _, model = build("paper/faster_rcnn_r50_1x", monkeypatch)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert sum(w.numel() for norm in norms for w in norm.parameters() if w.requires_grad) == 50_176
    model.train()
    assert not any(norm.training for norm in norms)
