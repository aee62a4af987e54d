import math

import pytest
import torch
from torch import nn

from balanced_learning import BalancedL1Loss
from balanced_learning.detection import apply_libra
from balanced_learning.detection.imbalance.objective_level import (
    ObjectiveMeter,
    box_errors,
    gradient_shares,
    gradients,
)
from balanced_learning.detection.proposals import second_stage


def encoded(box: list[float], truth: list[float], weights: tuple[float, ...]) -> list[float]:
    """What is to be predicted for a box, coordinate by coordinate."""
    (x1, y1, x2, y2), (left, top, right, bottom) = box, truth
    width, height = x2 - x1, y2 - y1
    shifts = (left + right - x1 - x2) / 2 / width, (top + bottom - y1 - y2) / 2 / height
    scales = math.log((right - left) / width), math.log((bottom - top) / height)
    return [weight * value for weight, value in zip(weights, (*shifts, *scales), strict=True)]


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("parts", [None, {}, {"sampler": False}, {"box_loss": False}, "given proposals"])
def test_box_errors_are_those_of_a_loop_over_the_sampled_boxes(build, images, targets, parts):
    model = build("fasterrcnn").eval()
    if parts == "given proposals":
        second_stage(apply_libra(model)).eval()
        targets = [{**target, "proposals": target["boxes"] + torch.tensor([2.0, 3, 4, 5])} for target in targets]
    elif parts is not None:
        apply_libra(model, **parts)
    seen = {}
    model.roi_heads.box_roi_pool.register_forward_hook(lambda _, args, output: seen.update(boxes=args[1]))
    model.roi_heads.box_predictor.register_forward_hook(lambda _, args, output: seen.update(deltas=output[1].tolist()))
    errors = box_errors(model, images, targets)
    rows, wanted = iter(seen["deltas"]), []
    for boxes, target in zip(seen["boxes"], targets, strict=True):
        truths = list(zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True))
        for box, deltas in zip(boxes.tolist(), rows, strict=False):
            best, label = max(truths, key=lambda truth: iou(truth[0], box), default=(box, 0))
            if label and iou(best, box) >= 0.5:
                own = deltas[4 * label : 4 * label + 4]
                wanted.append([p - t for p, t in zip(own, encoded(box, best, (10, 10, 5, 5)), strict=True)])
    assert len(wanted) >= (10 if parts == "given proposals" else 5)  # the ground truths themselves
    torch.testing.assert_close(errors, torch.tensor(wanted), rtol=1e-3, atol=1e-4)
    assert not model.training
    assert not model.rpn.training


@pytest.mark.parametrize("parts", [None, {}])
def test_box_errors_of_a_training_step_give_its_loss(build, images, targets, basic_kind, parts):
    model = build(basic_kind)
    if parts is not None:
        apply_libra(model, **parts)
    stock: nn.Module = nn.L1Loss() if basic_kind == "retinanet" else nn.SmoothL1Loss(beta=1 / 9)
    loss = stock if parts is None else BalancedL1Loss(beta=0.11 if basic_kind == "retinanet" else 1.0)
    loss.reduction = "sum"
    if basic_kind == "retinanet":
        nn.init.normal_(model.head.regression_head.bbox_reg.weight, std=0.1)  # at first it predicts next to nothing
    model.backbone.register_forward_hook(lambda *_: torch.manual_seed(1) and None)  # behind it, chance samples
    losses = model.train()(images[:1], targets[:1])
    errors = box_errors(model.eval(), images[:1], targets[:1])
    divided_by = len(errors) if basic_kind == "retinanet" else 64  # boxes that are sampled
    name = "bbox_regression" if basic_kind == "retinanet" else "loss_box_reg"
    assert loss(errors, torch.zeros_like(errors)).item() / divided_by == pytest.approx(losses[name].item(), rel=1e-4)


