"""The detector that weights of mmdetection are of, as far as they tell, and the detector to load them into."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.ops import MultiScaleRoIAlign

from ...losses import BalancedL1Loss
from ...pyramid import BalancedFeaturePyramid
from ..apply import apply_libra
from ..backbones import backbone_by_name
from ..conventions import apply_conventions
from ..normalization import FrozenStatisticsBatchNorm2d
from ..pooling import settle_strides
from .classes import ANCHORS
from .first_version import LastPixelTransform, UnalignedMultiScaleRoIAlign
from .keys import to_torchvision
from .resizing import RoundingTransform

Detector = FasterRCNN | RetinaNet
_KINDS = {
    "bbox_head.retina_cls.weight": RetinaNet,
    "roi_head.mask_head.conv_logits.weight": MaskRCNN,
    "roi_head.bbox_head.fc_cls.weight": FasterRCNN,
}
# By blocks of the stages, and channels and groups of a convolution of the first; without bottlenecks, 0 groups.
_BACKBONES: dict[tuple[tuple[int, ...], int, int], str] = {
    ((2, 2, 2, 2), 64, 0): "resnet18",
    ((3, 4, 6, 3), 64, 0): "resnet34",
    ((3, 4, 6, 3), 64, 1): "resnet50",
    ((3, 4, 23, 3), 64, 1): "resnet101",
    ((3, 8, 36, 3), 64, 1): "resnet152",
    ((3, 4, 6, 3), 128, 32): "resnext50_32x4d",
    ((3, 4, 23, 3), 256, 32): "resnext101_32x8d",
    ((3, 4, 23, 3), 256, 64): "resnext101_64x4d",
}


@dataclass(frozen=True)
class Layout:
    """The parts of a detector.

    Attributes:
        kind: FasterRCNN, MaskRCNN or RetinaNet.
        backbone: torchvision's name of it.
        num_classes: background included.
        channels: of the levels of the pyramid.
        refine: of the balanced pyramid: ``"non_local"``, ``"conv"`` or ``"none"``; ``None`` without such a pyramid.
        has_path: whether there is the bottom-up path of PAFPN.
        p6_from: of a RetinaNet, ``"c5"`` or ``"p5"``.
        counts_last_pixel: whether the width of a box is that from its first to its last pixel, both counted, as in
            mmdetection 1: then the weights expect other anchors, RoIAlign, and the background as the first class.
    """

    kind: type
    backbone: str
    num_classes: int
    channels: int
    refine: str | None
    has_path: bool
    p6_from: str
    counts_last_pixel: bool

    @property
    def is_retinanet(self) -> bool:
        return self.kind is RetinaNet

    @property
    def has_background_first(self) -> bool:
        """Whether the first class is the background, as in torchvision."""
        return self.counts_last_pixel and not self.is_retinanet

    def __str__(self) -> str:
        libra = "" if self.refine is None else "Libra "
        return f"{libra}{self.kind.__name__} with {self.backbone}"

    @classmethod
    def of(cls, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> "Layout":
        """The layout of weights with the names of mmdetection 3.

        ``meta`` is what their checkpoint tells beside them, perhaps the version of mmdetection.

        Raises:
            ValueError: if these are the weights of something else.
        """
        kind = next((kind for key, kind in _KINDS.items() if key in state), None)
        if kind is None:
            known = [to_torchvision(is_retinanet) for is_retinanet in (False, True)]
            odd = next((key for key in state if not any(rename(key) for rename in known)), None)
            raise ValueError(
                "state_dict must hold the weights of mmdetection's Faster R-CNN, Mask R-CNN or RetinaNet, "
                + (f"got {odd!r}" if odd else f"and has none of {', '.join(map(repr, _KINDS))}")
            )
        has_list = any(key.startswith("neck.0.") for key in state)
        fpn = "neck.0" if has_list else "neck"
        lateral = _get(state, f"{fpn}.lateral_convs.0.conv.weight")
        if kind is RetinaNet:
            num_classes = _get(state, "bbox_head.retina_cls.weight").shape[0] // ANCHORS + 1
            from_c5 = _get(state, f"{fpn}.fpn_convs.3.conv.weight").shape[1] != lateral.shape[0]
            is_first = str(meta.get("mmdet_version", "")).startswith(("0.", "1."))
        else:
            num_classes = _get(state, "roi_head.bbox_head.fc_cls.weight").shape[0]
            from_c5 = False
            is_first = len(_get(state, "roi_head.bbox_head.fc_reg.weight")) == 4 * num_classes
        refinements = {"neck.1.refine.conv.weight": "conv", "neck.1.refine.g.conv.weight": "non_local"}
        refine = next((name for key, name in refinements.items() if key in state), "none" if has_list else None)
        return cls(
            kind=kind,
            backbone=_backbone(state),
            num_classes=num_classes,
            channels=lateral.shape[0],
            refine=refine,
            has_path=f"{fpn}.downsample_convs.0.conv.weight" in state,
            p6_from="c5" if from_c5 else "p5",
            counts_last_pixel=is_first,
        )

    def build(self) -> Any:
        """A detector of this layout, with the conventions and the losses that its weights were trained with."""
        finest_level = 3 if self.is_retinanet else 2
        backbone = backbone_by_name(
            self.backbone, None, False, 3, FrozenStatisticsBatchNorm2d, self.channels, finest_level
        )
        options = {"detections_per_img": 100} if self.is_retinanet else {}
        model = self.kind(backbone, self.num_classes, **options)
        is_libra = self.refine is not None
        loss = BalancedL1Loss if is_libra else nn.SmoothL1Loss
        parts: dict[str, Any] = {"box_loss": loss(beta=self.beta, reduction="sum"), "path_aggregation": self.has_path}
        refine_level = 1 if self.is_retinanet else 2
        parts["pyramid"] = is_libra and BalancedFeaturePyramid(
            self.channels, refine_level=refine_level, refine=None if self.refine == "none" else self.refine
        )
        if not self.is_retinanet:
            parts["sampler"] = is_libra
        apply_libra(model, **parts)
        conventions = self.conventions
        if not self.is_retinanet and self.rpn_beta == 0:
            conventions["rpn_box_loss"] = nn.L1Loss(reduction="sum")
        apply_conventions(model, **conventions)
        model.transform.__class__ = LastPixelTransform if self.counts_last_pixel else RoundingTransform
        if not self.is_retinanet:
            settle_strides(model)
            if self.counts_last_pixel:
                for pool in model.roi_heads.children():
                    if isinstance(pool, MultiScaleRoIAlign):
                        pool.__class__ = UnalignedMultiScaleRoIAlign
        return model.eval()

    @property
    def beta(self) -> float:
        """Of the box loss that the weights were trained with: balanced L1, smooth L1 or, where it is 0, L1."""
        if self.refine is None and not self.counts_last_pixel:
            return 0.0
        return 0.11 if self.is_retinanet else 1.0

    @property
    def rpn_beta(self) -> float:
        """The same of the RPN: smooth L1, or L1."""
        return 1 / 9 if self.counts_last_pixel else 0.0

    @property
    def conventions(self) -> dict[str, Any]:
        """Arguments of :func:`apply_conventions`, all but the RPN's loss: settings of the program, too."""
        options: dict[str, Any] = {"anchors": "centered" if self.counts_last_pixel else "exact"}
        if self.is_retinanet:
            return options | {"p6_from": self.p6_from, "p7_relu": False, "loss_normalizer": "batch"}
        if self.refine is not None:
            options["rpn_max_negatives_per_positive"] = 5
        if not self.counts_last_pixel:
            options |= {"roi_aligned": True, "roi_sampling_ratio": 0}
        return options


def _backbone(state: Mapping[str, Tensor]) -> str:
    blocks = tuple(
        len({key.split(".")[2] for key in state if key.startswith(f"backbone.layer{stage}.")}) for stage in range(1, 5)
    )
    channels, of_group = _get(state, "backbone.layer1.0.conv2.weight").shape[:2]
    groups = channels // of_group if "backbone.layer1.0.conv3.weight" in state else 0
    if (blocks, channels, groups) not in _BACKBONES:
        raise ValueError(
            f"state_dict must have a backbone among {', '.join(_BACKBONES.values())}, got one with {blocks} blocks, "
            f"{channels} channels and {groups or 'no'} groups of them in bottlenecks"
        )
    return _BACKBONES[blocks, channels, groups]


def _get(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f"state_dict must have {key!r}, and has not")
    return state[key]
