"""The ops as torch sees them: registration, derivatives, transforms; layouts, types and errors of the loss."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from balanced_learning import IoUBalancedSampler, _balanced_l1, _ops, balanced_l1_loss
from tests.kernels import DTYPES, REDUCTIONS, assert_agree, formula, gradients, needs_gpu

PARAMETERS = (0.5, 1.5, 0.7)

with_kernels = pytest.mark.usefixtures("kernels")
with_and_without = pytest.mark.usefixtures("implementation")


@with_kernels
@pytest.mark.parametrize("reduction", range(3), ids=REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device: str, reduction: int, weighted: bool, requires_grad: bool) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=requires_grad)

    tensors = draw(3, 5), draw(3, 5), draw(3, 5) if weighted else None
    grad = draw(3, 5) if reduction == 0 else draw()
    torch.library.opcheck(_ops._forward_op, (*tensors, *PARAMETERS, reduction))
    torch.library.opcheck(_ops._backward_op, (grad, *tensors, *PARAMETERS, reduction))


SETTINGS = (512, 128, True, 3, 0.5, 0.0, 0.0, None)


def sampling_batch(sizes: list[int], device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Labels, IoUs, matched indices and a seed."""
    labels = [torch.multinomial(torch.tensor([8.0, 1.0, 1.0]), size, replacement=True) % 3 for size in sizes]
    columns = [labels, [torch.rand(size) for size in sizes], [torch.randint(20, (size,)) for size in sizes]]
    labels, ious, matched_idxs = ([image.to(device) for image in column] for column in columns)
    return [torch.where(image == 2, -1, image) for image in labels], ious, matched_idxs, torch.tensor(7, device=device)


@with_kernels
def test_opcheck_of_sampling(device: str) -> None:
    torch.library.opcheck(_ops._sample_op, (*sampling_batch([4, 1], device), *SETTINGS))


@with_kernels
@needs_gpu
@pytest.mark.parametrize("sizes", [[2_000] * 3, [1] * 100, [300_000, 10]])
def test_one_seed_draws_the_same_on_every_device(device: str, sizes: list[int]) -> None:
    batch = sampling_batch(sizes, "cpu")
    moved = [[image.to(device) for image in column] for column in batch[:3]]
    ours, theirs = _ops._sample_op(*moved, batch[3].to(device), *SETTINGS), _ops._sample_op(*batch, *SETTINGS)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


