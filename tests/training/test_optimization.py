"""Schedules against torch's own, and the moving average against a loop over its recursion."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LinearLR, MultiStepLR

from balanced_learning.training.config import TrainingConfig
from balanced_learning.training.optimization import Precision, make_average, make_optimizer, make_scheduler, update

ITERATIONS = 7


def rates(make, steps):
    optimizer = make_optimizer(nn.Linear(1, 1), TrainingConfig(lr=0.3))
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup_iters", [0, 1, 5])
@pytest.mark.parametrize("name", ["multisteplr", "cosineannealinglr"])
def test_schedules_are_torchs_with_a_linear_warm_up(name, warmup_iters):
    values = {"lr": 0.3, "lr_scheduler": name, "epochs": 6, "lr_steps": (2, 4), "warmup_iters": warmup_iters}
    config, steps = TrainingConfig(**values), 6 * ITERATIONS

    def torchs(optimizer):
        if name == "multisteplr":
            decay = MultiStepLR(optimizer, [2 * ITERATIONS, 4 * ITERATIONS])
        else:
            decay = CosineAnnealingLR(optimizer, steps)
        return (
            ChainedScheduler([LinearLR(optimizer, 1 / 3, total_iters=warmup_iters), decay]) if warmup_iters else decay
        )

    found = rates(lambda optimizer: make_scheduler(optimizer, config, ITERATIONS), steps)
    assert found == pytest.approx(rates(torchs, steps), rel=1e-9)
    for done in (1, 3, 2 * ITERATIONS, steps - 1):
        rest = rates(lambda optimizer, done=done: make_scheduler(optimizer, config, ITERATIONS, done), steps - done)
        assert rest == found[done:]


def test_a_warm_up_is_over_after_an_epoch():
    config = TrainingConfig(lr=0.3, warmup_iters=500, epochs=3, lr_steps=())
    found = rates(lambda optimizer: make_scheduler(optimizer, config, ITERATIONS), 3 * ITERATIONS)
    assert found[ITERATIONS - 1] < found[ITERATIONS] == pytest.approx(0.3)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 50.0])
def test_the_gradient_is_clipped_as_torch_does(clip_norm):
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
    config = TrainingConfig(lr=1.0, momentum=0.0, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = update(model, make_optimizer(model, config), Precision(None, torch.device("cpu")), clip_norm)
    assert found.item() == pytest.approx(norm.item())
    factor = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0
    for parameter, old, gradient in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), old - factor * gradient)


def test_the_average_follows_its_recursion():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = make_average(model, 0.7)
    assert not average.training
    expected = None
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        weights = torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])
        expected = weights if expected is None else 0.7 * expected + 0.3 * weights
        average.update_parameters(model)
    found = torch.cat([parameter.detach().flatten() for parameter in average.module.parameters()])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
