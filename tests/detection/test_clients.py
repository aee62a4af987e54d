<<<<<<< HEAD
"""What users of torchvision's stages do with them, done side by side with the balanced ones."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torchvision.ops
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from balanced_learning import IoUBalancedSampler
from balanced_learning.detection import apply_libra
from balanced_learning.detection.roi_heads import LibraRoIHeads
from balanced_learning.detection.rpn import LibraRPN
from tests.detection.test_stages import Constant, random_boxes, roi_heads, rpn

STOCK_LOSS = nn.SmoothL1Loss(reduction="sum", beta=1 / 9)


def balanced_as_stock(kind: str, model: nn.Module) -> nn.Module:
    """Balanced stages with the settings of torchvision."""
    if kind == "retinanet":
        return apply_libra(model, pyramid=False, box_loss=nn.L1Loss(reduction="sum"))
    apply_libra(model, sampler=False, pyramid=False, box_loss=STOCK_LOSS, rpn=True)
    model.rpn.box_loss = STOCK_LOSS
    return model


# Samplers


def first_of_labels(labels):
    """The first sixteen positives and negatives."""
    return tuple(
        [(image.cumsum(0) <= 16) & image for image in images]
        for images in ([image >= 1 for image in labels], [image == 0 for image in labels])
    )


class FirstOfThree:
    def __call__(self, labels, ious, matched_idxs):
        assert all(image.dtype == torch.int64 for image in (*labels, *matched_idxs))
        assert all(image.is_floating_point() for image in ious)
        return first_of_labels(labels)


class FirstModule(nn.Module):
    def forward(self, labels):
        return first_of_labels(labels)


class FirstModuleOfThree(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, labels, ious, matched_idxs):
        return FirstOfThree()(labels, ious, matched_idxs)


class Watcher:
    def __init__(self, sampler):
        self.sampler, self.ious = sampler, []

    def __call__(self, labels):
        self.ious += getattr(labels, "ious", [])
        return self.sampler(labels)


FIRST = [
    first_of_labels,
    lambda labels: first_of_labels(labels),
    lambda labels, ious, matched_idxs: first_of_labels(labels),
    FirstOfThree(),
    FirstModule(),
    FirstModuleOfThree(),
]


@pytest.mark.parametrize("sampler", FIRST, ids=range(len(FIRST)))
def test_a_sampler_of_either_protocol_draws_as_in_torchvision(sampler, build, targets, train_step):
    stock, balanced = build("fasterrcnn"), balanced_as_stock("fasterrcnn", build("fasterrcnn"))
    for stage in ("rpn", "roi_heads"):
        getattr(stock, stage).fg_bg_sampler = first_of_labels
        getattr(balanced, stage).fg_bg_sampler = sampler
    torch.testing.assert_close(train_step(balanced, targets)[0], train_step(stock, targets)[0], rtol=0, atol=0)


@pytest.mark.parametrize("sampler", FIRST, ids=range(len(FIRST)))
def test_apply_libra_takes_a_sampler_of_either_protocol(sampler, build, targets, train_step):
    stock = build("fasterrcnn")
    stock.roi_heads.fg_bg_sampler = first_of_labels
    balanced = apply_libra(build("fasterrcnn"), sampler=sampler, pyramid=False, box_loss=False)
    torch.testing.assert_close(train_step(balanced, targets)[0], train_step(stock, targets)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sampler", "is_balanced"),
    [
        (BalancedPositiveNegativeSampler(64, 0.25), False),
        (BalancedPositiveNegativeSampler(64, 0.25), True),
        (IoUBalancedSampler(64), True),
        (FirstOfThree(), True),
    ],
)
def test_watching_a_sampler_changes_nothing(sampler, is_balanced, build, targets, train_step):
    model = apply_libra(build("fasterrcnn"), rpn=True) if is_balanced else build("fasterrcnn")
    stages = model.rpn, model.roi_heads
    for stage in stages:
        stage.fg_bg_sampler = sampler
    expected = train_step(model, targets)
    for stage in stages:
        stage.fg_bg_sampler = Watcher(stage.fg_bg_sampler)
    torch.testing.assert_close(train_step(model, targets), expected, rtol=0, atol=0)
    assert [len(stage.fg_bg_sampler.ious) for stage in stages] == [3 * is_balanced] * 2


def test_a_sampler_can_be_exchanged_for_one_of_another_kind(build, targets, train_step):
    model = apply_libra(build("fasterrcnn"))
    for sampler in (*FIRST, IoUBalancedSampler(8), BalancedPositiveNegativeSampler(8, 0.5), FirstModule()):
        model.roi_heads.fg_bg_sampler = sampler
        assert train_step(model, targets)[0]["loss_box_reg"].isfinite()
    assert list(model.roi_heads.fg_bg_sampler.modules()) == [sampler]


def test_parameters_of_a_sampler_belong_to_the_model(build):
    model = apply_libra(build("fasterrcnn"), sampler=FirstModuleOfThree())
    assert [name for name, _ in model.named_parameters() if name.endswith("scale")] == [
        "roi_heads.fg_bg_sampler.sampler.scale"
    ]


def test_an_iou_balanced_sampler_in_a_stage_is_the_same_as_before():
    given, heads = IoUBalancedSampler(8, num_bins=2), roi_heads()
    heads.fg_bg_sampler = given
    held = heads.fg_bg_sampler
    assert held is given
    assert isinstance(held, IoUBalancedSampler)
    assert held == IoUBalancedSampler(8, num_bins=2)
    assert IoUBalancedSampler(8, num_bins=2) == held
    assert hash(held) == hash(IoUBalancedSampler(8, num_bins=2))
    assert held != IoUBalancedSampler(9, num_bins=2)
    assert dataclasses.replace(held, num_bins=5) == IoUBalancedSampler(8, num_bins=5)
    for copied in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):  # noqa: S301
        assert copied == held
    lists = {"labels": [torch.tensor([0, 1])], "ious": [torch.rand(2)], "matched_idxs": [torch.tensor([0, 0])]}
    for masks in (held(*lists.values()), held(**lists)):
        assert [image.tolist() for (image,) in masks] == [[False, True], [True, False]]
    with pytest.raises(ValueError, match="ious must have one tensor for each of the 1 images, got 0"):
        held(lists["labels"])


# Targets


def without(key):
    return lambda target: target.pop(key)


def cast(key, dtype):
    return lambda target: target.update({key: target[key].to(dtype)})


BAD = [
    *(without(key) for key in ("boxes", "labels", "masks", "keypoints")),
    cast("boxes", torch.int64),
    cast("boxes", torch.bfloat16),
    cast("labels", torch.int32),
    cast("labels", torch.float32),
    cast("keypoints", torch.float64),
    lambda target: target.update(labels=target["labels"][:1]),
    lambda target: target.update(boxes=target["boxes"][:, :3]),
    lambda target: target.update(boxes=target["boxes"].tolist()),
    lambda target: target.update(boxes=target["boxes"][:, [2, 3, 0, 1]]),
]


def outcome(call):
    """The result, or the type and the message of the error."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        try:
            return call()
        except Exception as error:
            return type(error), str(error)


