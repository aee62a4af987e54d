"""The small detectors and images that the detection tests share."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

CHANNELS, NUM_CLASSES = 32, 5


@pytest.fixture(scope="session", params=["fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet"])
def kind(request) -> str:
    return request.param


@pytest.fixture(params=["fasterrcnn", "retinanet"])
def basic_kind(request) -> str:
    return request.param


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def build() -> Callable[..., nn.Module]:
    """A stock torchvision detector: ``build(kind, levels, **arguments)``, always with the same weights."""
    return _build


def _build(kind: str, levels: str | None = None, **arguments) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = _backbone(levels or ("P3-P7" if kind == "retinanet" else "P2-P6"))
        arguments = {"min_size": 96, "max_size": 128} | arguments
        if kind == "retinanet":
            return RetinaNet(backbone, NUM_CLASSES, **{"score_thresh": 0.0} | arguments)
        small = {
            "box_head": TwoMLPHead(CHANNELS * 7 * 7, 16),
            "box_predictor": FastRCNNPredictor(16, NUM_CLASSES),
            "box_batch_size_per_image": 64,
            "rpn_pre_nms_top_n_train": 200,
            "rpn_pre_nms_top_n_test": 200,
        }
        if kind == "maskrcnn":
            small |= {
                "mask_head": MaskRCNNHeads(CHANNELS, (8,), 1),
                "mask_predictor": MaskRCNNPredictor(8, 8, NUM_CLASSES),
            }
        elif kind == "keypointrcnn":
            small |= {
                "keypoint_head": KeypointRCNNHeads(CHANNELS, (8,)),
                "keypoint_predictor": KeypointRCNNPredictor(8, 17),
            }
        cls = {"fasterrcnn": FasterRCNN, "maskrcnn": MaskRCNN, "keypointrcnn": KeypointRCNN}[kind]
        return cls(backbone, **small | arguments)


def _backbone(levels: str) -> nn.Module:
    finest, coarsest = int(levels[1]), int(levels[-1])
    stages = range(finest - 1, 5)
    return BackboneWithFPN(
        ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d),
        {f"layer{stage}": str(i) for i, stage in enumerate(stages)},
        [32 * 2**stage for stage in stages],
        CHANNELS,
        extra_blocks=LastLevelP6P7(CHANNELS, CHANNELS) if coarsest == 7 else LastLevelMaxPool(),
    )


@pytest.fixture(scope="session")
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for size in ((96, 128), (128, 96), (96, 96))]


@pytest.fixture(scope="session")
def targets(images) -> list[dict[str, Tensor]]:
    """Four boxes in the first image, none in the second, one in the third; masks and keypoints for who wants them."""
    boxes = [[[8, 8, 60, 72], [16, 20, 70, 84], [80, 30, 120, 90], [100, 4, 120, 24]], [], [[10, 30, 90, 80]]]
    return [_target(torch.tensor(b, dtype=torch.float32).reshape(-1, 4), i) for b, i in zip(boxes, images, strict=True)]


@pytest.fixture(scope="session")
def empty_targets(images) -> list[dict[str, Tensor]]:
    return [_target(torch.zeros(0, 4), image) for image in images]


@pytest.fixture(scope="session")
def train_step(images) -> Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Losses and gradients of one step on the images, from one seed."""

    def step(model: nn.Module, targets: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            losses = model.train()(images, targets)
        model.zero_grad()
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: loss.detach() for name, loss in losses.items()}, gradients

    return step


@pytest.fixture(scope="session")
def detect(images) -> Callable[[nn.Module], list[dict[str, Tensor]]]:
    @torch.no_grad()
    def detections(model: nn.Module) -> list[dict[str, Tensor]]:
        return model.eval()(images)

    return detections


def _target(boxes: Tensor, image: Tensor) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), *image.shape[1:], dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    keypoints = torch.cat([centers, torch.ones(len(boxes), 1)], dim=1)
    return {
        "boxes": boxes,
        "labels": 1 + torch.arange(len(boxes)) % (NUM_CLASSES - 1),
        "masks": masks,
        "keypoints": keypoints[:, None].repeat(1, 17, 1),
    }