def test_inliers_alone_have_the_whole_gradient():
    shares = gradient_shares(torch.tensor([[0.1, -0.2, 0.3, 0.99]]), nn.SmoothL1Loss())
    assert shares[:3] == (1, 1, 1)
    assert math.isnan(shares.to_outlier)


def test_outliers_alone_leave_none():
    shares = gradient_shares(torch.tensor([[1.0, -2.0, 3.0, 1e6]]), nn.SmoothL1Loss())  # at beta begin the outliers
    assert shares[:3] == (0, 0, 0)
    assert math.isnan(shares.to_outlier)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_count_by_their_magnitude_in_each_box_and_in_all(reduction):
    errors = torch.tensor([[0.2, -0.2, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0], [-0.1, 0.0, 0.0, 0.0], [-9.0, 2.0, -2.0, 0.5]])
    shares = gradient_shares(errors, nn.SmoothL1Loss(reduction=reduction))
    assert shares.inliers == pytest.approx(12 / 16)
    assert shares.of_total == pytest.approx((0.4 + 0.1 + 0.5) / (0.4 + 0.1 + 0.5 + 4))
    assert shares.of_sample == pytest.approx((0.4 / 1.4 + 1 + 0.5 / 3.5) / 3)  # one without gradient has no share
    assert shares.to_outlier == pytest.approx((1 / 12) / 1)


def test_balanced_l1_has_the_paper_s_gradient_at_any_beta():
    b = math.exp(3) - 1
    errors = torch.tensor([[0.05, -0.1, 0.3, -0.5]])
    slopes = [0.5 * math.log(b * x / 0.2 + 1) for x in (0.05, 0.1)]
    loss = BalancedL1Loss(beta=0.2)
    assert gradients(errors, loss)[0].tolist() == pytest.approx([slopes[0], -slopes[1], 1.5, -1.5], rel=1e-5)
    shares = gradient_shares(errors, loss, beta=0.2)
    assert shares.of_total == pytest.approx(sum(slopes) / (sum(slopes) + 3))
    assert shares.to_outlier == pytest.approx(sum(slopes) / 2 / 1.5)


def test_of_no_positives_there_are_no_shares():
    assert all(map(math.isnan, gradient_shares(torch.zeros(0, 4), BalancedL1Loss())))


LOSS = nn.SmoothL1Loss()


def predicting(build, deltas: float, **parts) -> nn.Module:
    """A detector without proposals, whose positives are the ground truths, and which predicts this everywhere."""
    model = build("fasterrcnn")
    if parts:
        apply_libra(model, **parts)
    second_stage(model)
    for layer, value in (
        (model.roi_heads.box_predictor.bbox_pred, deltas),
        (model.roi_heads.box_predictor.cls_score, 0),
    ):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, value)
    return model


def measure(model: nn.Module, images, targets, loss: nn.Module = LOSS, beta: float = 1.0):
    meter = ObjectiveMeter(model, loss, beta)
    meter.add(images, [{"proposals": torch.zeros(0, 4), **target} for target in targets])
    return meter.result()


def test_where_all_errors_are_inliers_they_have_the_whole_gradient(build, images, targets):
    result = measure(predicting(build, 0.5), images, targets)
    assert (result.positives, result.inliers, result.of_total, result.of_sample) == (5, 1, 1, 1)
    assert result.of_total_balanced == 1
    assert math.isnan(result.to_outlier)
    assert result.class_loss == pytest.approx(math.log(5))  # of five classes alike
    assert result.box_loss == pytest.approx(4 * (0.5 - 1 / 18))  # torchvision's smooth L1, of beta 1/9
    assert result.ratio == pytest.approx(result.box_loss / math.log(5))


def test_where_all_errors_are_outliers_inliers_have_none(build, images, targets):
    model = predicting(build, 3.0, box_loss=nn.L1Loss())
    result = measure(model, images, targets)
    assert (result.positives, result.inliers, result.of_total, result.of_sample) == (5, 0, 0, 0)
    assert result.of_total_balanced == 0
    assert math.isnan(result.to_outlier)
    assert result.box_loss == pytest.approx(12)  # the model's own loss, not the one whose gradient is divided


