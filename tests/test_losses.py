import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from balanced_learning import BalancedL1Loss, balanced_l1_loss
from tests.reference.balanced_l1 import paper

pytestmark = pytest.mark.usefixtures("implementation")

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BETAS = [0.11, 1 / 9, 1.0, 2.0]
PARAMETERS = [  # alpha, gamma, beta
    (0.5, 1.5, 1.0),
    (0.5, 1.5, 0.11),
    (0.2, 1.0, 1 / 9),
    (1.0, 0.5, 2.0),
    (0.02, 1.5, 1.0),
    (1e5, 1.0, 0.3),
]


def errors_of(x: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    """Loss and gradient of each error in x."""
    x = x.detach().requires_grad_()
    loss = balanced_l1_loss(x, torch.zeros_like(x), **kwargs, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


LAYOUTS = {
    "contiguous": lambda make: (make(3, 5), make(3, 5)),
    "strided": lambda make: (make(6, 10)[::2, ::2], make(5, 3).T),
    "expanded": lambda make: (make(3, 1).expand(3, 5), make(3, 5)),
    "broadcast": lambda make: (make(3, 1), make(2, 1, 5)),
    "0-dim": lambda make: (make(), make()),
    "empty": lambda make: (make(0, 4), make(0, 4)),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("alpha", "gamma", "beta"), [(0.5, 1.5, 1.0), (0.2, 1.0, 0.11)])
def test_value_and_gradients_follow_the_paper(layout, dtype, alpha, gamma, beta, device):
    input, target = LAYOUTS[layout](lambda *shape: torch.randn(shape, dtype=dtype).to(device).requires_grad_())
    loss = balanced_l1_loss(input, target, alpha=alpha, gamma=gamma, beta=beta, reduction="none")
    upstream = torch.randn(loss.shape).to(loss)
    gradients = torch.autograd.grad(loss, (input, target), upstream)

    value, slope = paper(input.double() - target.double(), alpha, gamma, beta)
    gradient = upstream.double().cpu() * slope
    eps = torch.finfo(dtype).eps
    tolerance = {"rtol": 4 * eps, "atol": 16 * eps}
    torch.testing.assert_close(loss.double().cpu(), value, **tolerance)
    torch.testing.assert_close(gradients[0].double().cpu(), gradient.sum_to_size(input.shape), **tolerance)
    torch.testing.assert_close(gradients[1].double().cpu(), -gradient.sum_to_size(target.shape), **tolerance)


@given(
    alpha=st.floats(0.02, 10),
    ratio=st.floats(0.01, 80),
    beta=st.floats(0.01, 10),
    errors=st.lists(st.floats(-100, 100).map(lambda x: round(x, 15)), max_size=8),
)
def test_any_parameters_follow_the_paper(alpha, ratio, beta, errors):
    gamma = alpha * ratio * (1 - 1e-12)
    x = torch.tensor(errors, dtype=torch.float64)
    loss, gradient = errors_of(x, alpha=alpha, gamma=gamma, beta=beta)
    value, slope = paper(x, alpha, gamma, beta)
    torch.testing.assert_close(loss, value, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-11, atol=0)


@pytest.mark.parametrize(("alpha", "gamma", "beta"), PARAMETERS)
def test_float32_is_accurate_over_14_orders_of_magnitude(alpha, gamma, beta):
    near_beta = beta * torch.linspace(0.5, 1.5, 101)
    x = torch.cat([torch.logspace(-8, 6, 1000), near_beta])
    loss, gradient = errors_of(x, alpha=alpha, gamma=gamma, beta=beta)
    value, slope = paper(x, alpha, gamma, beta)
    torch.testing.assert_close(loss.double(), value, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("alpha", "gamma", "constant", "at_1", "slope_over_x_at_0", "slope_at_0_1", "slope_at_0_5"),
    [
        (0.2, 1.0, -0.19322, 0.80678, 29.48, 0.551, 0.863),
        (0.3, 1.0, -0.26301, 0.73699, 8.11, 0.393, 0.803),
        (0.5, 1.0, -0.34348, 0.65652, 3.19, 0.247, 0.717),
        (0.5, 1.5, -0.42141, 1.07859, 9.54, 0.534, 1.178),
        (0.5, 2.0, -0.46269, 1.53731, 26.80, 0.925, 1.663),
    ],
)
def test_known_values(alpha, gamma, constant, at_1, slope_over_x_at_0, slope_at_0_1, slope_at_0_5):
    x = torch.tensor([1e-7, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    loss, gradient = errors_of(x, alpha=alpha, gamma=gamma)
    assert loss[3:].tolist() == pytest.approx([at_1, 3 * gamma + constant], abs=6e-6)
    assert gradient[0].item() / 1e-7 == pytest.approx(slope_over_x_at_0, abs=6e-3)
    assert gradient[1:].tolist() == pytest.approx([slope_at_0_1, slope_at_0_5, gamma, gamma], abs=6e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_slope_is_0_at_0_rises_to_gamma_at_beta_and_never_jumps(beta):
    x = torch.tensor([0, 1e-12, beta * (1 - 1e-9), beta, beta * (1 + 1e-9)], dtype=torch.float64)
    _, gradient = errors_of(x, beta=beta)
    assert gradient.tolist() == pytest.approx([0, 0, 1.5, 1.5, 1.5], abs=1e-8)

    rising = errors_of(torch.linspace(0, 2 * beta, 1001, dtype=torch.float64), beta=beta)[1].diff()
    assert (rising >= 0).all()
    assert rising.max() < 0.02 * 1.5


@pytest.mark.parametrize("beta", BETAS)
def test_infinite_alpha_with_gamma_1_is_smooth_l1(beta):
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    loss, gradient = errors_of(x, alpha=1e8, gamma=1.0, beta=beta)
    y = x.clone().requires_grad_()
    expected = F.smooth_l1_loss(y, torch.zeros_like(y), beta=beta, reduction="none")
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-7)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), y)[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_is_differentiable_twice(reduction, weighted):
    input = torch.tensor([[-3.0, -0.5, -0.01], [0.02, 0.3, 2.0]], dtype=torch.float64, requires_grad=True)
    target = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.5], [2.0]], dtype=torch.float64, requires_grad=True)

    def loss(input, target, weight=None):
        return balanced_l1_loss(input, target, weight=weight, beta=0.9, reduction=reduction)

    tensors = (input, target, weight) if weighted else (input, target)
    assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradgradcheck(loss, tensors)


