from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou

from balanced_learning import BalancedFeaturePyramid
from balanced_learning.detection import apply_libra
from balanced_learning.detection.imbalance.cka import LinearCKA
from balanced_learning.detection.imbalance.feature_level import FeatureLevel, LevelMeter
from balanced_learning.detection.proposals import second_stage


def measure(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> FeatureLevel:
    meter = LevelMeter(model)
    meter.add(images, targets)
    return meter.result()


def target(*boxes: list[float]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.ones(len(boxes), dtype=torch.int64)}


class Made(nn.Module):
    """A backbone whose body and FPN are functions: of the images, and of the maps of the body."""

    out_channels = 3

    def __init__(self, body: Callable, fpn: Callable = lambda *maps: maps) -> None:
        super().__init__()
        self.body, self.fpn = body, Named(fpn)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(x))))


class Named(nn.Module):
    def __init__(self, fpn: Callable) -> None:
        super().__init__()
        self.fpn = fpn

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        return OrderedDict((str(i), level) for i, level in enumerate(self.fpn(*maps.values())))


class Sum(nn.Module):
    """A head whose score of class 1 is the sum of what is pooled."""

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled.flatten(1).sum(dim=1, keepdim=True)


class Scores(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([torch.zeros_like(x), x], dim=1), torch.zeros(len(x), 8, device=x.device)


def made_detector(backbone: nn.Module, levels: int, **arguments) -> FasterRCNN:
    """Of images of 64 pixels, with given proposals: of none, the ground truths alone are sampled."""
    pool = MultiScaleRoIAlign([str(i) for i in range(levels)], 2, sampling_ratio=1, canonical_scale=32)
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator([(16,)] * levels, [(1.0,)] * levels),
        box_roi_pool=pool,
        box_head=Sum(),
        box_predictor=Scores(),
        **({"min_size": 64, "max_size": 64} | arguments),
    )


