"""The transform of detectors that resizes first: torchvision's, but for rounding."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from balanced_learning.training.transform import ResizingFirst

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def transforms(**options):
    sizes = {"min_size": 64, "max_size": 100, "image_mean": MEAN, "image_std": STD, **options}
    return GeneralizedRCNNTransform(**sizes), ResizingFirst(**sizes)


def batch(*sizes):
    images = [torch.rand(height, width, 3).permute(2, 0, 1) for height, width in sizes]
    return images, [{"boxes": torch.rand(n, 4), "labels": torch.arange(n)} for n in range(len(images))]


@pytest.mark.parametrize(
    "sizes", [[(120, 150)], [(30, 33)], [(120, 90), (64, 64), (300, 31)]], ids=["smaller", "larger", "mixed"]
)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"_skip_resize": True}, {"size_divisible": 7}, {"fixed_size": (48, 72)}], ids=str
)
def test_it_agrees_with_torchvisions(sizes, is_training, options):
    images, targets = batch(*sizes)
    (expected, expected_targets), (found, found_targets) = (
        transform.train(is_training)(images, targets) for transform in transforms(**options)
    )
    assert_close(found.tensors, expected.tensors, rtol=0, atol=3e-6)
    assert found.tensors.is_contiguous() == expected.tensors.is_contiguous()
    assert found.image_sizes == expected.image_sizes
    assert_close(found_targets, expected_targets, rtol=0, atol=0)


def test_what_is_padded_is_zero_and_no_image_is_changed():
    images, _ = batch((40, 64), (64, 40))
    before = [image.clone() for image in images]
    _, transform = transforms(_skip_resize=True)
    tensors = transform.train()(images)[0].tensors
    assert tensors[0, :, 40:].abs().sum() == tensors[1, :, :, 40:].abs().sum() == 0
    assert_close(images, before, rtol=0, atol=0)


def test_gradients_reach_the_images():
    image = torch.rand(3, 50, 70, requires_grad=True)
    gradients = []
    for transform in transforms():
        (gradient,) = torch.autograd.grad(transform([image])[0].tensors.square().sum(), image)
        gradients.append(gradient)
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_whole_numbers_are_refused_as_torchvision_refuses_them():
    for transform in transforms():
        with pytest.raises(TypeError, match="floating type"):
            transform([torch.zeros(3, 64, 64, dtype=torch.uint8)])


@pytest.mark.filterwarnings("ignore")
def test_it_can_be_scripted_and_traced():
    images, _ = batch((120, 150), (90, 70))
    _, transform = transforms()
    transform.eval()
    expected = transform(images)[0].tensors
    scripted = torch.jit.script(transform)
    assert_close(scripted(images)[0].tensors, expected, rtol=0, atol=1e-6)

    class Tensors(torch.nn.Module):
        def forward(self, image):
            return transform([image])[0].tensors

    traced = torch.jit.trace(Tensors(), images[0])
    assert_close(traced(images[0]), Tensors()(images[0]), rtol=0, atol=1e-6)
