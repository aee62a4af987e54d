"""Images and targets for torchvision's detectors."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from balanced_learning.training import randomness
from balanced_learning.training.data.coco import Split
from balanced_learning.training.data.proposals import ProposalFile
from balanced_learning.training.errors import UserError, printable

Target = dict[str, Any]
Sample = tuple[Tensor, Target]

TRIES = 100  # images in a row, of which none can be read

# What an image may make of a transform. TypeError, KeyError and their like are faults of the program.
_FAULTS = (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError)


class Share(NamedTuple):
    """What a process loads of the images of a step.

    Attributes:
        indices: of its images in the data set.
        images: number of images that all processes load together.
        step: of the epoch.
        is_filler: whether its image belongs to another process.
    """

    indices: list[int]
    images: int
    step: int
    is_filler: bool = False


class Batch(NamedTuple):
    """What a process has loaded of the images of a step.

    Attributes:
        images: tensors [3, H, W]; uint8 until :meth:`to`, for loader processes and the device to get a quarter as much.
        targets: of the images.
        of: number of images that all processes load together.
        is_filler: whether the image belongs to another process, so that its loss is to count nothing here.
        unreadable: a line for each image that could not be read. In training others are there in their place.
        step: of the epoch.
    """

    images: list[Tensor]
    targets: list[Target]
    of: int
    is_filler: bool
    unreadable: list[str]
    step: int

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device, and the images in [0, 1]."""

        def moved(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        targets = [{name: moved(value) for name, value in target.items()} for target in self.targets]
        images = [_in_unit_interval(moved(image)) for image in self.images]
        return self._replace(images=images, targets=targets)

    def parts(self, size: int) -> list["Batch"]:
        """Batches of so many of the images, the last of those that are left."""
        starts = range(0, len(self.images), size)
        return [self._replace(images=self.images[i : i + size], targets=self.targets[i : i + size]) for i in starts]

    def image_ids(self) -> list[int]:
        return [target["image_id"] for target in self.targets]


class DetectionDataset(Dataset):
    """Images in [0, 1] with ``boxes`` (xyxy in pixels), ``labels`` and ``image_id``; in batches, uint8 at first.

    With a file of proposals, targets have ``proposals`` [P, 4], too, which are augmented as ``boxes`` are; what is
    nothing after that is left out.

    The augmentation of an image follows from ``seed``, ``epoch`` and the id of the image alone.

    Args:
        split: the data.
        label_of: the model's label of each category id.
        positions: those of the images to take, by default all.
        transforms: of torchvision's v2 family, applied to image and target together.
        seed: of the augmentation.
        unreadable: what becomes of an image of a batch that cannot be read: ``"raise"`` an error, ``"replace"`` it by
            the next one in the data set that can be, or ``"leave out"``.
        proposals: a file of them that has some for all these images.
        max_proposals: the most to take of an image, the best ones.

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
        unreadable: Literal["raise", "replace", "leave out"] = "raise",
        proposals: ProposalFile | None = None,
        max_proposals: int = 1000,
    ) -> None:
        if proposals:
            proposals.require(split, positions)
        self.split = split
        self.label_of = label_of
        self.positions = range(len(split.images)) if positions is None else positions
        self.transforms = v2.Compose([transforms or v2.Identity(), v2.ToPureTensor()])
        self.seed = seed
        self.unreadable = unreadable
        self.proposals = proposals
        self.max_proposals = max_proposals
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        """Loads an image.

        Raises:
            UserError: if it cannot be decoded, has changed since it was checked, or makes a transform fail; or if its
                proposals are damaged.
        """
        image, target = self._load(index, self._proposals_of(index))
        return _in_unit_interval(image), target

    def _load(self, index: int, proposals: np.ndarray | None) -> Sample:
        position = int(self.positions[index])
        pixels = self.split.load_image(position)
        image_id = self.split.images[position]["id"]
        boxes, category_ids = self.split.truth(position)
        labels = torch.tensor([self.label_of[i] for i in category_ids.tolist()], dtype=torch.int64)
        try:
            image = tv_tensors.Image(pixels)
            xywh = tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=image.shape[-2:], dtype=torch.float32)
            xyxy = v2.functional.convert_bounding_box_format(xywh, new_format="XYXY")
            target = {"boxes": v2.functional.clamp_bounding_boxes(xyxy), "labels": labels, "image_id": image_id}
            if proposals is not None:  # behind the boxes, for transforms that draw go by the first
                target["proposals"] = _as_boxes(proposals, image)
            with randomness.seeded(self.seed, "augmentation", self.epoch, image_id):
                image, target = self.transforms(image, target)
        except _FAULTS as error:
            path = self.split.image_dir / self.split.images[position]["file_name"]
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{printable(path)} cannot be augmented ({printable(reason)})") from error
        if proposals is not None:
            target["proposals"] = _with_area(target["proposals"])
        return image, target

    def _proposals_of(self, index: int) -> np.ndarray | None:
        """The proposals for an image as they are in the file."""
        if self.proposals is None:
            return None
        columns, position = self.split.columns, int(self.positions[index])
        size = int(columns.widths[position]), int(columns.heights[position])
        return self.proposals.boxes(self.split.name, int(columns.image_ids[position]), self.max_proposals, size)

    def __getitems__(self, share: Share) -> Batch | UserError:
        """Returns a batch, or the error: raised in a loader process, it would lose its type."""
        unread: list[str] = []
        try:
            samples = [sample for index in share.indices if (sample := self._next_readable(index, unread))]
        except UserError as error:
            return error
        unreadable = [] if share.is_filler else unread  # the image's own process tells of it
        images, targets = [image for image, _ in samples], [target for _, target in samples]
        return Batch(images, targets, share.images, share.is_filler, unreadable, share.step)

    def _next_readable(self, index: int, unread: list[str]) -> Sample | None:
        """The image, or what comes in its place; adds a line to ``unread`` for each that cannot be read."""
        tries = min(TRIES, len(self)) if self.unreadable == "replace" else 1
        for i in (i % len(self) for i in range(index, index + tries)):
            proposals = self._proposals_of(i)  # of which a damaged file is no fault of the image
            try:
                return self._load(i, proposals)
            except UserError as error:
                if self.unreadable == "raise":
                    raise
                unread.append(str(error))
        if self.unreadable == "leave out":
            return None
        raise UserError(f"{self.split.json_file}: none of {tries} images in a row can be read: {unread[-tries]}, ...")


def _in_unit_interval(image: Tensor) -> Tensor:
    return v2.functional.to_dtype(image, torch.float32, scale=True)


def _as_boxes(proposals: np.ndarray, image: Tensor) -> Tensor:
    """A copy as boxes within the image: nobody is to write into the map, where that would end the process."""
    copy = torch.tensor(proposals)
    boxes = tv_tensors.BoundingBoxes(copy, format="XYXY", canvas_size=image.shape[-2:])
    clamped: Tensor = v2.functional.clamp_bounding_boxes(boxes)
    return clamped


def _with_area(boxes: Tensor) -> Tensor:
    return boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