def assert_same_outcome(of_stock, of_balanced):
    if isinstance(of_stock, tuple) and isinstance(of_stock[0], type):
        assert of_balanced == of_stock
    else:
        torch.testing.assert_close(of_balanced, of_stock, rtol=0, atol=0)


@pytest.fixture(scope="module")
def pair(kind, build):
    return build(kind), balanced_as_stock(kind, build(kind))


@pytest.mark.parametrize("num_images", [1, 3])
@pytest.mark.parametrize("spoil", BAD, ids=range(len(BAD)))
def test_a_bad_target_has_the_outcome_of_torchvision(spoil, num_images, pair, images, targets):
    spoiled = [dict(target) for target in targets[:num_images]]
    spoil(spoiled[0])
    assert_same_outcome(*(outcome(lambda m=model: m.train()(images[:num_images], spoiled)) for model in pair))


@pytest.mark.parametrize("num_targets", [None, 0, 1, 2, 4])
def test_a_wrong_number_of_targets_has_the_outcome_of_torchvision(num_targets, pair, images, targets):
    wrong = None if num_targets is None else [*targets, targets[0]][:num_targets]
    assert_same_outcome(*(outcome(lambda m=model: m.train()(images, wrong)) for model in pair))


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spoil", BAD[:10], ids=range(10))
def test_roi_heads_alone_refuse_a_bad_target_as_torchvision(spoil, training, num_images, targets):
    """Also boxes of a wrong type, which the model as a whole makes floating-point when it resizes them."""
    spoiled = [dict(target) for target in targets[:num_images]]
    spoil(spoiled[0])
    boxes = [random_boxes(5) for _ in spoiled]
    outcomes = []
    for cls in (RoIHeads, LibraRoIHeads):
        heads = roi_heads(cls).train(training)
        for part in ("mask", "keypoint"):
            for kind in ("roi_pool", "head", "predictor"):
                setattr(heads, f"{part}_{kind}", Constant(None))
        outcomes.append(outcome(lambda heads=heads: heads({}, boxes, [(96, 128)] * num_images, spoiled)))
    assert isinstance(outcomes[0][0], type)  # an error: if not for the target, then for the lack of a predictor
    assert outcomes[1] == outcomes[0]


