"""Images and targets for torchvision's detectors, in batches of similar shape."""

import math
from bisect import bisect
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from coco import Entry, Split, load_image

Target = dict[str, Any]


class DetectionDataset(Dataset):
    """Images in [0, 1] with ``boxes`` (xyxy in pixels), ``labels`` and ``image_id``.

    Args:
        split: the data.
        label_of: the model's label of each category id.
        images: the entries of the split to serve, by default all.
        transforms: of torchvision's v2 family, applied to image and target together.
    """

    def __init__(
        self, split: Split, label_of: dict[int, int], images: list[Entry] | None = None, transforms: Any = None
    ) -> None:
        self.split = split
        self.label_of = label_of
        self.images = split.images if images is None else images
        self.transforms = v2.Compose(
            [transforms or v2.Identity(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        entry = self.images[index]
        image = tv_tensors.Image(load_image(self.split.image_dir / entry["file_name"]))
        annotations = self.split.boxes(entry)
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        xywh = tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=image.shape[-2:])
        target = {
            "boxes": v2.functional.clamp_bounding_boxes(
                v2.functional.convert_bounding_box_format(xywh, new_format="XYXY")
            ),
            "labels": torch.tensor([self.label_of[a["category_id"]] for a in annotations], dtype=torch.int64),
            "image_id": entry["id"],
        }
        return self.transforms(image, target)


def augmentation(name: str) -> Any:
    """The policies of torchvision's reference script."""
    flip = v2.RandomHorizontalFlip(0.5)
    fill = {tv_tensors.Image: (123, 117, 104), "others": 0}
    policies = {
        "none": [],
        "hflip": [flip],
        "multiscale": [v2.RandomShortestSize(min_size=list(range(480, 801, 32)), max_size=1333), flip],
        "lsj": [
            v2.ScaleJitter(target_size=(1024, 1024), antialias=True),
            v2.RandomCrop((1024, 1024), pad_if_needed=True, fill=fill),
            flip,
        ],
        "ssd": [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=fill), v2.RandomIoUCrop(), flip],
        "ssdlite": [v2.RandomIoUCrop(), flip],
    }
    return v2.Compose([*policies[name], v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])


class AspectRatioBatchSampler(Sampler[list[int]]):
    """Shuffled batches of images of similar shape, so that little is padded. Every image comes once an epoch.

    Images are grouped by width / height in steps of a ``group_factor``-th of an octave, from 1/2 to 2; what does not
    fill a batch of its group forms mixed batches. A ``group_factor`` of 0 separates portrait from landscape, a negative
    one nothing. The order follows from seed and epoch alone, so a resumed run
    continues as if it had not been interrupted. Of several processes each takes its share, padded to equal length.
    """

    def __init__(
        self, images: list[Entry], batch_size: int, *, group_factor: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        steps = range(-group_factor, group_factor + 1)  # none, if negative
        edges = [2 ** (step / max(1, group_factor)) for step in steps]
        self.groups = [bisect(edges, image["width"] / image["height"]) for image in images]
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.groups), generator=generator).tolist()
        order = list(islice(cycle(order), math.ceil(len(order) / self.world_size) * self.world_size))
        batches: list[list[int]] = []
        open_batches: dict[int, list[int]] = {}
        for index in order[self.rank :: self.world_size]:
            batch = open_batches.setdefault(self.groups[index], [])
            batch.append(index)
            if len(batch) == self.batch_size:
                batches.append(open_batches.pop(self.groups[index]))
        rest = [index for batch in open_batches.values() for index in batch]
        batches += [rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size)]
        return (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())

    def __len__(self) -> int:
        return math.ceil(math.ceil(len(self.groups) / self.world_size) / self.batch_size)


def loader(dataset: Dataset, workers: int, device: torch.device, **options: Any) -> DataLoader:
    """A loader of lists of images and lists of targets; ``options`` say how to batch.

    Its processes start anew with every epoch, so that their generators, too, follow from the seed of the epoch.
    """
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        collate_fn=_as_lists,
        **options,
    )


def _as_lists(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