def test_curvature_at_0_is_that_around_it():
    x = torch.tensor([-1e-9, 0.0, 1e-9], dtype=torch.float64, requires_grad=True)
    loss = balanced_l1_loss(x, torch.zeros_like(x), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), x)
    assert curvature.tolist() == pytest.approx([9.5428] * 3, rel=1e-4)  # alpha b / beta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("alpha", "gamma", "beta"), PARAMETERS)
def test_no_16_bit_error_gives_a_nan_or_a_negative_loss(dtype, alpha, gamma, beta):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    loss, gradient = errors_of(x, alpha=alpha, gamma=gamma, beta=beta)
    assert (loss >= 0).all()
    assert (gradient.sign() * x.sign() >= 0).all()
    assert gradient.abs().max() == torch.tensor(gamma, dtype=dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("input_dtype", "target_dtype"), list(itertools.product(FLOATS, FLOATS)))
def test_result_type_is_that_of_smooth_l1_loss(input_dtype, target_dtype, autocast):
    input, target = torch.zeros(3, dtype=input_dtype), torch.zeros(3, dtype=target_dtype)
    with torch.autocast("cpu", enabled=autocast):
        for reduction in ("none", "mean", "sum"):
            expected = F.smooth_l1_loss(input, target, reduction=reduction).dtype
            assert balanced_l1_loss(input, target, reduction=reduction).dtype == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_float32_of_float32_precision(dtype):
    input = torch.rand(100).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = balanced_l1_loss(input, torch.zeros_like(input), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(paper(input)[0].sum().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mean_of_16_bit_errors_is_accumulated_in_float32(dtype):
    ones = torch.ones(200_000, dtype=dtype)  # the sum overflows float16, and stalls at 256 in bfloat16
    loss = balanced_l1_loss(ones, torch.zeros_like(ones))
    assert loss.item() == pytest.approx(1.07859, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("weight_shape", [(3, 4), (4,), (3, 1), ()])
def test_weight_multiplies_each_element_before_the_reduction(weight_shape):
    input, target, weight = torch.randn(3, 1), torch.randn(4), torch.rand(weight_shape)
    expected = paper(input - target)[0].float() * weight
    for reduction, reduced in [("none", expected), ("mean", expected.mean()), ("sum", expected.sum())]:
        loss = balanced_l1_loss(input, target, weight=weight, reduction=reduction)
        torch.testing.assert_close(loss, reduced, rtol=1e-5, atol=1e-6)


def test_mean_is_the_default_reduction():
    input, target = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(balanced_l1_loss(input, target), paper(input - target)[0].mean().float())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_costs_0_and_can_be_differentiated(reduction):
    input = torch.zeros(0, 4, requires_grad=True)
    loss = balanced_l1_loss(input, torch.zeros(0, 4), weight=torch.zeros(0, 1), reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert input.grad.shape == (0, 4)


def test_nan_and_infinity_propagate_and_stay_where_they_are():
    loss, gradient = errors_of(torch.tensor([math.nan, math.inf, -math.inf, 2.0]))
    torch.testing.assert_close(loss, torch.tensor([math.nan, math.inf, math.inf, 2.57859]), equal_nan=True)
    torch.testing.assert_close(gradient[1:], torch.tensor([1.5, -1.5, 1.5]))
    assert balanced_l1_loss(torch.tensor([math.nan, 1.0]), torch.zeros(2)).isnan()


def test_a_nan_error_has_a_nan_gradient():
    assert errors_of(torch.tensor([math.nan]))[1].isnan()  # a gradient scaler sees nothing else


@given(
    input_shape=st.lists(st.integers(0, 3), max_size=3),
    ones=st.lists(st.booleans(), min_size=3, max_size=3),
    dropped=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_broadcasts_as_smooth_l1_and_input_and_target_can_be_swapped(input_shape, ones, dropped, seed):
    torch.manual_seed(seed)
    target_shape = [1 if one else size for size, one in zip(input_shape, ones, strict=False)][dropped:]
    input, target = torch.randn(input_shape, requires_grad=True), torch.randn(target_shape, requires_grad=True)
    loss, swapped = (balanced_l1_loss(*pair, reduction="none") for pair in ((input, target), (target, input)))
    assert loss.shape == torch.broadcast_shapes(input.shape, target.shape)
    assert torch.equal(loss, swapped)
    gradients, swapped_gradients = (torch.autograd.grad(x.sum(), (input, target)) for x in (loss, swapped))
    assert all(map(torch.equal, gradients, swapped_gradients))


@pytest.mark.parametrize("arguments", [{}, {"alpha": 0.3, "gamma": 1.0, "beta": 0.11, "reduction": "sum"}])
def test_module_is_the_function(arguments):
    input, target, weight = torch.randn(3, 4, 5).unbind()
    module = BalancedL1Loss(**arguments)
    assert torch.equal(module(input, target), balanced_l1_loss(input, target, **arguments))
    assert torch.equal(module(input, target, weight), balanced_l1_loss(input, target, weight=weight, **arguments))


def test_module_shows_its_settings():
    expected = "BalancedL1Loss(alpha=0.5, gamma=1.5, beta=0.11, reduction='sum')"
    assert repr(BalancedL1Loss(0.5, 1.5, 0.11, "sum")) == expected


def test_compiles_without_a_graph_break():
    module = BalancedL1Loss(beta=0.11)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    tensors = [t.requires_grad_() for t in torch.randn(3, 4, 5).unbind()]
    expected, loss = module(*tensors), compiled(*tensors)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors))


def test_vmap_gives_each_row_its_loss_and_gradient():
    input, target = torch.randn(2, 3, 4).unbind()

    def loss(input, target):
        return balanced_l1_loss(input, target, beta=0.5)

    gradient, value = torch.func.vmap(torch.func.grad_and_value(loss))(input, target)
    for row in range(3):
        x = input[row].clone().requires_grad_()
        expected = loss(x, target[row])
        torch.testing.assert_close(value[row], expected.detach())
        torch.testing.assert_close(gradient[row], torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize(
    ("argument", "value"),
    [*itertools.product(["alpha", "gamma", "beta"], [0.0, -1.0, math.inf, math.nan]), ("reduction", "average")],
)
def test_wrong_setting_is_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must .*, got '?{value}"):
        balanced_l1_loss(torch.zeros(1), torch.zeros(1), **{argument: value})
    with pytest.raises(ValueError, match=f"{argument} must .*, got '?{value}"):
        BalancedL1Loss(**{argument: value})


@pytest.mark.parametrize(
    "settings",
    [
        *({"alpha": 0.01}, {"beta": 1e-38}, {"beta": 2e38}, {"gamma": 1e39, "alpha": 2e37}, {"alpha": 2e19}),
        {"gamma": 1e-320, "alpha": 1e10},  # whose ratio is 0
    ],
)
def test_settings_beyond_float32_are_named(settings):
    words = ", ".join(
        f"{name}={value}" for name, value in ({"gamma": 1.5, "alpha": 0.5, "beta": 1.0} | settings).items()
    )
    with pytest.raises(ValueError, match=f"gamma / alpha must .* b / beta and .* got {re.escape(words)}"):
        balanced_l1_loss(torch.zeros(1), torch.zeros(1), **settings)


@pytest.mark.parametrize("settings", [{"alpha": 1e19}, {"gamma": 40.0}, {"beta": 1e38}, {"beta": 2e-37}])
def test_settings_at_the_limits_are_computed(settings):
    x = torch.tensor([0.0, 1e-3, 0.5, 1.0, 2.0])
    values, gradients = paper(x, **({"alpha": 0.5, "gamma": 1.5, "beta": 1.0} | settings))
    loss, gradient = errors_of(x, **settings)
    torch.testing.assert_close(loss.double(), values, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(gradient.double(), gradients, rtol=1e-5, atol=0)


FLOAT, INT, META = torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.zeros(3, device="meta")


@pytest.mark.parametrize(
    ("input", "target", "weight", "error", "message"),
    [
        (FLOAT, torch.zeros(4), None, ValueError, "target must broadcast with input of shape (3,), got (4,)"),
        (FLOAT, FLOAT, torch.zeros(4), ValueError, "weight must be broadcastable to shape (3,), got (4,)"),
        (FLOAT, FLOAT, torch.zeros(2, 3), ValueError, "weight must be broadcastable to shape (3,), got (2, 3)"),
        (FLOAT, META, None, ValueError, "target must be on the device of input, cpu, got meta"),
        (FLOAT, FLOAT, META, ValueError, "weight must be on the device of input, cpu, got meta"),
        (INT, FLOAT, None, TypeError, "input must be of a floating-point type, got torch.int64"),
        (FLOAT, INT, None, TypeError, "target must be of a floating-point type, got torch.int64"),
        ([0.0], FLOAT, None, TypeError, "input must be a tensor, got list"),
        (FLOAT, 0.0, None, TypeError, "target must be a tensor, got float"),
        (FLOAT, FLOAT, 2.0, TypeError, "weight must be a tensor, got float"),
    ],
)
def test_wrong_tensor_is_named(input, target, weight, error, message):
    with pytest.raises(error, match=re.escape(message)):
        balanced_l1_loss(input, target, weight=weight)