def sizes(levels: int) -> list[int]:
    return [16 // 2**i for i in range(levels)]


@pytest.mark.parametrize("balanced", [False, True])
def test_equal_levels_are_alike_before_and_after(balanced):
    def body(x: Tensor) -> list[Tensor]:
        coarsest = torch.rand(len(x), 3, 2, 2)
        return [F.interpolate(coarsest, (side, side)) for side in sizes(4)]

    model = made_detector(Made(body), 4)
    if balanced:
        apply_libra(model)
    result = measure(model, [torch.rand(3, 64, 64)] * 3, [target([4, 4, 40, 40])] * 3)
    torch.testing.assert_close(result.likeness_before, torch.ones(4, 4))
    torch.testing.assert_close(result.likeness_after, torch.ones(4, 4))
    assert result.levels == ["P2", "P3", "P4", "P5"]
    assert result.body_maps == ["C2", "C3", "C4", "C5"]


def test_independent_levels_are_not_alike_until_they_are_integrated():
    def body(x: Tensor) -> list[Tensor]:
        return [torch.randn(len(x), 3, side, side) for side in sizes(3)]

    model = made_detector(Made(body), 3)
    result = measure(model, [torch.rand(3, 64, 64)] * 60, [target()] * 60)
    others = ~torch.eye(3, dtype=torch.bool)
    assert (result.likeness_before[others] < 0.02).all()
    assert (result.likeness_after[others] > 0.06).all()
    balanced = measure(apply_libra(model), [torch.rand(3, 64, 64)] * 60, [target()] * 60)
    assert (balanced.likeness_before[others] < 0.02).all()
    torch.testing.assert_close(balanced.likeness_after, result.likeness_after, atol=0.05, rtol=0)  # it refines nothing


@pytest.mark.parametrize("refine", ["conv", "given", None])
def test_likeness_is_that_of_resized_levels_at_positions_of_the_images(build, images, targets, refine):
    model = build("fasterrcnn")
    images, targets = [*images, torch.rand(3, 84, 128)], [*targets, target()]  # its last row of P4 is half in the image
    if refine:
        bfp = BalancedFeaturePyramid(32, refine_level=1, refine=refine if refine != "given" else None)
        apply_libra(model, pyramid=bfp)
    result = measure(model, images, targets)
    model.eval()
    with torch.no_grad():
        batch, _ = model.transform(images)
        before = list(model.backbone.fpn(model.backbone.body(batch.tensors)).values())
        after = list(model.backbone(batch.tensors).values())
        if not refine:
            after = BalancedFeaturePyramid(32, refine=None)(before)
    middle = 1 if refine else 2
    size = before[middle].shape[-2:]
    stride = 4 * 2**middle
    for levels, found in ((before, result.likeness_before), (after, result.likeness_after)):
        rows = []
        for image, (height, width) in enumerate(batch.image_sizes):
            resized = [
                F.adaptive_max_pool2d(x[image], size)
                if i < middle
                else F.interpolate(x[image : image + 1], size, mode="nearest")[0]
                for i, x in enumerate(levels)
            ]
            for y in range(size[0]):
                for x in range(size[1]):
                    if stride * (y + 0.5) < height and stride * (x + 0.5) < width:
                        rows.append(torch.stack([level[:, y, x] for level in resized]))
        assert len(rows) < 4 * size.numel()  # there is padding
        cka = LinearCKA()
        cka.add(torch.stack(rows))
        torch.testing.assert_close(found, cka.result(), rtol=1e-4, atol=1e-5)


def two_maps(x: Tensor) -> list[Tensor]:
    """C2 is 1, and C3 is 2 or -2, by channel."""
    signs = torch.tensor([1.0, -1, 1])[:, None, None]
    return [torch.ones(len(x), 3, 16, 16), 2 * signs.expand(len(x), 3, 8, 8)]


def two_levels(fine: Tensor, coarse: Tensor) -> list[Tensor]:
    """P2 = 3 C2 + C3: to a position of P2, C2 contributes 9 and C3 6."""
    return [3 * fine + F.interpolate(coarse, scale_factor=2), coarse]


def test_contributions_are_worked_out_by_hand():
    model = second_stage(made_detector(Made(two_maps, two_levels), 2))
    given = [target([10, 10, 20, 20]) | {"proposals": torch.zeros(0, 4)}]
    result = measure(model, [torch.rand(3, 64, 64)], given)
    assert result.boxes == [1, 0]
    torch.testing.assert_close(result.contribution, torch.tensor([[0.6, 0.4], [torch.nan] * 2]), equal_nan=True)
    result = measure(model, [torch.rand(3, 64, 64)], [given[0] | target([10, 10, 20, 20], [8, 8, 48, 48])])
    assert result.boxes == [0.5, 0.5]
    torch.testing.assert_close(result.contribution, torch.tensor([[0.6, 0.4], [0.0, 1.0]]))


class SumsOfPositions(nn.Module):
    """A head of one anchor a position, whose score of class 1 is the sum over the channels."""

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        sums = torch.cat([level.sum(dim=1).flatten(1) for level in maps], dim=1)
        return {"cls_logits": torch.stack([torch.zeros_like(sums), sums], dim=2)}


def test_contributions_to_anchors_are_worked_out_by_hand():
    anchors = AnchorGenerator([(8,), (24,)], [(1.0,)] * 2)
    backbone = Made(two_maps, two_levels)
    model = RetinaNet(backbone, 2, anchor_generator=anchors, head=SumsOfPositions(), min_size=64, max_size=64)
    result = measure(model, [torch.rand(3, 64, 64)] * 2, [target([20, 20, 28, 28]), target([20, 20, 44, 44])])
    assert result.boxes == pytest.approx([1 / 6, 5 / 6])  # on P3 the four neighbors, too, have an IoU of 0.5
    torch.testing.assert_close(result.contribution, torch.tensor([[0.6, 0.4], [0.0, 1.0]]))
    at_the_corner = measure(model, [torch.rand(3, 64, 64)], [target([-12, -12, 12, 12])])  # the first anchor of P3
    assert at_the_corner.boxes == [0, 1]
    background = target([20, 20, 28, 28]) | {"labels": torch.zeros(1, dtype=torch.int64)}
    assert measure(model, [torch.rand(3, 64, 64)], [background]).contribution.isnan().all()  # class 0 has no score


class Unconnected(FeaturePyramidNetwork):
    """Without a top-down path."""

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        maps, names = list(x.values()), list(x)
        blocks = zip(self.inner_blocks, self.layer_blocks, maps, strict=True)
        levels = [layer(inner(level)) for inner, layer, level in blocks]
        levels, names = self.extra_blocks(levels, maps, names)
        return OrderedDict(zip(names, levels, strict=True))


SPREAD = [[10.0, 10, 18, 18], [30, 30, 46, 46], [50, 20, 85, 50], [20, 20, 90, 90]]  # of sides around 8, 16, 32, 64


def spread(build, kind: str) -> nn.Module:
    """A detector of which all levels are used."""
    model = build(kind)
    if kind == "fasterrcnn":
        model.roi_heads.box_roi_pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=32)
    return model


@pytest.mark.parametrize("kind", ["fasterrcnn", "retinanet"])
def test_without_connections_levels_use_their_own_map_and_with_a_balanced_pyramid_all(build, images, kind):
    model = spread(build, kind)
    model.backbone.fpn.__class__ = Unconnected
    given = [target(*SPREAD), target(), target(*SPREAD[:2])]
    result = measure(model, images, given)
    used = torch.tensor(result.boxes) > 0
    assert used.sum() >= 2
    num_maps = len(result.body_maps)
    own = F.one_hot(torch.arange(len(used)).clamp(max=num_maps - 1), num_maps).float()
    torch.testing.assert_close(result.contribution[used], own[used])
    assert result.contribution[~used].isnan().all()
    integrated = measure(apply_libra(model), images, given)
    used = torch.tensor(integrated.boxes) > 0
    assert (integrated.contribution[used] > 0).all()
    torch.testing.assert_close(integrated.contribution[used].sum(dim=1), torch.ones(int(used.sum())))
    assert (integrated.contribution[used] * own[used]).sum(dim=1).max() < 0.99


