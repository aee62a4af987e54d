"""RoIAlign without the shift of half a pixel that torchvision's detectors have."""

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.ops import MultiScaleRoIAlign, roi_align


class AlignedMultiScaleRoIAlign(MultiScaleRoIAlign):
    """:class:`torchvision.ops.MultiScaleRoIAlign` with :func:`torchvision.ops.roi_align`'s ``aligned=True``.

    Arguments, attributes and the choice of a box's level are the same. A ``sampling_ratio`` of 0 takes as many points
    of a bin as it has pixels, rounded up.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        if self.scales is None or self.map_levels is None:
            super().forward(x, [boxes[0][:0]], image_shapes)  # which finds the scales
        maps = [level for name, level in x.items() if name in self.featmap_names]
        images = torch.cat([torch.full_like(image[:, :1], i) for i, image in enumerate(boxes)])
        rois = torch.cat([images, torch.cat(boxes)], dim=1)  # [R, 5]
        level_of = self.map_levels(boxes)
        places = [torch.where(level_of == level)[0] for level in range(len(maps))]
        pooled = [
            roi_align(level, rois[place], self.output_size, scale, self.sampling_ratio, aligned=True)
            for level, place, scale in zip(maps, places, self.scales, strict=True)
        ]
        return torch.cat(pooled)[torch.cat(places).argsort()]


def settle_strides(model: FasterRCNN) -> None:
    """Lets the poolers of a detector see their levels, from P2 on, of an image.

    They take the strides of the levels from the first batch they see and keep them, though no checkpoint does; and from
    small, padded images they take wrong ones.
    """
    size = 256
    for pool in model.roi_heads.children():
        if isinstance(pool, MultiScaleRoIAlign):
            with torch.device("cpu"):  # a model may be made without memory
                sides = {name: size >> level for level, name in enumerate(pool.featmap_names, 2)}
                maps = {name: torch.zeros(1, 1, side, side) for name, side in sides.items()}
                pool(maps, [torch.zeros(0, 4)], [(size, size)])