def test_an_image_without_objects_has_no_box_loss(kind, build):
    """Its target as torchvision's own tests have it: labels and keypoints of other shapes than [0] and [0, 17, 3]."""
    target = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(1, 1, dtype=torch.int64),
        "masks": torch.zeros(0, 100, 100, dtype=torch.uint8),
        "keypoints": torch.zeros(17, 0, 3),
    }
    model = apply_libra(build(kind), rpn=kind != "retinanet").train()
    losses = model([torch.rand(3, 100, 100)], [target])
    without_positives = {"loss_box_reg", "loss_rpn_box_reg", "loss_mask", "loss_keypoint", "bbox_regression"}
    assert {name: loss.item() for name, loss in losses.items() if name in without_positives} == dict.fromkeys(
        without_positives & set(losses), 0
    )
    assert all(loss.isfinite() for loss in losses.values())


# Matchers


class EverySecond(Matcher):
    def __call__(self, quality: Tensor) -> Tensor:
        matched_idxs = super().__call__(quality)
        matched_idxs[::2] = self.BETWEEN_THRESHOLDS
        return matched_idxs


def giou_as_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return torchvision.ops.generalized_box_iou(boxes1, boxes2).clamp(min=0)


class OfNobody:
    """What torchvision asks of a matcher, and no more: a ground truth takes the boxes it covers by two fifths."""

    BELOW_LOW_THRESHOLD, BETWEEN_THRESHOLDS = -1, -2

    def __call__(self, quality: Tensor) -> Tensor:
        ious, matched_idxs = quality.max(dim=0)
        return torch.where(ious > 0.4, matched_idxs, torch.where(ious > 0.2, -2, -1))


@pytest.mark.parametrize("matcher", [EverySecond(0.5, 0.3, True), OfNobody()])
def test_a_matcher_of_the_user_decides_as_in_torchvision(matcher, build, targets, train_step):
    stock, balanced = build("fasterrcnn"), balanced_as_stock("fasterrcnn", build("fasterrcnn"))
    usual = train_step(stock, targets)[0]
    for model in (stock, balanced):
        model.rpn.proposal_matcher = model.roi_heads.proposal_matcher = matcher
    expected = train_step(stock, targets)
    assert expected[0] != usual
    torch.testing.assert_close(train_step(balanced, targets), expected, rtol=0, atol=0)


