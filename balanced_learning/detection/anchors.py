"""Anchors that know the size of their image, and anchors at the strides of the backbone."""

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

Size = tuple[int, int]


class Anchors(list[Tensor]):
    """The anchors of a batch, as torchvision returns them: a tensor [A, 4] an image, xyxy in pixels.

    Attributes:
        image_sizes (list[tuple[int, int]]): height and width of each image, without what it was padded with.
    """

    def __init__(self, anchors: list[Tensor], image_sizes: list[Size]) -> None:
        super().__init__(anchors)
        self.image_sizes = image_sizes


class SizedAnchorGenerator(AnchorGenerator):
    """:class:`torchvision.models.detection.anchor_utils.AnchorGenerator` that returns :class:`Anchors`."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> Anchors:
        return Anchors(super().forward(image_list, feature_maps), image_list.image_sizes)


class FixedStrideAnchorGenerator(AnchorGenerator):
    """Anchors at multiples of the stride of their level, where torchvision divides the padded size by that of the map.

    The two differ where a map has a row or column for what is less than a stride: of 800 pixels, those of stride 64
    have 13, and torchvision places the anchors 800 // 13 = 61 pixels apart. As there, they are centered on the
    multiples, unless ``centered`` puts them between.

    Args:
        sizes (list[tuple[float, ...]]): of each level, the square roots of the areas.
        aspect_ratios (list[tuple[float, ...]]): of each level, height by width.
        strides (list[int]): of each level, in pixels.
        rounded (bool): whether the corners of an anchor around the origin are rounded, as torchvision's.
        centered (bool): whether anchors are centered in the cells of their stride, corners rounded there, as in
            mmdetection 1: which counted the last pixel of a box in, so that its corners were others.

    Example:
        >>> generator = FixedStrideAnchorGenerator([(8,)], [(2.0,)], [4], rounded=False)
        >>> generator(ImageList(torch.zeros(1, 3, 4, 8), [(4, 8)]), [torch.zeros(1, 1, 1, 2)])
        [tensor([[-2.8284, -5.6569,  2.8284,  5.6569],
                [ 1.1716, -5.6569,  6.8284,  5.6569]])]
    """

    def __init__(
        self,
        sizes: list[tuple[float, ...]],
        aspect_ratios: list[tuple[float, ...]],
        strides: list[int],
        rounded: bool = True,
        centered: bool = False,
    ) -> None:
        super().__init__(sizes, aspect_ratios)
        self.strides = strides
        self.rounded = rounded
        self.centered = centered
        if centered or not rounded:
            self.cell_anchors = [_cell(*level) for level in zip(sizes, aspect_ratios, strict=True)]
        if centered:
            self.cell_anchors = [
                (cell + stride / 2).round() for cell, stride in zip(self.cell_anchors, strides, strict=True)
            ]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> Anchors:
        """The same tensor for each image.

        Raises:
            ValueError: if a map is not as large as its stride says.
        """
        grid_sizes = [list(level.shape[-2:]) for level in feature_maps]
        padded = image_list.tensors.shape[-2:]
        for number, (grid, stride) in enumerate(zip(grid_sizes, self.strides, strict=True)):
            if any(abs(cells * stride - pixels) >= stride for cells, pixels in zip(grid, padded, strict=True)):
                raise ValueError(
                    f"level {number} must be of stride {stride}, got a map of {grid[0]} x {grid[1]} for images padded "
                    f"to {padded[0]} x {padded[1]}"
                )
        dtype = torch.promote_types(feature_maps[0].dtype, torch.float32)  # half types would round the corners
        self.set_cell_anchors(dtype, feature_maps[0].device)
        anchors = torch.cat(self.grid_anchors(grid_sizes, [[stride, stride] for stride in self.strides]))
        return Anchors([anchors] * len(image_list.image_sizes), image_list.image_sizes)

    def extra_repr(self) -> str:
        return (
            f"sizes={self.sizes}, aspect_ratios={self.aspect_ratios}, strides={self.strides}, "
            f"rounded={self.rounded}, centered={self.centered}"
        )


def _cell(sizes: tuple[float, ...], aspect_ratios: tuple[float, ...]) -> Tensor:
    """The anchors around the origin, size by size for each ratio. [sizes x ratios, 4]"""
    heights = torch.tensor(aspect_ratios, dtype=torch.float64).sqrt()[:, None] * torch.tensor(sizes)
    widths = torch.tensor(sizes) / torch.tensor(aspect_ratios, dtype=torch.float64).sqrt()[:, None]
    return (torch.stack([-widths, -heights, widths, heights], dim=-1).flatten(0, 1) / 2).float()


def whole_octaves(sizes: tuple[float, ...]) -> tuple[float, ...]:
    """The sizes s, s 2^(1/3), s 2^(2/3) of a RetinaNet's level, where torchvision has cut them to whole numbers.

    Other sizes stay as they are.

    Example:
        >>> [round(size, 3) for size in whole_octaves((32, 40, 50))]
        [32.0, 40.317, 50.797]
    """
    octave = tuple(sizes[0] * 2 ** (third / 3) for third in range(3))
    return octave if tuple(map(int, octave)) == tuple(sizes) else tuple(sizes)


def reaches_beyond(anchors: Tensor, size: Size, border: int) -> Tensor:
    """Whether an anchor [A, 4] reaches more than ``border`` pixels beyond an image of this height and width. [A]"""
    height, width = size
    x1, y1, x2, y2 = anchors.float().unbind(dim=1)
    return (x1 < -border) | (y1 < -border) | (x2 > width + border) | (y2 > height + border)
