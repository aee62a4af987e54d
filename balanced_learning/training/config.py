"""The settings of a run: frozen, made once, saved in its checkpoints.

The metadata of a field hold its flag, for :mod:`~balanced_learning.training.command_line`, and the uses of a checkpoint
that must agree with it: ``MODEL`` settings decide what the weights mean, ``COURSE`` settings how the training goes on.
The defaults are the paper's 1x schedule on COCO.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from balanced_learning.training import distributed
from balanced_learning.training.setting_values import check_value

PAPER_IMAGES = 16  # images an iteration, to which the paper's learning rates belong
PAPER_LR = {"libra_fasterrcnn": 0.02, "libra_retinanet": 0.01}

AUTO = Path("auto")  # of --resume

MODEL, COURSE, FREE = "model", "course", "free"


def _setting(default: Any, help: str, *aliases: str, binds: str = FREE, **arguments: Any) -> Any:
    """A field with a default, and the arguments of its flag beside those that follow from name and default."""
    metadata = {"help": help, "aliases": aliases, "binds": binds, "arguments": arguments}
    return field(default=default, metadata=metadata)


def _number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """Returns a parser of finite numbers from ``low`` to ``high``."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"must be a {whole}number, got {text!r}") from None
        if not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    return parse


_positive, _not_negative, _amount = _number(int, 1), _number(int, 0), _number(float, 0)


def _name_or_none(text: str) -> str | None:
    return None if text.lower() == "none" else text


@dataclass(frozen=True)
class DataConfig:
    """The images, and how they are batched and augmented."""

    data_path: Path | None = _setting(None, "folder with annotations/, train2017/ and val2017/, as COCO's", type=Path)
    dataset: str = _setting("coco", "layout of the data", choices=["coco"])
    data_augmentation: str = _setting(
        "hflip",
        "torchvision's policies",
        binds=COURSE,
        choices=["none", "hflip", "multiscale", "lsj", "ssd", "ssdlite"],
    )
    keep_empty: bool = _setting(False, "also train on images without boxes", binds=COURSE)
    limit: int | None = _setting(
        None, "use the first N images of each split", binds=COURSE, type=_positive, metavar="N"
    )
    workers: int = _setting(4, "loader processes", "-j", type=_not_negative, metavar="N")
    max_unreadable: int = _setting(
        50, "images that may turn out to be unreadable before the run ends", type=_not_negative, metavar="N"
    )
    strict_data: bool = _setting(False, "end the run at the first image that cannot be read")
    aspect_ratio_group_factor: int = _setting(
        3, "batches of like shape; negative: off", binds=COURSE, type=int, metavar="N"
    )


@dataclass(frozen=True)
class ModelConfig:
    """The detector."""

    model: str = _setting("libra_fasterrcnn", "the detector", binds=MODEL, choices=list(PAPER_LR))
    backbone: str = _setting("resnet50", "any ResNet, ResNeXt or MobileNet of torchvision", binds=MODEL)
    sampler: bool = _setting(True, "IoU-balanced sampling (Faster R-CNN)", binds=COURSE)
    pyramid: bool = _setting(True, "balanced feature pyramid", binds=MODEL)
    path_aggregation: bool = _setting(False, "bottom-up path of PAFPN behind the FPN's levels", binds=MODEL)
    box_loss: bool = _setting(True, "balanced L1", binds=COURSE)
    rpn: bool = _setting(False, "balance the RPN, too (Faster R-CNN)", binds=COURSE)
    small: bool = _setting(False, "a small detector that a CPU can train from scratch", binds=MODEL)
    weights: str | None = _setting(
        None,
        "detector to start from: torchvision's COCO weights, e.g. DEFAULT, or a file with a checkpoint or a state dict",
        binds=MODEL,
        metavar="NAME|FILE",
    )
    weights_backbone: str | None = _setting(
        "IMAGENET1K_V1",
        "torchvision's ImageNet weights of the backbone, or a file with a state dict; none: from scratch",
        binds=MODEL,
        type=_name_or_none,
        metavar="NAME|FILE",
    )
    trainable_backbone_layers: int | None = _setting(
        None, "stages trained, from the last", binds=COURSE, type=int, choices=range(7)
    )
    rpn_score_thresh: float = _setting(0.0, "lowest objectness of a proposal", binds=COURSE, type=_amount)
    min_size: int = _setting(800, "shorter side of an image, in pixels", binds=MODEL, type=_positive)
    max_size: int = _setting(1333, "longer side at most, in pixels", binds=MODEL, type=_positive)
    sync_bn: bool = _setting(False, "synchronize batch norm over processes", binds=COURSE)
    channels_last: bool = _setting(False, "weights and maps with the channels last in memory")
    compile: bool = _setting(False, "torch.compile the backbone with its necks")


