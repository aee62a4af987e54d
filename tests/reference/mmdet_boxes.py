"""What mmdetection does with images and boxes: resizing, anchors, decoding, suppression, RoIAlign.

``legacy`` is mmdetection 1, with corners that are pixels inside the box, so that widths are x2 - x1 + 1. All formulas
compute in the type of their inputs. They were compared with the code of mmdetection 3.3.0 and, for ``legacy``, read
off that of 1.x.
"""

import math

import torch
from torch import Tensor

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def resized_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Size of the largest image of this shape within ``scale``, (longest, shortest) side, rounded."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def preprocess(image: Tensor, scale: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The padded batch of one image in [0, 1], [3, H, W], and the size of the image in it."""
    size = resized_size(*image.shape[1:], scale)
    rows, columns = (_bilinear(before, after, image) for before, after in zip(image.shape[1:], size, strict=True))
    pixels = torch.einsum("yh,chw,xw->cyx", rows, 255 * image, columns)
    mean, std = (image.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    padded = image.new_zeros(3, *(math.ceil(side / 32) * 32 for side in size))
    padded[:, : size[0], : size[1]] = (pixels - mean) / std
    return padded[None], size


def _bilinear(before: int, after: int, like: Tensor) -> Tensor:
    """[after, before]: weights of the two pixels about each new pixel's centre."""
    weights = like.new_zeros(after, before)
    for i in range(after):
        position = min(max((i + 0.5) * before / after - 0.5, 0), before - 1)
        low = min(int(position), before - 2)
        weights[i, low] += 1 - (position - low)
        weights[i, low + 1] += position - low
    return weights


def anchors(
    grid: tuple[int, int], stride: int, scales: list[float], *, legacy: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[H * W * A, 4] of a level, place by place in rows, at each by ratio and then by scale."""
    result = []
    for y in range(grid[0]):
        for x in range(grid[1]):
            for ratio in (0.5, 1.0, 2.0):
                for scale in scales:
                    w, h = stride * scale / math.sqrt(ratio), stride * scale * math.sqrt(ratio)
                    result.append(_anchor(x * stride, y * stride, w, h, (stride - 1) / 2 if legacy else None))
    return torch.tensor(result, dtype=dtype)


def _anchor(x: float, y: float, w: float, h: float, offset: float | None) -> list[float]:
    if offset is None:
        return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    inside = [offset - (w - 1) / 2, offset - (h - 1) / 2, offset + (w - 1) / 2, offset + (h - 1) / 2]
    return [shift + round(value) for shift, value in zip((x, y, x, y), inside, strict=True)]


def decode(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...], size: tuple[int, int], *, legacy=False) -> Tensor:
    """Boxes [N, K, 4] that the deltas [N, K, 4] make of the boxes [N, 4], in an image of ``size``."""
    one = float(legacy)
    x1, y1, x2, y2 = boxes[:, None].unbind(-1)
    dx, dy, dw, dh = (deltas * deltas.new_tensor(stds)).unbind(-1)
    limit = math.log(1000 / 16)
    w, h = x2 - x1 + one, y2 - y1 + one
    cx, cy = (x1 + x2) / 2 + w * dx, (y1 + y2) / 2 + h * dy
    w, h = w * dw.clamp(-limit, limit).exp(), h * dh.clamp(-limit, limit).exp()
    corners = [cx - (w - one) / 2, cy - (h - one) / 2, cx + (w - one) / 2, cy + (h - one) / 2]
    bounds = [size[1] - one, size[0] - one] * 2
    return torch.stack([side.clamp(0, bound) for side, bound in zip(corners, bounds, strict=True)], dim=-1)


def kept(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, *, legacy=False) -> Tensor:
    """Indices that non-maximum suppression in each group leaves, best score first."""
    one = float(legacy)
    order, result = scores.argsort(descending=True, stable=True), []
    for group in groups.unique():
        left = order[groups[order] == group]
        while len(left):
            best, left = left[:1], left[1:]
            result.append(best)
            first, rest = boxes[best], boxes[left]
            sides = torch.minimum(first[:, 2:], rest[:, 2:]) - torch.maximum(first[:, :2], rest[:, :2]) + one
            overlap = sides.clamp(min=0).prod(dim=1)
            areas = [(x[:, 2:] - x[:, :2] + one).prod(dim=1) for x in (first, rest)]
            left = left[overlap <= threshold * (areas[0] + areas[1] - overlap)]
    found = torch.cat([order[:0], *result])
    return found[scores[found].argsort(descending=True, stable=True)]


def levels(boxes: Tensor, *, legacy: bool = False) -> Tensor:
    """The map, 0 to 3, from which each box takes its features."""
    sides = boxes[:, 2:] - boxes[:, :2] + float(legacy)
    return (sides.prod(dim=1).sqrt() / 56 + 1e-6).log2().floor().clamp(0, 3).long()


def roi_align(level: Tensor, boxes: Tensor, stride: int, *, size: int = 7, legacy: bool = False) -> Tensor:
    """[R, C, size, size] of a map [C, H, W]: mean of bilinear samples in each bin.

    A bin has as many samples a side as it is cells long, rounded up; in mmdetection 1 it has two, from coordinates that
    are not shifted to the centres of the cells and end one pixel after the box. A bin's mean of samples is linear in
    rows and in columns, so each box has a matrix for either.
    """
    if not len(boxes):
        return level.new_zeros(0, len(level), size, size)
    pooled = []
    for x1, y1, x2, y2 in boxes.tolist():
        columns = _samples(x1, x2, stride, size, legacy, level.shape[2]).to(level)
        rows = _samples(y1, y2, stride, size, legacy, level.shape[1]).to(level)
        pooled.append(torch.einsum("yh,chw,xw->cyx", rows, level, columns))
    return torch.stack(pooled)


def _samples(first: float, last: float, stride: int, bins: int, legacy: bool, cells: int) -> Tensor:
    """[bins, cells]: the weight of each cell of an axis in each bin."""
    start, end = (first / stride, (last + 1) / stride) if legacy else (first / stride - 0.5, last / stride - 0.5)
    length = (end - start) / bins
    count = 2 if legacy else math.ceil(length)
    weights = [[0.0] * cells for _ in range(bins)]
    for k in range(bins):
        for i in range(count):
            position = start + k * length + (i + 0.5) * length / count
            if not -1 <= position <= cells:
                continue
            position = min(max(position, 0), cells - 1)
            low = min(int(position), cells - 2) if cells > 1 else 0
            weights[k][low] += (1 - (position - low)) / count
            if cells > 1:
                weights[k][low + 1] += (position - low) / count
    return torch.tensor(weights, dtype=torch.float64)