def test_balanced_l1_is_compared_at_the_same_beta(build, images, targets):
    model = predicting(build, 0.0)
    model.roi_heads.box_predictor.bbox_pred.bias.detach().copy_(torch.tensor([0.1, 0.1, 0.1, 2.0]).repeat(5))
    result = measure(model, images, targets, nn.SmoothL1Loss(beta=0.2), beta=0.2)
    assert (result.inliers, result.of_total) == pytest.approx((0.75, 1.5 / 2.5))
    inlier = 0.5 * math.log((math.exp(3) - 1) * 0.1 / 0.2 + 1)
    assert result.of_total_balanced == pytest.approx(3 * inlier / (3 * inlier + 1.5))
    assert result.growth == pytest.approx((3 * inlier + 1.5) / 2.5)


def test_batches_count_by_their_images(build, images, targets):
    model = predicting(build, 0.5)
    model.roi_heads.box_predictor.cls_score.bias.detach()[1] = 2.0
    meter = ObjectiveMeter(model, LOSS, 1.0)
    batches = [[0], [2, 2, 2]]
    for batch in batches:
        meter.add(
            [images[i] for i in batch],
            [{**targets[i], "labels": 1 + i + 0 * targets[i]["labels"], "proposals": torch.zeros(0, 4)} for i in batch],
        )
    known, other = (math.log(math.exp(2) + 4) - value for value in (2, 0))
    assert meter.result().class_loss == pytest.approx((known + 3 * other) / 4)
    assert meter.result().positives == 4 + 3


@pytest.mark.parametrize("parts", [{}, {"box_loss": True}])
def test_of_nothing_little_is_known(build, images, targets, empty_targets, parts):
    model = predicting(build, 0.5, **parts)
    meter = ObjectiveMeter(model, LOSS, 1.0)
    for result in (measure(model, images, empty_targets), meter.result()):
        assert result.positives == 0
        shares = (result.inliers, result.of_total, result.of_sample, result.to_outlier, result.of_total_balanced)
        assert all(map(math.isnan, (*shares, result.box_loss, result.class_loss, result.ratio, result.growth)))
    for batch in (empty_targets, targets):
        meter.add(images, [{**target, "proposals": torch.zeros(0, 4)} for target in batch])
    assert repr(meter.result()) == repr(measure(model, images, targets))  # a batch without boxes adds nothing


@pytest.mark.parametrize("parts", [None, {}])
def test_background_alone_has_a_class_loss(build, images, empty_targets, basic_kind, parts):
    model = build(basic_kind)
    if parts is not None:
        apply_libra(model)
    result = measure(model, images, empty_targets)
    assert (result.positives, result.box_loss, result.ratio) == (0, 0, 0)
    assert result.class_loss > 0


@pytest.mark.parametrize("parts", [None, {}, {"sampler": False, "path_aggregation": True}])
def test_losses_are_those_of_a_training_step(build, images, targets, kind, parts):
    model = build(kind)
    if parts is not None:
        apply_libra(model, **parts)
    model.backbone.register_forward_hook(lambda *_: torch.manual_seed(1) and None)  # behind it, chance samples
    with torch.no_grad():
        losses = model.train()(images, targets)
    of_boxes, of_classes = (
        ("bbox_regression", "classification") if kind == "retinanet" else ("loss_box_reg", "loss_classifier")
    )
    result = measure(model, images, targets)
    assert result.box_loss == pytest.approx(losses[of_boxes].item(), rel=1e-5)
    assert result.class_loss == pytest.approx(losses[of_classes].item(), rel=1e-5)
    assert result.ratio == pytest.approx(result.box_loss / result.class_loss)
