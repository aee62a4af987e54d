"""One step: the gradient of a batch that is split over parts, and what the host waits for."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d

from balanced_learning.training.config import Config
from balanced_learning.training.data.dataset import Batch
from balanced_learning.training.model import build_model, prepare
from balanced_learning.training.optimization import Precision
from balanced_learning.training.run import Run
from balanced_learning.training.step import Stepper
from tests.kernels import needs_gpu
from tests.training.toy import Toy

CPU = torch.device("cpu")


def batch_of(count):
    draw = torch.Generator().manual_seed(3)
    images = [torch.rand(3, 64, 64, generator=draw) for _ in range(count)]
    targets = [
        {"boxes": torch.tensor([[4.0 + i, 8.0, 34.0 + i, 40.0]]), "labels": torch.tensor([1]), "image_id": i}
        for i in range(count)
    ]
    return Batch(images, targets, of=count, is_filler=False, unreadable=[], step=0)


def frozen(model):
    """Batch norm takes statistics over a batch, which parts of it do not share."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                norm = FrozenBatchNorm2d(child.num_features)
                norm.load_state_dict({k: v for k, v in child.state_dict().items() if "num" not in k})
                setattr(module, name, norm)
    return model


def first_ones(labels, *_):
    """A sampler without chance, whose quota of a positive and 8 negatives every image fills."""
    masks = [], []
    for label in labels:
        for mask, chosen, count in zip(masks, (label > 0, label == 0), (1, 8), strict=True):
            mask.append(chosen & (chosen.cumsum(0) <= count))
    return masks


def make_run(kind="libra_retinanet", **values):
    torch.manual_seed(0)
    common = {
        "small": True,
        "min_size": 64,
        "max_size": 64,
        "lr": 0.01,
        "warmup_iters": 0,
        "clip_grad_norm": 0.0,
        "model": kind,
    }
    config = Config.of(common | values)
    model = frozen(build_model(config, 3))
    for bfp in (module for name, module in model.named_modules() if name.endswith("bfp.refine")):
        nn.init.normal_(bfp.out.weight, std=0.1)  # else the rest of it has no gradient
    if kind == "libra_fasterrcnn":
        model.rpn.fg_bg_sampler = model.roi_heads.fg_bg_sampler = first_ones
    return Run(config, None, prepare(model, config.model, CPU), Precision(config.training.amp, CPU), 1)


def step_once(run, batch):
    """The gradients of a step."""
    stepper = Stepper(run, pytest.fail)
    stepper(batch)
    stepper.finish()
    return torch.cat([parameter.grad.flatten() for parameter in run.model.parameters()])


@pytest.mark.parametrize("kind", ["libra_retinanet", "libra_fasterrcnn"])
def test_parts_have_the_gradient_of_the_whole(kind):
    whole, parts = make_run(kind, batch_size=5), make_run(kind, batch_size=2, accumulation_steps=3)
    expected, found = (step_once(run, batch_of(5)) for run in (whole, parts))
    assert expected.norm() > 0.1
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert parts.sums == pytest.approx(whole.sums, rel=1e-6)
    assert whole.sums["images"] == 5
    halves = step_once(make_run(kind, batch_size=5), batch_of(2))
    assert (halves - expected).norm() > 1e-3 * expected.norm()  # so that the batches are not too much alike


def test_a_filler_weighs_nothing():
    run = make_run(batch_size=1, weight_decay=0.0)
    before = [parameter.clone() for parameter in run.model.parameters()]
    assert not step_once(run, batch_of(1)._replace(is_filler=True)).any()
    assert all(map(torch.equal, before, run.model.parameters()))
    assert not any(run.sums.values())


def test_an_image_weighs_its_share_of_all_processes_images():
    alone, shared = (step_once(make_run(batch_size=1), batch_of(1)._replace(of=of)) for of in (1, 4))
    torch.testing.assert_close(4 * shared, alone)


class Waits(TorchDispatchMode):
    """Counts the calls of ops for whose result the host waits."""

    OPS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique2")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        to_host = name == "_to_copy" and kwargs and kwargs.get("device") and not kwargs.get("non_blocking")
        self.count += name in self.OPS or bool(to_host)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("values", [{}, {"opt": "adamw"}, {"accumulation_steps": 2}, {"ema": 0.9}])
