import math

import pytest
import torch
from torch import Tensor

from balanced_learning.detection.imbalance.cka import LinearCKA


def cka(*descriptions: Tensor, batch: int = 1000) -> Tensor:
    measure = LinearCKA()
    for part in torch.stack(descriptions, dim=1).split(batch):
        measure.add(part)
    return measure.result()


def by_loops(x: Tensor, y: Tensor) -> float:
    """Of the kernels of all pairs of positions, as the paper defines it: tr(KHLH), normalized."""

    def centered(z: Tensor) -> list[list[float]]:
        rows = (z - z.mean(dim=0)).tolist()
        return [[math.fsum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]

    def inner(a: list[list[float]], b: list[list[float]]) -> float:
        return math.fsum(p * q for s, t in zip(a, b, strict=True) for p, q in zip(s, t, strict=True))

    k, m = centered(x.double()), centered(y.double())
    return inner(k, m) / math.sqrt(inner(k, k) * inner(m, m))


@pytest.mark.parametrize("batch", [1000, 7])
def test_is_the_formula_of_the_paper(batch):
    x, noise = torch.randn(30, 4), torch.randn(30, 4)
    y = x @ torch.randn(4, 4) + noise + 3
    found = cka(x, y, noise, batch=batch)
    wanted = [[by_loops(a, b) for b in (x, y, noise)] for a in (x, y, noise)]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    assert 0.1 < found[0, 1] < 0.95


def test_rotation_scale_and_shift_of_channels_change_nothing():
    x, y = torch.randn(200, 6), torch.randn(200, 6)
    y = x + y
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    found = cka(x, 100 * y @ rotation - 5, x @ rotation / 7)
    torch.testing.assert_close(found[0, 1], cka(x, y)[0, 1])
    assert found[0, 2] == pytest.approx(1, abs=1e-6)
    cosine = torch.cosine_similarity(x, x @ rotation, dim=1).mean()
    assert cosine < 0.9  # which compares channel by channel


def test_independent_channels_are_alike_by_chance_alone():
    found = cka(torch.randn(4000, 8), torch.randn(4000, 8))
    assert found[0, 1] < 0.005
    assert found.diagonal().tolist() == pytest.approx([1, 1])


def test_small_differences_on_a_large_mean_count():
    x = torch.randn(500, 3, dtype=torch.float64)
    torch.testing.assert_close(cka(x, x + 1e6), torch.ones(2, 2))


def test_what_is_the_same_everywhere_is_like_nothing():
    found = cka(torch.randn(10, 2), torch.full((10, 2), 0.1))
    assert found[0, 0] == pytest.approx(1)
    assert found[0, 1].isnan()
    assert found[1].isnan().all()


def test_no_positions_add_nothing():
    measure = LinearCKA()
    measure.add(torch.zeros(0, 2, 3))
    assert measure.result().shape == (0, 0)
