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