def test_a_step_waits_for_nothing_that_the_model_does_not_wait_for(values):
    run = make_run(batch_size=1, clip_grad_norm=1.0, **values)
    batch = batch_of(run.config.training.accumulation_steps)
    stepper = Stepper(run, pytest.fail)
    for _ in range(2):
        stepper(batch)
    with Waits() as model:
        for part in batch.parts(1):
            torch.stack(list(run.model(part.images, part.targets).values())).sum().backward()
    with Waits() as step:
        stepper(batch)
    assert model.count > 0
    on_host = 1 * ("ema" in values)  # torch's average counts its updates there
    assert step.count - on_host == model.count


@needs_gpu
def test_a_step_on_cuda_waits_as_often_as_the_model(recwarn):
    device = torch.device("cuda")
    run = make_run(batch_size=2, ema=0.9, amp="fp16")
    run = Run(run.config, None, prepare(run.model, run.config.model, device), Precision("fp16", device), 1)
    batch = batch_of(2).to(device)
    stepper = Stepper(run, pytest.fail)
    counts = []
    for do in (
        lambda: (stepper(batch), stepper(batch)),
        lambda: torch.stack(list(run.model(batch.images, batch.targets).values())).sum().backward(),
        lambda: stepper(batch),
    ):
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            do()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in recwarn))
    assert counts[2] <= counts[1]


@pytest.mark.parametrize("amp", [None, "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_first_step_that_is_left_out_leaves_nothing(value, amp):
    run = make_run(batch_size=1, amp=amp)
    run.precision.scaler = torch.amp.GradScaler(
        "cpu", init_scale=0.5, enabled=amp is not None
    )  # no longer its own skip
    weights = [parameter.clone() for parameter in run.model.parameters()]
    run.model.head.regression_head.bbox_reg.bias.register_hook(lambda gradient: gradient * 0 + value)
    faults = []
    stepper = Stepper(run, faults.append)
    stepper(batch_of(1))
    stepper.finish()
    (fault,) = faults
    named = "head.regression_head.bbox_reg.bias" if value != 1e38 else "all weights, taken together,"
    assert fault.cause == f"the gradient of {named} is not finite"
    assert all(map(torch.equal, weights, run.model.parameters()))
    assert not any(state["momentum_buffer"].any() for state in run.optimizer.state.values())


@pytest.mark.parametrize("kind", ["libra_retinanet", "libra_fasterrcnn"])
def test_channels_last_changes_the_layout_alone(kind):
    values = {"small": False, "backbone": "resnet18", "weights_backbone": None, "batch_size": 1}
    plain, last = make_run(kind, **values), make_run(kind, **values, channels_last=True)
    weight = last.model.backbone.body.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    expected, found = step_once(plain, batch_of(1)), step_once(last, batch_of(1))
    assert last.sums == pytest.approx(plain.sums, rel=1e-5)
    assert expected.norm().item() == pytest.approx(found.norm().item(), rel=1e-4)
    assert plain.model.state_dict().keys() == last.model.state_dict().keys()


@pytest.mark.slow
def test_compiling_changes_nothing_but_the_speed():
    torch.compiler.reset()
    plain, fast = make_run(batch_size=2), make_run(batch_size=2, compile=True)
    expected, found = step_once(plain, batch_of(2)), step_once(fast, batch_of(2))
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert fast.sums == pytest.approx(plain.sums, rel=1e-5)


def test_the_backbone_is_compiled_in_place(monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    for name in ("recompile_limit", "accumulated_recompile_limit"):
        monkeypatch.setattr(torch._dynamo.config, name, 8)
    compile_in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_in_place(self, backend=backend, **how))
    torch.compiler.reset()
    config = Config.of({"lr": 0.1, "compile": True, "ema": 0.9, "batch_size": 2})
    run = Run(config, None, prepare(Toy(), config.model, CPU), Precision(None, CPU), 1)
    step_once(run, batch_of(2))
    assert len(graphs) == 1
    for width in range(40, 52):  # more sizes than torch compiles for by default
        run.model.backbone(torch.zeros(2, 3, 24, width))
    assert len(graphs) == 1 + 12
    assert run.model.state_dict().keys() == Toy().state_dict().keys()
    assert run.ema.module.backbone._compiled_call_impl is None
    torch.compiler.reset()