@pytest.mark.parametrize("kind", ["fasterrcnn", "retinanet"])
@pytest.mark.parametrize("parts", [None, {"path_aggregation": True}])
def test_a_map_that_alone_has_weights_has_the_whole_contribution(build, images, kind, parts):
    model = spread(build, kind)
    for i, block in enumerate(model.backbone.fpn.inner_blocks):
        if i != 1:
            block.requires_grad_(False)
            for parameter in block.parameters():
                parameter.zero_()
    if parts:
        apply_libra(model, **parts)
    result = measure(model, images[:1], [target(*SPREAD)])
    reached = torch.tensor(result.boxes) > 0
    reached[2:] = reached[2:] & bool(parts)  # a top-down path leads to finer levels alone
    assert reached.any()
    wanted = F.one_hot(torch.tensor(1), len(result.body_maps)).float()
    torch.testing.assert_close(result.contribution[reached], wanted.expand(int(reached.sum()), -1))
    assert result.contribution[~reached].isnan().all()  # nothing that could be divided


def test_the_scale_of_a_map_is_no_contribution(build, images, targets):
    model = build("retinanet")
    wanted = measure(model, images, targets).contribution
    model.backbone.body.register_forward_hook(
        lambda _, args, maps: OrderedDict((name, 50 * x if name == "1" else x) for name, x in maps.items())
    )
    model.backbone.fpn.inner_blocks[1][0].weight.detach().div_(50)
    torch.testing.assert_close(measure(model, images, targets).contribution, wanted, equal_nan=True)


def test_boxes_are_counted_where_the_pooler_pools_them(build):
    model = second_stage(spread(build, "fasterrcnn"))
    boxes = [[10.0, 10, 18, 18], [40, 40, 48, 48], [20, 20, 37, 37], [4, 4, 90, 90]]
    given = target(*boxes) | {"proposals": torch.zeros(0, 4)}
    assert measure(model, [torch.rand(3, 96, 96)], [given]).boxes == [0.5, 0.25, 0, 0.25, 0]


def test_anchors_are_counted_on_their_level(build, images, targets):
    model = build("retinanet")
    meter = LevelMeter(model)
    for image, each in zip(images, targets, strict=True):
        meter.add([image], [each])
    counts = torch.zeros(5)
    for image, each in zip(images, targets, strict=True):
        batch, _ = model.eval().transform([image])
        maps = list(model.backbone(batch.tensors).values())
        (anchors,) = model.anchor_generator(batch, maps)
        if not len(each["boxes"]):
            continue
        quality = box_iou(each["boxes"], anchors)
        positive = (quality >= 0.5) | (quality == quality.amax(dim=1, keepdim=True))
        of_level = positive.any(dim=0).split([9 * level.shape[-2] * level.shape[-1] for level in maps])
        counts += torch.stack([level.sum() for level in of_level])
    assert (counts > 0).sum() >= 2
    assert meter.result().boxes == pytest.approx((counts / counts.sum()).tolist())


@pytest.mark.parametrize("size", [(160, 160), (160, 96), (96, 64)])
def test_levels_are_named_by_their_strides_where_maps_are_rounded_up(build, size):
    model = build("retinanet", min_size=min(size), max_size=max(size))
    result = measure(model, [torch.rand(3, *size)], [target()])
    assert result.levels == ["P3", "P4", "P5", "P6", "P7"]
    assert result.body_maps == ["C3", "C4", "C5"]


@pytest.mark.parametrize("parts", [None, {}])
def test_of_no_positives_no_contribution_is_known(build, images, empty_targets, basic_kind, parts):
    model = build(basic_kind)
    if parts is not None:
        apply_libra(model)
    result = measure(model, images, empty_targets)
    assert torch.tensor(result.boxes).isnan().all()
    assert result.contribution.isnan().all()
    assert result.likeness_before.isfinite().all()
    nothing = LevelMeter(model).result()
    assert [len(each) for each in astuple(nothing)] == [0] * 6


def test_a_detector_that_cannot_be_measured_is_refused(build):
    with pytest.raises(TypeError, match=r"model must be a FasterRCNN or RetinaNet of torchvision.*, got Linear"):
        LevelMeter(nn.Linear(1, 1))
    model = build("fasterrcnn")
    del model.backbone.fpn
    with pytest.raises(ValueError, match=r"model\.backbone must have a module fpn, which BackboneWithFPN has not"):
        LevelMeter(model)