@dataclass(frozen=True)
class TrainingConfig:
    """The optimization. The command line settles ``lr``."""

    batch_size: int = _setting(2, "images per process", "-b", type=_positive, metavar="N")
    accumulation_steps: int = _setting(
        1, "batches of a process that are added up to one step of the optimizer", type=_positive, metavar="N"
    )
    epochs: int = _setting(12, "passes over the data", type=_positive, metavar="N")
    opt: str = _setting("sgd", "optimizer", binds=COURSE, choices=["sgd", "sgd_nesterov", "adamw"])
    lr: float = _setting(
        None,
        f"learning rate, used as given; by default the paper's for {PAPER_IMAGES} images an iteration (Faster R-CNN "
        "0.02, RetinaNet 0.01), scaled linearly with the images of all processes",
        binds=COURSE,
        type=_amount,
    )
    momentum: float = _setting(0.9, "of SGD", binds=COURSE, type=_amount)
    weight_decay: float = _setting(1e-4, "weight decay", "--wd", binds=COURSE, type=_amount)
    norm_weight_decay: float | None = _setting(
        None, "weight decay of normalization layers, if another", binds=COURSE, type=_amount
    )
    lr_scheduler: str = _setting(
        "multisteplr", "decay of the learning rate", binds=COURSE, choices=["multisteplr", "cosineannealinglr"]
    )
    lr_steps: tuple[int, ...] = _setting(
        (8, 11), "epochs after which lr drops", binds=COURSE, type=_not_negative, nargs="*"
    )
    lr_gamma: float = _setting(0.1, "factor of a drop", binds=COURSE, type=_amount)
    warmup_iters: int = _setting(500, "iterations of linear warm-up", binds=COURSE, type=_not_negative)
    warmup_factor: float = _setting(
        1 / 3, "share of lr that the warm-up starts from", binds=COURSE, type=_number(float, 1e-6, 1)
    )
    clip_grad_norm: float = _setting(35.0, "largest norm of the gradient; 0: any", binds=COURSE, type=_amount)
    ema: float | None = _setting(
        None,
        "evaluate and keep an exponential moving average of the weights, too, with this decay, e.g. 0.9998",
        binds=COURSE,
        type=_number(float, 0, 1),
        metavar="DECAY",
    )
    patience: int | None = _setting(None, "end after N epochs without a higher AP", type=_positive, metavar="N")
    max_skipped_steps: int = _setting(
        10,
        "steps of an epoch that may be skipped because a loss or gradient is not finite",
        type=_not_negative,
        metavar="N",
    )
    amp: str | None = _setting(
        None,
        "mixed precision; without a value fp16",
        binds=COURSE,
        nargs="?",
        const="fp16",
        choices=["fp16", "bf16"],
    )
    seed: int = _setting(0, "of weights, order, augmentation and sampling", binds=COURSE, type=int)
    use_deterministic_algorithms: bool = _setting(False, "same bits every run, where torch can; slower")


@dataclass(frozen=True)
class RunConfig:
    """The place of the run, and its reports. The command line settles ``output_dir``."""

    device: str = _setting("auto", "cuda, cpu, ...; auto: cuda if there is one")
    output_dir: Path = _setting(None, "default: a new folder in runs/, or that of --resume", type=Path)
    resume: Path | None = _setting(
        None,
        "checkpoint to continue from, or with --test-only to evaluate; its settings replace the defaults. auto: that "
        "of --output-dir, if there is one",
        type=Path,
        metavar="FILE|auto",
    )
    checkpoint_steps: int | None = _setting(
        None, "also save every N steps of the optimizer", type=_positive, metavar="N"
    )
    checkpoint_minutes: float | None = _setting(
        None, "also save when the last checkpoint is M minutes old", type=_amount, metavar="M"
    )
    start_epoch: int = _setting(
        0, "epoch to start counting from", "--start_epoch", binds=COURSE, type=_not_negative, metavar="N"
    )
    test_only: bool = _setting(False, "evaluate, do not train")
    check_data: bool = _setting(False, "report on the data and its faults, do not train")
    dry_run: bool = _setting(False, "train, save, continue, evaluate and predict on a few images, then end")
    replay: Path | None = _setting(
        None, "repeat a step that was skipped, from the file that was saved of it", type=Path, metavar="FILE"
    )
    limit_batches: int | None = _setting(
        None,
        "steps of an epoch and batches of an evaluation at most, to try things out",
        binds=COURSE,
        type=_positive,
        metavar="N",
    )
    print_freq: int = _setting(20, "iterations between reports", type=_positive, metavar="N")
    tensorboard: bool = _setting(False, "also log metrics and the IoUs of sampled negatives for TensorBoard")
    coco_backend: str = _setting("faster-coco-eval", "computes AP", choices=["faster-coco-eval", "pycocotools"])
    dist_url: str = _setting("env://", "where processes started by torchrun meet")


@dataclass(frozen=True)
class Config:
    """All settings of a run, in the groups of its flags."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    run: RunConfig = RunConfig()

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Config":
        """Makes a configuration of values by the names of the settings; those left out have their defaults.

        Raises:
            TypeError: for a name that no setting has.
            ValueError: for a value that the flag of the setting would not take.
        """
        if unknown := values.keys() - setting_fields().keys():
            raise TypeError(f"no setting is called {min(unknown)!r}")
        for name, value in values.items():
            check_value(setting_fields()[name], value)
        groups = {group.name: group.type for group in fields(cls)}
        return cls(**{name: make(**_part(values, make)) for name, make in groups.items()})  # type: ignore[operator]

    def values(self) -> dict[str, Any]:
        """All values by the names of the settings."""
        return {name: value for group in fields(self) for name, value in vars(getattr(self, group.name)).items()}

    def plain(self) -> dict[str, Any]:
        """As :meth:`values`, of types that JSON and ``torch.load(weights_only=True)`` have."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in self.values().items()}


def images_per_step(config: Config) -> int:
    """The images of one step of the optimizer, of all processes together."""
    return config.training.batch_size * config.training.accumulation_steps * distributed.announced_world_size()


def setting_fields() -> dict[str, Any]:
    """The field of each setting by its name."""
    return {setting.name: setting for group in fields(Config) for setting in fields(group.type)}  # type: ignore[arg-type]


def flag_of(name: str) -> str:
    """The flag of a setting: ``--min-size`` of ``min_size``."""
    return f"--{name.replace('_', '-')}"


def _part(values: dict[str, Any], group: Any) -> dict[str, Any]:
    names = {setting.name for setting in fields(group)}
    return {name: value for name, value in values.items() if name in names}
