from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import MultiScaleRoIAlign

from balanced_learning import BalancedL1Loss, IoUBalancedSampler
from balanced_learning.detection import apply_libra
from balanced_learning.detection.imbalance.feature_level import LevelMeter
from balanced_learning.detection.imbalance.objective_level import ObjectiveMeter
from balanced_learning.detection.imbalance.sample_level import SampleMeter


def sample_meter(model: nn.Module) -> SampleMeter:
    return SampleMeter(model, IoUBalancedSampler(64, 0.25), BalancedPositiveNegativeSampler(64, 0.25), draws=1)


def objective_meter(model: nn.Module) -> ObjectiveMeter:
    return ObjectiveMeter(model, nn.SmoothL1Loss(), BalancedL1Loss())


def training_detector(build: Callable[..., nn.Module], kind: str) -> nn.Module:
    """In training, with layers that a training step changes, and some parts that are not in training."""
    model = build(kind)
    if kind == "retinanet":
        model.head.classification_head.conv.append(nn.BatchNorm2d(32))
    else:
        model.rpn.head.conv.append(nn.BatchNorm2d(32))
        model.roi_heads.box_head = nn.Sequential(model.roi_heads.box_head, nn.BatchNorm1d(16), nn.Dropout())
    model.backbone.body["conv1"].requires_grad_(False)
    model.train()
    model.backbone.fpn.eval()
    return model


def state(model: nn.Module) -> dict[str, object]:
    """All that a measurement could change."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "hooks": {
            (name, key): len(value)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key.endswith("_hooks")
        },
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad is None for name, parameter in model.named_parameters()},
        "poolers": [
            (module.scales, module.map_levels) for module in model.modules() if isinstance(module, MultiScaleRoIAlign)
        ],
        "attributes": {key: value for key, value in vars(model).items() if not key.startswith("_")},
    }


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (sample_meter, "fasterrcnn"),
        (LevelMeter, "fasterrcnn"),
        (LevelMeter, "retinanet"),
        (objective_meter, "fasterrcnn"),
        (objective_meter, "retinanet"),
    ],
)
@pytest.mark.parametrize("balanced", [False, True])
def test_a_detector_is_afterwards_as_before(build, images, targets, make, kind, balanced):
    model = training_detector(build, kind)
    if balanced:
        apply_libra(model)
    before, weights = state(model), {name: value.clone() for name, value in model.state_dict().items()}
    given = [{name: value.clone() for name, value in target.items()} for target in targets]
    meter = make(model)
    with torch.no_grad():  # as a caller may have it
        meter.add(images, given)
        assert not torch.is_grad_enabled()
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(
        torch.equal(value, target[name])
        for target, own in zip(targets, given, strict=True)
        for name, value in own.items()
    )

    def fail(*_: object) -> Tensor:
        raise RuntimeError("broken")

    last = model.head.classification_head if kind == "retinanet" else model.roi_heads.box_head
    broken = last.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        meter.add(images, given)
    broken.remove()
    assert state(model) == before


def test_a_backbone_that_was_compiled_before_is_measured_alike(build, images, targets):
    results = []
    for is_compiled in (False, True):
        model = training_detector(build, "fasterrcnn")
        if is_compiled:
            torch.compiler.reset()
            model.backbone.compile(backend="eager")
        model(images, targets)
        meter = LevelMeter(model)
        torch.manual_seed(2)
        meter.add(images, targets)
        results.append(meter.result())
    assert repr(results[0]) == repr(results[1])
    torch.compiler.reset()


@pytest.mark.parametrize("make", [sample_meter, LevelMeter, objective_meter])
def test_the_mode_of_the_detector_does_not_matter(build, images, targets, make):
    results = []
    for training in (True, False):
        meter = make(training_detector(build, "fasterrcnn").train(training))
        torch.manual_seed(2)
        meter.add(images, targets)
        results.append(meter.result())
    assert repr(results[0]) == repr(results[1])
