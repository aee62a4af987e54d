"""Images and targets for torchvision's detectors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from balanced_learning.training import randomness
from balanced_learning.training.data.coco import Split
from balanced_learning.training.errors import UserError

Target = dict[str, Any]
Sample = tuple[Tensor, Target]


class DetectionDataset(Dataset):
    """Images in [0, 1] with ``boxes`` (xyxy in pixels), ``labels`` and ``image_id``.

    The augmentation of an image follows from ``seed``, ``epoch`` and the id of the image alone.

    Args:
        split: the data.
        label_of: the model's label of each category id.
        positions: those of the images to take, by default all.
        transforms: of torchvision's v2 family, applied to image and target together.
        seed: of the augmentation.

    Attributes:
        epoch (int): the epoch to augment for, 0 at first.
    """

    def __init__(
        self,
        split: Split,
        label_of: dict[int, int],
        positions: Sequence[int] | np.ndarray | None = None,
        transforms: Any = None,
        seed: int = 0,
    ) -> None:
        self.split = split
        self.label_of = label_of
        self.positions = range(len(split.images)) if positions is None else positions
        self.transforms = v2.Compose(
            [transforms or v2.Identity(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        )
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        position = int(self.positions[index])
        image_id = self.split.images[position]["id"]
        image = tv_tensors.Image(self.split.load_image(position))
        boxes, category_ids = self.split.truth(position)
        xywh = tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=image.shape[-2:], dtype=torch.float32)
        target = {
            "boxes": v2.functional.clamp_bounding_boxes(
                v2.functional.convert_bounding_box_format(xywh, new_format="XYXY")
            ),
            "labels": torch.tensor([self.label_of[i] for i in category_ids.tolist()], dtype=torch.int64),
            "image_id": image_id,
        }
        with randomness.seeded(self.seed, "augmentation", self.epoch, image_id):
            return self.transforms(image, target)

    def __getitems__(self, indices: list[int]) -> list[Sample] | UserError:
        """Returns the samples of a batch, or the error: raised in a loader process, it would lose its type."""
        try:
            return [self[index] for index in indices]
        except UserError as error:
            return error
