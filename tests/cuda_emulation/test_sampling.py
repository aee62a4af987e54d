"""The CUDA kernels of the sampler, run on the CPU, draw what those for the CPU draw from the same seed."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from balanced_learning import _backend

pytestmark = pytest.mark.usefixtures("ops")

SIZES = (0, 1, 31, 33, 300, 1023, 1024, 1025, 2500)  # of an image; 1,024 boxes are a block's
KINDS = ("mixed", "positive", "negative", "ignored", "ties", "no overlap", "one ground truth", "not finite", "far")
Image = tuple[Tensor, Tensor, Tensor]


def make_image(size: int, kind: str, dtype: torch.dtype, ground_truths: int = 7) -> Image:
    """Labels, IoUs and matched indices."""
    labels = torch.randint(-20, 100, (size,)).clamp(min=-1)
    labels = torch.where(torch.rand(size) < 0.6, 0, labels)
    ious = torch.rand(size, dtype=dtype)
    matched = torch.randint(ground_truths, (size,))
    match kind:
        case "positive" | "negative" | "ignored":
            labels = torch.full_like(labels, {"positive": 3, "negative": 0, "ignored": -1}[kind])
        case "ties":
            ious = torch.randint(5, (size,)).to(dtype) / 4
        case "no overlap":
            ious = torch.zeros_like(ious)
        case "one ground truth":
            matched = torch.zeros_like(matched)
        case "not finite":
            strange = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-310], dtype=dtype)
            ious = torch.where(torch.rand(size) < 0.05, strange[torch.randint(5, (size,))], ious)
        case "far":
            matched = (matched - 3) << 60
    return labels, ious, matched


def make_settings(rng: random.Random) -> tuple:
    """Those of the op, from batch_size on."""
    batch = rng.choice([0, 1, 20, 64, 150])
    floor = rng.choice([0.0, 0.0, 0.1, 0.3])
    return (
        batch,
        rng.randint(0, batch),
        rng.random() < 0.5,
        rng.choice([1, 2, 3, 3, 8, 33, 200]),
        rng.choice([None, 0.5, floor + 0.1]),
        floor,
        rng.choice([0.0, 0.3, 1.0]),
        rng.choice([None, None, 0.0, 0.5, 3.0, 1e300]),
    )


def assert_draw_alike(images: list[Image], settings: tuple) -> None:
    arguments = (*map(list, zip(*images, strict=True)), torch.randint(2**63 - 1, ()), *settings)
    emulated = torch.ops.emulated.iou_balanced_sample(*arguments)
    references = [torch.ops.host] + [torch.ops.balanced_learning] * _backend.has_kernels(torch.device("cpu"))
    for reference in references:
        for ours, theirs in zip(emulated, reference.iou_balanced_sample(*arguments), strict=True):
            assert torch.equal(ours, theirs), f"{settings}, images of {[len(labels) for labels, *_ in images]}"


@pytest.mark.parametrize("kind", ["mixed", *(pytest.param(kind, marks=pytest.mark.many_threads) for kind in KINDS[1:])])
def test_draw_what_the_cpu_draws(kind):
    rng = random.Random(kind)
    for size, dtype in zip(SIZES, itertools.cycle([torch.float32, torch.float64]), strict=False):
        assert_draw_alike([make_image(size, kind, dtype)], make_settings(rng))


@pytest.mark.many_threads
@pytest.mark.parametrize("instance_balanced", [False, True])
def test_more_images_than_a_launch_takes(instance_balanced):
    images = [make_image(index * 13 % 90, KINDS[index % len(KINDS)], torch.float32) for index in range(50)]
    assert_draw_alike(images, (16, 6, instance_balanced, 3, None, 0.0, 0.0, None))


def test_large_image():
    image = make_image(40_000, "mixed", torch.float32, ground_truths=90)
    assert_draw_alike([image], (64, 16, True, 3, 0.5, 0.0, 0.0, None))


@pytest.mark.parametrize("instance_balanced", [False, True])
def test_most_boxes_of_an_image(instance_balanced):
    """Most threads propose a box that others propose, too."""
    image = make_image(130, "mixed", torch.float32)
    assert_draw_alike([image], (100, 30, instance_balanced, 3, 0.5, 0.1, 0.3, None))
