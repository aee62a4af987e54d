"""The images that a resize leaves nothing of, against torchvision's own transforms."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from balanced_learning.training.data.augmentation import augmentation, fault_when_resized

SIDES = st.integers(1, 60) | st.integers(1, 3000)


def faulty(width, height, min_size=64, max_size=96, policy="none"):
    widths, heights = torch.tensor([width]), torch.tensor([height])
    return bool(fault_when_resized(widths, heights, min_size=min_size, max_size=max_size, policy=policy))


def raises(transform, *arguments):
    try:
        transform(*arguments)
    except (RuntimeError, ValueError, ZeroDivisionError):
        return True
    return False


def detector_raises(width, height, min_size, max_size):
    detector = GeneralizedRCNNTransform(min_size, max_size, [0.0], [1.0])
    return raises(detector.resize, torch.empty(1, height, width))


@given(SIDES, SIDES, st.integers(1, 800), st.integers(1, 1333))
@example(20000, 50, 64, 96)
@example(50, 20000, 64, 96)
@example(49, 49, 1, 800)  # 49 * (1 / 49) is less than 1
@example(1, 49, 1, 49)  # and 49 / 49 is 1
@example(96, 1, 64, 96)
@example(97, 1, 64, 96)
def test_the_detector_raises_for_those_named_alone(width, height, min_size, max_size):
    expected = detector_raises(width, height, min_size, max_size)
    assert faulty(width, height, min_size, max_size) == faulty(width, height, min_size, max_size, "hflip") == expected
    assert faulty(width, height, min_size, max_size, "ssdlite") or not expected
    assert faulty(width, height, min_size, max_size, "ssd") or not expected


def sample(width, height):
    boxes = tv_tensors.BoundingBoxes([[0, 0, width, height]], format="XYXY", canvas_size=(height, width))
    image = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
    return image, {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}


@pytest.mark.parametrize("policy", ["multiscale", "lsj"])
@given(st.integers(1, 12), st.integers(1, 5000), st.booleans())
@example(1, 1333, False)
@example(2, 2667, True)
@example(1, 102, True)
@example(1, 103, True)
def test_policies_that_resize_raise_for_those_named_alone(policy, narrow, long, is_tall):
    width, height = (narrow, long) if is_tall else (long, narrow)
    resize = augmentation(policy).transforms[0]  # what follows shrinks nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", torch.zeros)  # the smallest jitter
        patch.setattr(torch, "randint", lambda *_: torch.tensor(0))  # and the shortest side
        assert faulty(width, height, policy=policy) == raises(resize, *sample(width, height))


@pytest.mark.parametrize("policy", ["ssd", "ssdlite"])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 40])
def test_a_crop_raises_for_heights_that_are_named(policy, height):
    crop = next(part for part in augmentation(policy).transforms if isinstance(part, v2.RandomIoUCrop))
    crop.options = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", torch.zeros)  # the smallest crop
        crop.trials = 1
        draws = iter([0])
        patch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(draws)]))
        divides_by_zero = False
        try:
            crop(*sample(40, height))
        except ZeroDivisionError:
            divides_by_zero = True
        except StopIteration:  # no crop was found, so it would draw again
            pass
    assert faulty(40, height, policy=policy) == divides_by_zero


@given(st.integers(1, 12), st.integers(1, 900), st.booleans())
def test_zooming_out_raises_for_none_but_those_named(narrow, long, is_tall):
    width, height = (narrow, long) if is_tall else (long, narrow)
    sizes = {
        (int(width * factor), int(height * factor))
        for factor in torch.linspace(1, 4, 200)[:-1]  # of torchvision's 1 to 4
    }
    expected = any(detector_raises(*size, 64, 96) for size in sizes)
    if expected and height > 3:
        assert faulty(width, height, policy="ssd")
    if not expected and height > 3 and faulty(width, height, policy="ssd"):
        almost = int(long * (narrow + 1) / narrow)
        assert detector_raises(*((narrow, almost) if is_tall else (almost, narrow)), 64, 96)


def test_zooming_out_may_make_a_strip_too_narrow():
    assert faulty(1, 60, policy="ssd")  # 1 x 119 at most
    assert not faulty(1, 60, policy="ssdlite")
    assert not faulty(1, 48, policy="ssd")


def test_millions_of_images_are_one_call():
    widths = torch.randint(1, 3000, (2_000_000,))
    faults = fault_when_resized(widths, widths.flip(0), min_size=800, max_size=1333, policy="multiscale")
    assert faults.shape == widths.shape
    assert faults.dtype == torch.bool