@with_kernels
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels, ious, idxs, seed: ([], [], [], seed), "there must be one"),
        (lambda labels, ious, idxs, seed: (labels, ious[:1], idxs, seed), "one tensor for each image"),
        (lambda labels, ious, idxs, seed: (labels, ious, [idxs[0], idxs[1][1:]], seed), "must be of one size"),
        (lambda labels, ious, idxs, seed: ([labels[0].int(), labels[1]], ious, idxs, seed), "must be int64"),
        (lambda labels, ious, idxs, seed: (labels, [ious[0], ious[1].double()], idxs, seed), "all ious of one type"),
    ],
)
def test_sampling_reads_no_memory_that_is_not_its_own(device: str, change: Callable, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        _ops._sample_op(*change(*sampling_batch([5, 3], device)), *SETTINGS)


@with_kernels
def test_compiled_code_samples_too(device: str) -> None:
    labels, ious, matched_idxs, _ = sampling_batch([900, 700], device)
    sample = torch.compile(IoUBalancedSampler(64).__call__, dynamic=True)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        positives, negatives = sample(labels, ious, matched_idxs)
        draws.append([*positives, *negatives])
    assert [int(mask.sum()) for mask in draws[0]] == [16, 16, 48, 48]
    assert all(map(torch.equal, *draws))
    assert not any((mask & (label < 1)).any() for mask, label in zip(draws[0][:2], labels, strict=True))


@with_kernels
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("eager", [True, False])
def test_first_and_second_derivatives(device: str, reduction: str, weighted: bool, eager: bool) -> None:
    def function(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        if eager:
            return balanced_l1_loss(input, target, beta=0.7, weight=weight, reduction=reduction)
        return _ops._forward_op(input, target, weight, *PARAMETERS, REDUCTIONS.index(reduction))

    tensors = [torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2 + weighted)]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@with_and_without
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_of_a_gradient_in_forward_mode(device: str, reduction: str) -> None:
    """A gradient is linear in that of the loss: its tangent is the gradient for the tangent."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = torch.randn(3, 5, device=device, dtype=dtype).requires_grad_().unbind()
        loss = balanced_l1_loss(tensors[0], tensors[1], weight=tensors[2], reduction=reduction)
        tangent = torch.rand_like(loss)
        expected = torch.autograd.grad(loss, tensors, tangent, retain_graph=True)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(loss), tangent)
            for gradient, its in zip(torch.autograd.grad(loss, tensors, dual), expected, strict=True):
                torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, its)


@with_and_without
def test_derivatives_in_half_precision_are_computed_in_float32(device: str) -> None:
    """Each loss, 90,000, overflows float16, and a mean of so many has shares that are subnormal there."""
    many = 100_000
    input = torch.full((many,), 60_000.0, dtype=torch.float16, device=device, requires_grad=True)
    weight = torch.ones_like(input, requires_grad=True)
    balanced_l1_loss(input, torch.zeros_like(input), weight=weight).backward()
    assert weight.grad.dtype == torch.float16
    assert weight.grad[0].item() == pytest.approx((1.5 * 60_000 - 0.42141) / many, rel=1e-3)
    grad_output = torch.ones((), dtype=torch.float16, device=device, requires_grad=True)
    loss = balanced_l1_loss(input, torch.zeros_like(input))
    (gradient,) = torch.autograd.grad(loss, input, grad_output, create_graph=True)
    (second,) = torch.autograd.grad(gradient, grad_output, torch.ones_like(gradient))
    assert second.dtype == torch.float16
    assert second.item() == 1.5


@with_and_without
def test_the_second_derivative_of_a_nan_is_nan(device: str) -> None:
    input = torch.tensor([math.nan, 3.0, 0.5], device=device, requires_grad=True)
    loss = balanced_l1_loss(input, torch.zeros_like(input), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), input)
    assert second.isnan().tolist() == [True, False, False]
    assert second[1:].tolist() == [0.0, pytest.approx(0.9051, rel=1e-4)]


@with_kernels
@pytest.mark.parametrize("reduction", range(3), ids=REDUCTIONS)
@pytest.mark.parametrize("dims", [(0, 1), (0, None), (None, 1)])
def test_vmap(device: str, reduction: int, dims: tuple[int | None, int | None]) -> None:
    def forward(input: Tensor, target: Tensor) -> Tensor:
        return _ops._forward_op(input, target, None, *PARAMETERS, reduction)

    def backward(input: Tensor, target: Tensor) -> Tensor:
        grad = target * 2 if reduction == 0 else target.sum()
        return _ops._backward_op(grad, input, target, None, *PARAMETERS, reduction)

    batches = [torch.randn(4, 4, 3, device=device) if d is not None else torch.randn(4, 3, device=device) for d in dims]
    samples = [
        [batch if d is None else batch.select(d, i) for batch, d in zip(batches, dims, strict=True)] for i in range(4)
    ]
    for function in (forward, backward):
        expected = torch.stack([function(*sample) for sample in samples])
        torch.testing.assert_close(torch.vmap(function, dims)(*batches), expected)


@with_kernels
def test_vmap_over_scalars(device: str) -> None:
    input = torch.randn(6, device=device)
    losses = torch.vmap(lambda x: _ops._forward_op(x, x * 2, None, *PARAMETERS, 1))(input)
    torch.testing.assert_close(losses, _ops._forward_op(input, input * 2, None, *PARAMETERS, 0))


@with_and_without
def test_transforms_that_see_the_formula(device: str) -> None:
    input, target = torch.randn(2, 5, device=device)
    hessian = torch.func.hessian(lambda x: balanced_l1_loss(x, target, reduction="sum"))(input)
    torch.testing.assert_close(hessian, _balanced_l1.curvature(input, target, 0.5, 1.5, 1.0).diag())

    _, expected = torch.autograd.functional.jvp(balanced_l1_loss, (input, target), (input, target))
    with forward_ad.dual_level():
        loss = balanced_l1_loss(forward_ad.make_dual(input, input), forward_ad.make_dual(target, target))
        torch.testing.assert_close(forward_ad.unpack_dual(loss).tangent, expected)


@with_kernels
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("of_the_op", [False, True])
def test_compile(device: str, of_the_op: bool, reduction: str) -> None:
    def function(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        if of_the_op:
            return _ops._forward_op(input, target, weight, 0.5, 1.5, 1.0, REDUCTIONS.index(reduction))
        return balanced_l1_loss(input, target, weight=weight, reduction=reduction)

    tensors, grad = tuple(torch.randn(3, 9, device=device)), torch.randn(9 if reduction == "none" else ())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, tensors, grad), gradients(function, tensors, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@with_and_without
def test_compile_of_a_transform(device: str) -> None:
    def losses(input: Tensor, target: Tensor) -> Tensor:
        return torch.vmap(balanced_l1_loss)(input, target)

    input, target = torch.randn(2, 4, 9, device=device)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, target), losses(input, target))


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_of_the_op(device: str, dtype: torch.dtype) -> None:
    input = torch.randn(9, device=device, dtype=dtype)
    with torch.autocast(device, torch.bfloat16):
        result = _ops._forward_op(input, -input, None, *PARAMETERS, 1)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


LAYOUTS = {
    "strided": lambda x: x[:, 3:40:3],
    "transposed": lambda x: x.T,
    "misaligned": lambda x: x.flatten()[1:],
    "misaligned at both ends": lambda x: x.flatten()[3:-2],
    "0-dim": lambda x: x[5, 7],
    "expanded": lambda x: x[:, :1].expand(-1, 9),
    "empty": lambda x: x[:, :0],
}


@with_and_without
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(device: str, layout, reduction: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = tuple(layout(torch.randn(50, 60).to(device, dtype)) for _ in range(3))
        assert_agree(tensors[:2], reduction=reduction)
        assert_agree(tensors, reduction=reduction)


@with_and_without
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shapes", [((5, 4), (4,)), ((4,), (5, 4)), ((5, 1), (1, 4)), ((), (5, 4)), ((0, 4), (1, 4))])
def test_broadcasting(device: str, shapes: tuple, reduction: str) -> None:
    tensors = tuple(torch.randn(shape, device=device) for shape in shapes)
    assert_agree(tensors, reduction=reduction)
    assert_agree((*tensors, torch.rand(4, device=device)), reduction=reduction)


@with_kernels
@pytest.mark.parametrize("autocast", [False, True])
def test_result_types(device: str, autocast: bool) -> None:
    for a, b, w in itertools.product(DTYPES, DTYPES, (None, torch.bool, torch.float16, torch.float64)):
        input, target = torch.randn(9, device=device).to(a), torch.randn(9, device=device).to(b)
        weight = None if w is None else torch.ones(9, dtype=w, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            ours, theirs = balanced_l1_loss(input, target, weight=weight), formula(input, target, weight=weight)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


@with_kernels
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"input": torch.zeros(3, dtype=torch.int64)}, TypeError),
        ({"target": torch.zeros(4)}, ValueError),
        ({"target": torch.zeros(3, device="meta")}, ValueError),
        ({"target": None}, TypeError),
        ({"weight": torch.zeros(2)}, ValueError),
        ({"weight": torch.zeros(2, 3)}, ValueError),
        ({"weight": 1.0}, TypeError),
        ({"alpha": 0.0}, ValueError),
        ({"gamma": math.nan}, ValueError),
        ({"alpha": 0.01}, ValueError),
        ({"beta": -1.0}, ValueError),
        ({"reduction": "max"}, ValueError),
    ],
)
def test_the_same_errors_without_kernels(device: str, arguments: dict, error: type[Exception]) -> None:
    def to_device(value):
        return value.to(device) if isinstance(value, Tensor) and not value.is_meta else value

    arguments = {name: to_device(value) for name, value in arguments.items()}
    arguments = {"input": torch.zeros(3, device=device), "target": torch.zeros(3, device=device)} | arguments
    messages = set()
    for function in (balanced_l1_loss, formula):
        with pytest.raises(error) as caught:
            function(**arguments)
        messages.add(str(caught.value))
    assert len(messages) == 1