def test_a_similarity_of_the_user_decides_as_in_torchvision(build, targets, train_step):
    """In the RPN: torchvision's second stage does not use it."""
    stock, balanced = build("fasterrcnn"), balanced_as_stock("fasterrcnn", build("fasterrcnn"))
    usual = train_step(stock, targets)[0]
    for model in (stock, balanced):
        model.rpn.box_similarity = model.roi_heads.box_similarity = giou_as_iou
    expected = train_step(stock, targets)
    assert expected[0] != usual
    torch.testing.assert_close(train_step(balanced, targets), expected, rtol=0, atol=0)
    balanced.rpn.fg_bg_sampler = balanced.roi_heads.fg_bg_sampler = IoUBalancedSampler(16)
    assert all(loss.isfinite() for loss in train_step(balanced, targets)[0].values())


@pytest.mark.parametrize("counts", [(4, 0, 2), (0, 0), (0,), (3,)])
@pytest.mark.parametrize("matcher", [Matcher, EverySecond])
def test_targets_are_assigned_with_the_types_of_torchvision(matcher, counts):
    boxes, gt_boxes = [random_boxes(50) for _ in counts], [random_boxes(count) for count in counts]
    gt_labels = [torch.full((count,), 7) if count else torch.tensor([[0]]) for count in counts]
    targets = [{"boxes": image} for image in gt_boxes]
    stock, libra = roi_heads(RoIHeads), roi_heads(LibraRoIHeads)
    stock.proposal_matcher = libra.proposal_matcher = matcher(0.5, 0.3)
    expected = stock.assign_targets_to_proposals(boxes, gt_boxes, gt_labels)
    matched_idxs, labels = libra.assign_targets_to_proposals(boxes, gt_boxes, gt_labels)
    torch.testing.assert_close((matched_idxs, list(labels)), expected, rtol=0, atol=0)
    libra.fg_bg_sampler = IoUBalancedSampler(16)
    sampled = libra.subsample(labels)
    assert all((image[idxs] >= 0).all() for image, idxs in zip(labels, sampled, strict=True))

    stock, libra = rpn(RegionProposalNetwork), rpn(LibraRPN)
    stock.proposal_matcher = libra.proposal_matcher = matcher(0.5, 0.3, allow_low_quality_matches=True)
    expected = stock.assign_targets_to_anchors(boxes, targets)
    labels, matched_boxes = libra.assign_targets_to_anchors(boxes, targets)
    torch.testing.assert_close((list(labels), matched_boxes), expected, rtol=0, atol=0)


# TorchScript


@pytest.mark.filterwarnings("ignore")
def test_inference_can_be_scripted_as_in_torchvision(kind, build, images, targets, detect):
    balanced = apply_libra(build(kind), pyramid=False, rpn=kind != "retinanet").eval()
    expected = detect(build(kind))
    scripted = torch.jit.script(balanced)
    _, detections = scripted(images)
    assert all(len(image["boxes"]) for image in detections)
    torch.testing.assert_close(detections, expected)
    plain = [{key: value for key, value in target.items() if isinstance(value, Tensor)} for target in targets]
    with pytest.raises(torch.jit.Error):
        scripted.train()(images, plain)
    assert balanced.train()(images, targets)  # scripting changed nothing
