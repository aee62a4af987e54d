"""Checkpoints of mmdetection, made into those of the training program."""

from pathlib import Path
from typing import Any

from torchvision.models.detection import MaskRCNN

from balanced_learning.detection.mmdet.conversion import class_names, load, unpack
from balanced_learning.detection.mmdet.layout import Layout
from balanced_learning.training.checkpoint import Position, save
from balanced_learning.training.config import Config
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.errors import UserError, printable
from balanced_learning.training.model import build_model
from balanced_learning.training.output_folder import require_writable
from balanced_learning.training.state_dicts import read_tensors


def convert(source: Path, target: Path) -> str:
    """Writes the weights of a checkpoint of mmdetection as a checkpoint of the training program.

    ``load_detector`` and ``predict.py`` take it, ``--test-only --resume`` evaluates it, and ``--weights`` starts from
    it. No code of the file is run.

    Returns:
        str: a line that says what was taken and what was left out.

    Raises:
        UserError: if the file cannot be read, holds other weights, or the other cannot be written.
    """
    name = printable(source)
    content = read_tensors(source, name, leaves_out=True)
    try:
        state, meta = unpack(content)
        layout = Layout.of(state, meta)
        if layout.kind is MaskRCNN:
            raise ValueError("the training program has no Mask R-CNN: use balanced_learning.detection.from_mmdet")
        config = Config.of(settings(layout))
        model = build_model(config, layout.num_classes)
        load(model, state, layout)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from None
    names, ids = class_names(meta, layout.num_classes)
    names = names or {label: f"class {label}" for label in range(1, layout.num_classes)}
    labels = Labels(names, ids or {label: label for label in names}, layout.num_classes)
    start = Position(epoch=0, step=0, iterations=1, images_per_step=1, sums=[], history=[])
    require_writable(target.parent)
    save(target, {"model": model}, config=config, labels=labels, position=start)
    others = [str(key) for key in content if key not in ("state_dict", "meta")] if "state_dict" in content else []
    said = f"takes: {len(state)} tensors of a {layout}, {len(names)} classes"
    if others:
        said += f"; leaves out: {printable(', '.join(others))}"
    if layout.counts_last_pixel:
        said += "; of mmdetection 1: in resized images, boxes end up to a pixel early, which from_mmdet mends"
    return said


def settings(layout: Layout) -> dict[str, Any]:
    """The settings with which the training program builds the detector of a layout."""
    is_libra = layout.refine is not None
    values: dict[str, Any] = {
        "model": "libra_retinanet" if layout.is_retinanet else "libra_fasterrcnn",
        "backbone": layout.backbone,
        "fpn_channels": layout.channels,
        "weights_backbone": None,
        "trainable_backbone_layers": 3,
        "sampler": is_libra,
        "pyramid": is_libra,
        "box_loss": is_libra,
        "path_aggregation": layout.has_path,
        "refine": layout.refine or "non_local",
        "beta": layout.beta,
        "norm": "frozen_statistics",
    }
    own = {"detections_per_image": 100} if layout.is_retinanet else {"rpn_beta": layout.rpn_beta}
    return values | layout.conventions | own
