"""The training loop of torchvision's reference scripts, for what its pip package leaves out: references/detection.

Written from what they do by default (``--backend pil --data-augmentation hflip``), with what it costs: polygons become
masks, which the detector resizes whether or not it has a use for them; the host waits for the loss of each step; each
value that is logged is fetched by itself.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, RandomSampler, Sampler, Subset
from torchvision.datasets import CocoDetection
from torchvision.transforms import functional as F

Target = dict[str, Any]


def make_loader(
    root: Path, label_of: dict[int, int], batch_size: int, workers: int, *, group_factor: int, limit: int | None
) -> Any:
    """The loader of a folder's ``train2017``, or its first images, with a model's labels of its category ids."""
    data = _Coco(root / "train2017", root / "annotations" / "instances_train2017.json", label_of)
    used = [index for index, image_id in enumerate(data.ids[:limit]) if _has_box(data.coco.imgToAnns[image_id])]
    infos = [data.coco.imgs[data.ids[index]] for index in used]
    edges = 2 ** np.linspace(-1, 1, 2 * group_factor + 1)
    groups = np.searchsorted(edges, [info["height"] / info["width"] for info in infos], side="right").tolist()
    subset: Any = Subset(data, used)
    batches = _GroupedBatches(RandomSampler(subset), groups, batch_size)
    return DataLoader(subset, batch_sampler=batches, num_workers=workers, collate_fn=_columns)


def train_one_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Any,
    device: torch.device,
    epoch: int,
    print_freq: int,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    model.train()
    logger = _Logger()
    warmup = None
    if epoch == 0:
        warmup = LinearLR(optimizer, 1e-3, total_iters=max(1, min(1000, len(loader) - 1)))
    for images, targets in logger.over(loader, print_freq, f"Epoch: [{epoch}]"):
        images = [image.to(device) for image in images]
        targets = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in t.items()} for t in targets]
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            losses = model(images, targets)
            total = sum(losses.values())
        if not math.isfinite(total.item()):
            raise SystemExit(f"loss is {total.item()}")
        optimizer.zero_grad()
        if scaler is None:
            total.backward()
            optimizer.step()
        else:
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
        if warmup is not None:
            warmup.step()
        logger.update(loss=total, **losses)
        logger.update(lr=optimizer.param_groups[0]["lr"])


class _Coco(CocoDetection):
    """CocoDetection with the transforms of the training preset: masks of the polygons, a flip by chance, a tensor."""

    def __init__(self, root: Path, file: Path, label_of: dict[int, int]) -> None:
        super().__init__(root, file)
        self.label_of = label_of

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, annotations = super().__getitem__(index)
        target = self._target(self.ids[index], annotations, *image.size)
        if torch.rand(1) < 0.5:
            width = image.size[0]
            image = F.hflip(image)
            target["boxes"][:, [0, 2]] = width - target["boxes"][:, [2, 0]]
            if "masks" in target:
                target["masks"] = target["masks"].flip(-1)
        return F.convert_image_dtype(F.pil_to_tensor(image), torch.float32), target

    def _target(self, image_id: int, annotations: list[dict[str, Any]], width: int, height: int) -> Target:
        single = [entry for entry in annotations if entry["iscrowd"] == 0]
        boxes = torch.as_tensor([entry["bbox"] for entry in single], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=width)
        boxes[:, 1::2].clamp_(min=0, max=height)
        kept = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
        target = {
            "boxes": boxes[kept],
            "labels": torch.tensor([self.label_of[e["category_id"]] for e in single], dtype=torch.int64)[kept],
            "image_id": image_id,
            "area": torch.tensor([entry["area"] for entry in single]),
            "iscrowd": torch.tensor([entry["iscrowd"] for entry in single]),
        }
        if all("segmentation" in entry for entry in single):
            masks = [_mask(entry["segmentation"], width, height) for entry in single]
            target["masks"] = torch.stack(masks)[kept] if masks else torch.zeros((0, height, width), dtype=torch.uint8)
        return target


def _mask(polygons: Any, width: int, height: int) -> Tensor:
    mask = torch.as_tensor(coco_mask.decode(coco_mask.frPyObjects(polygons, height, width)), dtype=torch.uint8)
    return mask.reshape(height, width, -1).any(dim=2)


def _has_box(annotations: list[dict[str, Any]]) -> bool:
    """Whether an image is trained on: one of its boxes is more than a pixel high and wide."""
    return any(min(entry["bbox"][2:]) > 1 for entry in annotations)


def _columns(samples: list[tuple[Tensor, Target]]) -> tuple[tuple[Tensor, ...], tuple[Target, ...]]:
    images, targets = zip(*samples, strict=True)
    return images, targets


class _GroupedBatches(Sampler):
    """Full batches of images of one group; the last ones are filled up with images that were there before."""

    def __init__(self, sampler: Any, groups: list[int], batch_size: int) -> None:
        self.sampler, self.groups, self.batch_size = sampler, groups, batch_size

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        open_batches: dict[int, list[int]] = defaultdict(list)
        seen: dict[int, list[int]] = defaultdict(list)
        left = len(self)
        for index in self.sampler:
            group = self.groups[index]
            seen[group].append(index)
            open_batches[group].append(index)
            if len(open_batches[group]) == self.batch_size:
                yield open_batches.pop(group)
                left -= 1
        for group, batch in sorted(open_batches.items(), key=lambda item: -len(item[1]))[:left]:
            missing = self.batch_size - len(batch)
            yield batch + (seen[group] * math.ceil(missing / len(seen[group])))[:missing]


class _Meter:
    """A number that is logged: the median of its last values, and the mean of all."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=20)
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.recent.append(value)
        self.total += value
        self.count += 1

    def __str__(self) -> str:
        return f"{torch.tensor(list(self.recent)).median().item():.4f} ({self.total / self.count:.4f})"


class _Logger:
    """Meters, printed with the time that is left."""

    def __init__(self) -> None:
        self.meters: dict[str, _Meter] = defaultdict(_Meter)

    def update(self, **values: float | Tensor) -> None:
        for name, value in values.items():
            self.meters[name].update(value.item() if isinstance(value, Tensor) else value)

    def over(self, loader: Any, print_freq: int, header: str) -> Iterator[Any]:
        steps, waits = _Meter(), _Meter()
        last = time.time()
        for number, batch in enumerate(loader):
            waits.update(time.time() - last)
            yield batch
            steps.update(time.time() - last)
            if number % print_freq == 0 or number == len(loader) - 1:
                eta = timedelta(seconds=int(steps.total / steps.count * (len(loader) - number)))
                meters = "  ".join(f"{name}: {meter}" for name, meter in self.meters.items())
                memory = f"  max mem: {torch.cuda.max_memory_allocated() >> 20}" if torch.cuda.is_available() else ""
                print(f"{header}  [{number}/{len(loader)}]  eta: {eta}  {meters}  time: {steps}  data: {waits}{memory}")
            last = time.time()