=======
"""PyTorch's ways to trace, export, compile, share and store a detector: stock beside balanced."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork

from balanced_learning.detection import apply_libra

PARTS: dict[str, dict | None] = {
    "stock": None,
    "BFP": {},
    "PAFPN": {"pyramid": False, "path_aggregation": True},
    "both": {"path_aggregation": True},
}
OTHER_SIZE = (2, 3, 160, 96)


@pytest.fixture(params=list(PARTS))
def parts(request) -> dict | None:
    return PARTS[request.param]


def prepared(model: nn.Module, parts: dict | None) -> nn.Module:
    """In eval mode, with necks that change what they are given."""
    if parts is not None:
        apply_libra(model, **parts)
    if hasattr(model.backbone, "bfp"):
        nn.init.normal_(model.backbone.bfp.refine.out.weight, std=0.1)
    return model.eval()


@pytest.fixture
def model(build, basic_kind, parts) -> nn.Module:
    return prepared(build(basic_kind), parts)


@pytest.fixture
def backbone(model) -> nn.Module:
    return model.backbone


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    torch.testing.assert_close(dict(found), dict(expected), **tolerance)


def test_forward_is_what_a_call_is(backbone):
    x = torch.rand(OTHER_SIZE)
    assert_same(backbone.forward(x), backbone(x), rtol=0, atol=0)


def test_symbolic_trace(backbone):
    traced, x = torch.fx.symbolic_trace(backbone), torch.rand(OTHER_SIZE)
    assert_same(traced(x), backbone(x))
    necks = {name for name in backbone.state_dict() if name.startswith(("bfp.", "path_aggregation."))}
    assert necks <= traced.state_dict().keys()


def test_create_feature_extractor(backbone):
    last = "bfp" if hasattr(backbone, "bfp") else "fpn"
    extractor = create_feature_extractor(backbone, {last: "features"})
    for size in (OTHER_SIZE, (1, 3, 72, 104)):
        x = torch.rand(size)
        assert_same(extractor(x)["features"], backbone(x))
    assert extractor.state_dict().keys() == backbone.state_dict().keys()


def test_jit_trace(backbone):
    traced = torch.jit.trace(backbone, torch.rand(1, 3, 96, 128), strict=False)
    for size in (OTHER_SIZE, (1, 3, 72, 104)):
        x = torch.rand(size)
        assert_same(traced(x), backbone(x))


def test_jit_script(model, parts):
    if parts is None:
        x = torch.rand(OTHER_SIZE)
        assert_same(torch.jit.script(model.backbone)(x), model.backbone(x))
    else:
        with pytest.raises(RuntimeError, match=r"torch.jit.script does not take .* leave it out by apply_libra"):
            torch.jit.script(model)


class Copy(nn.Module):
    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: level for name, level in features.items()}  # noqa: C416  TorchScript knows no dict(features)


def test_jit_script_takes_the_backbone_without_necks_and_with_one_it_can_compile(build):
    x, expected = torch.rand(OTHER_SIZE), build("fasterrcnn").backbone
    for pyramid in (False, Copy()):
        backbone = apply_libra(build("fasterrcnn"), pyramid=pyramid).backbone
        assert_same(torch.jit.script(backbone)(x), expected(x))


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_the_whole_detector_by_tracing(kind, build, parts):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, file = prepared(build(kind), parts), io.BytesIO()
    if kind == "retinanet":
        for conv in filter(lambda module: isinstance(module, nn.Conv2d), model.head.classification_head.modules()):
            nn.init.kaiming_normal_(conv.weight)  # so that scores differ
    images = [torch.rand(3, 96, 128), torch.rand(3, 110, 90)]
    sizes = {"image": {1: "height", 2: "width"}}
    torch.onnx.export(
        model, ([images[0]],), file, dynamo=False, opset_version=17, input_names=["image"], dynamic_axes=sizes
    )
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for image in images:
        with torch.no_grad():
            expected = model([image])[0]
        found = dict(zip(expected, session.run(None, {"image": image.numpy()}), strict=True))
        assert len(expected["boxes"])
        for name in expected.keys() - {"keypoints"}:  # the place of a maximum, which rounding moves
            torch.testing.assert_close(torch.from_numpy(found[name]), expected[name], rtol=1e-3, atol=1e-3)


def test_compile_as_one_graph(backbone):
    compiled, x = torch.compile(backbone, backend="eager", fullgraph=True), torch.rand(OTHER_SIZE)
    assert_same(compiled(x), backbone(x))


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization(build, parts, detect):
    model = prepared(build("fasterrcnn"), parts)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(quantized.roi_heads.box_head.fc6) is torch.ao.nn.quantized.dynamic.Linear
    x = torch.rand(OTHER_SIZE)
    assert_same(quantized.backbone(x), model.backbone(x), rtol=0, atol=0)
    assert all(len(image["boxes"]) for image in detect(quantized))


def test_channels_last(backbone):
    x = torch.rand(OTHER_SIZE)
    expected = backbone(x)
    backbone.to(memory_format=torch.channels_last)
    assert_same(backbone(x.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(backbone, dtype):
    x = torch.rand(OTHER_SIZE)
    expected = backbone.double()(x.double())
    for name, level in backbone.to(dtype)(x.to(dtype)).items():
        assert level.dtype == dtype
        error = (level.double() - expected[name]).abs().flatten().quantile(0.9)
        assert error <= 20 * torch.finfo(dtype).eps * expected[name].abs().max()


def test_a_whole_module_is_saved(model, detect):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(detect(torch.load(file, weights_only=False)), detect(model), rtol=0, atol=0)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("share", [DistributedDataParallel, fully_shard])
def test_one_process_of_many(share, one_process, model, targets, train_step):
    losses, gradients = train_step(copy.deepcopy(model), targets)
    if share is fully_shard:  # the FPN apart from what uses it
        fully_shard(model.backbone.fpn, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        shared = model
    else:
        shared = DistributedDataParallel(model)
    found, shared_gradients = train_step(shared, targets)
    torch.testing.assert_close(found, losses)
    assert {name.removeprefix("module.") for name in shared_gradients} == gradients.keys()


class Own(BackboneWithFPN):
    """A backbone of one's own, which scales what comes out."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: 2 * level for name, level in super().forward(x).items()}


