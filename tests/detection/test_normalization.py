import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from balanced_learning.detection import libra_fasterrcnn
from balanced_learning.detection.normalization import FrozenStatisticsBatchNorm2d


@pytest.fixture
def norm() -> FrozenStatisticsBatchNorm2d:
    norm = FrozenStatisticsBatchNorm2d(3)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2)
    return norm


def test_running_statistics_are_used_and_stay(norm):
    x = torch.randn(2, 3, 4, 5)
    before = copy.deepcopy(norm.state_dict())
    for mode in (True, False):
        out = nn.Sequential(norm).train(mode)(x)
        for c in range(3):
            gap = x[:, c] - before["running_mean"][c]
            expected = gap / (before["running_var"][c] + 1e-5).sqrt() * before["weight"][c] + before["bias"][c]
            torch.testing.assert_close(out[:, c], expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_weight_and_bias_are_trained(norm):
    x = torch.randn(2, 3, 4, 5)
    norm.train()(x).sum().backward()
    scaled = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(norm.weight.grad, scaled.sum(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.bias.grad, torch.full((3,), 40.0))


def test_a_batch_of_one_pixel_is_no_error(norm):
    assert norm.train()(torch.randn(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_keys_are_those_of_batch_norm_and_its_weights_can_be_loaded(norm):
    stock = nn.BatchNorm2d(3)
    assert list(norm.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(norm.state_dict())
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(stock.eval()(x), norm.train()(x))
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):  # noqa: S301
        assert torch.equal(other.train()(x), norm(x))


def test_a_backbone_with_it_takes_weights_of_imagenet():
    model = libra_fasterrcnn(
        backbone_name="resnet18",
        weights_backbone=None,
        trainable_backbone_layers=3,
        norm_layer=FrozenStatisticsBatchNorm2d,
    )
    weights = {name: w for name, w in resnet18(weights=None).state_dict().items() if not name.startswith("fc.")}
    model.backbone.body.load_state_dict(weights)
    norms = {name: m for name, m in model.train().named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(norms) == 20
    assert not any(norm.training for norm in norms.values())
    trained = {name for name, norm in norms.items() if norm.weight.requires_grad}
    assert trained == {name for name in norms if name.startswith(tuple(f"backbone.body.layer{i}" for i in (2, 3, 4)))}
