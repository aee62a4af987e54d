"""The private names of torch: they are there, and without them the results stay right."""

import importlib
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.data import dataloader

import balanced_learning
from balanced_learning import _ops, _torch_private, balanced_l1_loss

NAMES = [
    (torch._C, "_are_functorch_transforms_active"),
    (torch._C, "_AutoDispatchBelowAutograd"),
    (forward_ad, "_current_level"),
]


@pytest.fixture(params=NAMES, ids=lambda name: name[1])
def absent(request, monkeypatch):
    """The library as in a torch without one of the names; torch itself keeps it."""
    with monkeypatch.context() as context:
        context.delattr(*request.param)
        importlib.reload(_torch_private)
    yield request.param[1]
    importlib.reload(_torch_private)


def test_this_torch_has_the_names():
    assert _torch_private.are_transforms_active is torch._C._are_functorch_transforms_active
    assert _torch_private.below_autograd is torch._C._AutoDispatchBelowAutograd
    assert not _torch_private.is_forward_mode_active()
    with forward_ad.dual_level():
        assert _torch_private.is_forward_mode_active()
    assert callable(dataloader._MultiProcessingDataLoaderIter._shutdown_workers)


def test_no_other_file_names_a_private_part_of_torch():
    private = re.compile(r"torch\.([a-z_]+\.)*_(?!_)|from torch(\.\w+)*\._|forward_ad\._")
    naming = set()
    for path in Path(balanced_learning.__file__).parent.rglob("*.py"):
        text = path.read_text().replace("torch._check(", "")  # which is documented
        naming |= {path.name} if private.search(text) else set()
    assert naming == {"_torch_private.py"}


@pytest.mark.usefixtures("implementation")
def test_results_without_a_name(absent):
    input, target = torch.randn(2, 4, 5, dtype=torch.float64)
    input.requires_grad_()
    assert torch.autograd.gradcheck(balanced_l1_loss, (input, target))
    assert torch.autograd.gradgradcheck(balanced_l1_loss, (input, target))

    rows = torch.vmap(balanced_l1_loss)(input, target)
    torch.testing.assert_close(rows, torch.stack([balanced_l1_loss(*pair) for pair in zip(input, target, strict=True)]))
    (gradient,) = torch.autograd.grad(balanced_l1_loss(input, target), input)
    torch.testing.assert_close(torch.func.grad(balanced_l1_loss)(input, target), gradient)
    _, tangent = torch.func.jvp(lambda x: balanced_l1_loss(x, target), (input,), (torch.ones_like(input),))
    torch.testing.assert_close(tangent, gradient.sum())
    with forward_ad.dual_level():
        loss = balanced_l1_loss(forward_ad.make_dual(input, torch.ones_like(input)), target)
        torch.testing.assert_close(forward_ad.unpack_dual(loss).tangent, gradient.sum())


@pytest.mark.usefixtures("kernels")
def test_speed_without_a_name(absent):
    assert _ops.uses_kernels(torch.zeros(3)) == (absent != "_are_functorch_transforms_active")
    assert (_torch_private.below_autograd is nullcontext) == (absent == "_AutoDispatchBelowAutograd")
    assert _torch_private.is_forward_mode_active() == (absent == "_current_level")