def test_a_backbone_of_another_class_keeps_its_forward(build):
    x, model = torch.rand(OTHER_SIZE), build("fasterrcnn")
    model.backbone.__class__ = Own
    expected = model.backbone(x)
    apply_libra(model, path_aggregation=nn.Identity(), pyramid=nn.Identity())
    assert type(model.backbone) is Own
    assert_same(model.backbone(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [BackboneWithFPN, Own])
def test_a_path_does_not_vanish_with_the_fpn(cls, build, basic_kind):
    model = build(basic_kind)
    model.backbone.__class__ = cls
    other = copy.deepcopy(model.backbone.fpn)
    apply_libra(model, path_aggregation=True)
    model.backbone(torch.rand(OTHER_SIZE))
    model.backbone.fpn = other
    with pytest.raises(RuntimeError, match=r"backbone.fpn was replaced .* without backbone.path_aggregation"):
        model.backbone(torch.rand(OTHER_SIZE))


def test_an_fpn_of_another_class_gets_the_same_by_hooks(build, basic_kind):
    x, model = torch.rand(OTHER_SIZE), build(basic_kind)
    model.backbone.fpn.__class__ = type("Same", (FeaturePyramidNetwork,), {})
    first = prepared(build(basic_kind), PARTS["both"]).backbone
    second = prepared(model, PARTS["both"]).backbone
    assert type(second) is BackboneWithFPN
    second.load_state_dict(first.state_dict())
    assert_same(second(x), first(x), rtol=1e-5, atol=1e-5)


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 1)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.conv(level) for name, level in features.items()}


def test_a_neck_of_another_class_may_be_called_fpn(build, targets, train_step):
    model = build("fasterrcnn")
    model.backbone.fpn = nn.Sequential(model.backbone.fpn, Smooth())
    losses, gradients = train_step(apply_libra(model), targets)
    assert all(loss.isfinite() for loss in losses.values())
    assert gradients["backbone.bfp.refine.out.weight"].any()


class Shrink(nn.Module):
    """A backbone without parameters."""

    out_channels = 3

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {str(i): nn.functional.avg_pool2d(x, 2 ** (i + 2)) for i in range(5)}


def test_a_backbone_without_parameters_takes_the_type_of_the_model(build):
    model = build("retinanet").double()
    model.backbone = Shrink()
    bfp = apply_libra(model).backbone.bfp
    assert {parameter.dtype for parameter in bfp.parameters()} == {torch.float64}
    assert len(model.backbone(torch.rand(1, 3, 128, 128, dtype=torch.float64))) == 5
>>>>>>> necks
