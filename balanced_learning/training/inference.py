"""Trained detectors, and their detections on a data set or on image files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype, to_image

from balanced_learning.training import distributed
from balanced_learning.training.checkpoint import Checkpoint
from balanced_learning.training.data.batching import DetectionLoader
from balanced_learning.training.data.dataset import Batch
from balanced_learning.training.data.image_files import ImageFiles
from balanced_learning.training.data.labels import class_name
from balanced_learning.training.errors import UserError, printable
from balanced_learning.training.model import make_model
from balanced_learning.training.optimization import Precision
from balanced_learning.training.reporting.progress import Progress


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Loads the detector of a checkpoint of the training program.

    Of a run with ``--ema`` it has the average of the weights. Nothing is downloaded, whatever weights the training
    started from.

    Args:
        path (str or Path): ``checkpoint.pth`` or ``checkpoint_best.pth``.
        device (str or torch.device): the device to put it on.

    Returns:
        FasterRCNN or RetinaNet: in evaluation mode, with the image sizes of its training. Takes a list of images
        ``[3, H, W]`` in [0, 1] and returns torchvision's detections. Its ``categories`` is a dict from label to name.

    Raises:
        UserError: if the file is no checkpoint of the training program, or is one of a detector that needs proposals.
    """
    checkpoint = Checkpoint.load(Path(path))
    if checkpoint.config.model.is_fast_rcnn:
        raise UserError(
            f"{printable(path)}: of a Fast R-CNN, which finds nothing in images alone: it needs proposals, and is "
            "evaluated with --test-only --proposals FILE"
        )
    detector = make_model(checkpoint.config, checkpoint.labels, checkpoint.averaged())
    detector.categories = checkpoint.labels.names
    return detector.to(device).eval()


def predict(
    model: nn.Module,
    loader: DetectionLoader,
    precision: Precision,
    print_freq: int,
    after_batch: Callable[[Batch | None], None] = lambda _: None,
) -> dict[int, dict[str, Tensor]]:
    """Returns the detections of each image by its id, of all processes, on the CPU; for the rest see :func:`detect`."""
    progress = Progress("evaluation", print_freq, is_main=distributed.is_main())
    return distributed.union_over_processes(dict(detect(model, loader, precision, progress, after_batch)))


@torch.inference_mode()
def detect(
    model: nn.Module,
    loader: DetectionLoader,
    precision: Precision,
    progress: Progress,
    after_batch: Callable[[Batch | None], None],
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields the id and the detections of each image of this process, on the CPU.

    A detector that takes its proposals from the targets gets these, too.

    ``after_batch`` is called equally often on every process: with ``None`` where it has no batch left.
    """
    model.eval()
    rounds = max(distributed.gather(len(loader)))
    needs_targets = loader.dataset.proposals is not None
    with closing(iter(loader)) as batches:
        for batch in progress.over(batches, len(loader), images=distributed.world_size()):
            outputs = []
            if batch.images:
                on_device = batch.to(precision.device)
                with precision():
                    outputs = model(on_device.images, *([on_device.targets] if needs_targets else []))
            for image_id, output in zip(batch.image_ids(), outputs, strict=True):
                yield image_id, {name: value.float().cpu() for name, value in output.items()}
            after_batch(batch)
    for _ in range(rounds - len(loader)):
        after_batch(None)


class Prediction(NamedTuple):
    """The detections of an image file, on the CPU."""

    file: Path
    image: Image.Image  # upright
    found: dict[str, Tensor]  # boxes [N, 4], xyxy in pixels of the image, scores [N] and labels [N]

    def record(self, names: dict[int, str]) -> dict[str, Any]:
        """The same in plain values, with the names of the labels."""
        return {
            "file": str(self.file),
            "boxes": self.found["boxes"].tolist(),
            "scores": self.found["scores"].tolist(),
            "labels": [class_name(names, label) for label in self.found["labels"].tolist()],
        }


@torch.inference_mode()
def predict_files(detector: nn.Module, files: Sequence[Path], score_thresh: float) -> Iterator[Prediction | UserError]:
    """Finds the objects of each image file, one after the other, so that no image changes what is found in another.

    Yields:
        For each of the files a prediction, without what has a score below the threshold; or an error that names it, if
        it cannot be read or the detector cannot take its size.
    """
    device = next(detector.parameters()).device
    progress = Progress("prediction", print_freq=20)
    for file, image in zip(files, progress.over(ImageFiles(files), len(files)), strict=True):
        if isinstance(image, UserError):
            yield image
            continue
        try:
            (found,) = detector([to_dtype(to_image(image).to(device), torch.float32, scale=True)])
        except RuntimeError as error:  # a strip that shrinks to nothing, or too little memory
            size = " x ".join(map(str, image.size))
            yield UserError(
                f"{printable(file)}: nothing can be detected in {size} pixels ({str(error).splitlines()[0]})"
            )
            continue
        sure = found["scores"] >= score_thresh
        yield Prediction(file, image, {name: value[sure].cpu() for name, value in found.items()})
