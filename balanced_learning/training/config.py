"""The settings of a run: frozen, made once, saved in its checkpoints.

Each group has flags and a table of a recipe, see :mod:`~balanced_learning.training.flags`. The defaults are
torchvision's detectors with the paper's parts, on its 1x schedule on COCO; ``recipes/`` has the settings of its tables.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from balanced_learning.training import distributed
from balanced_learning.training.settings import (
    COURSE,
    MODEL,
    above_zero,
    amount,
    check_value,
    name_or_none,
    not_negative,
    number,
    positive,
    setting,
)

PAPER_IMAGES = 16  # images an iteration, to which the paper's learning rates belong
ADAMW_LR = 1e-4  # the usual one of detectors for as many images, as of mmdetection's Swin Transformers
PAPER_LR = {"libra_fasterrcnn": 0.02, "libra_retinanet": 0.01, "libra_fastrcnn": 0.02, "libra_rpn": 0.02}

AUTO = Path("auto")  # of --resume


@dataclass(frozen=True)
class DataConfig:
    """The images, and how they are batched and augmented."""

    data_path: Path | None = setting(None, "folder with annotations/, train2017/ and val2017/, as COCO's", type=Path)
    dataset: str = setting("coco", "layout of the data", choices=["coco"])
    data_augmentation: str = setting(
        "hflip",
        "torchvision's policies",
        binds=COURSE,
        choices=["none", "hflip", "multiscale", "lsj", "ssd", "ssdlite"],
    )
    keep_empty: bool = setting(False, "also train on images without boxes", binds=COURSE)
    limit: int | None = setting(None, "use the first N images of each split", binds=COURSE, type=positive, metavar="N")
    workers: int = setting(4, "loader processes", "-j", type=not_negative, metavar="N")
    max_unreadable: int = setting(
        50, "images that may turn out to be unreadable before the run ends", type=not_negative, metavar="N"
    )
    strict_data: bool = setting(False, "end the run at the first image that cannot be read")
    proposals: Path | None = setting(
        None, "of libra_fastrcnn: the file that --dump-proposals made of the same data", type=Path, metavar="FILE"
    )
    max_proposals: int = setting(
        1000, "proposals of an image that libra_fastrcnn takes, the best", binds=COURSE, type=positive, metavar="N"
    )
    aspect_ratio_group_factor: int = setting(
        3, "batches of like shape; negative: off", binds=COURSE, type=int, metavar="N"
    )


@dataclass(frozen=True)
class ModelConfig:
    """The detector."""

    model: str = setting(
        "libra_fasterrcnn",
        "the detector, or a stage of Faster R-CNN alone: the second (Fast R-CNN, needs --proposals), or the RPN",
        binds=MODEL,
        choices=list(PAPER_LR),
    )
    backbone: str = setting("resnet50", "any ResNet, ResNeXt or MobileNet of torchvision", binds=MODEL)
    fpn_channels: int = setting(
        256, "channels of the pyramid's levels; not of a --small detector", binds=MODEL, type=positive, metavar="N"
    )
    anchor_size: int = setting(
        32,
        "side of the finest level's anchors, in pixels, which doubles from level to level; RoIs are pooled from levels "
        "accordingly. Not of a --small detector",
        binds=MODEL,
        type=positive,
        metavar="PIXELS",
    )
    box_batch_size_per_image: int | None = setting(
        None,
        "boxes of an image that the second stage learns from, by default 512 (--small: 64)",
        binds=COURSE,
        type=positive,
        metavar="N",
    )
    sampler: bool = setting(True, "IoU-balanced sampling (Faster R-CNN)", binds=COURSE)
    pyramid: bool = setting(True, "balanced feature pyramid", binds=MODEL)
    path_aggregation: bool = setting(False, "bottom-up path of PAFPN behind the FPN's levels", binds=MODEL)
    box_loss: bool = setting(True, "balanced L1", binds=COURSE)
    rpn: bool = setting(False, "balance the RPN, too (Faster R-CNN; an RPN alone is balanced anyway)", binds=COURSE)
    small: bool = setting(False, "a small detector that a CPU can train from scratch", binds=MODEL)
    weights: str | None = setting(
        None,
        "detector to start from: torchvision's COCO weights, e.g. DEFAULT, or a file with a checkpoint or a state dict",
        binds=MODEL,
        metavar="NAME|FILE",
    )
    weights_backbone: str | None = setting(
        "IMAGENET1K_V1",
        "torchvision's ImageNet weights of the backbone, or a file with a state dict; none: from scratch",
        binds=MODEL,
        type=name_or_none,
        metavar="NAME|FILE",
    )
    trainable_backbone_layers: int | None = setting(
        None, "stages trained, from the last", binds=COURSE, type=int, choices=range(7)
    )
    rpn_score_thresh: float = setting(0.0, "lowest objectness of a proposal", binds=COURSE, type=amount)
    min_size: int = setting(800, "shorter side of an image, in pixels", binds=MODEL, type=positive)
    max_size: int = setting(1333, "longer side at most, in pixels", binds=MODEL, type=positive)
    sync_bn: bool = setting(False, "synchronize batch norm over processes", binds=COURSE)
    channels_last: bool = setting(False, "weights and maps with the channels last in memory")
    compile: bool = setting(False, "torch.compile the backbone with its necks")

    @property
    def is_retinanet(self) -> bool:
        return self.model == "libra_retinanet"

    @property
    def is_rpn(self) -> bool:
        return self.model == "libra_rpn"

    @property
    def is_fast_rcnn(self) -> bool:
        return self.model == "libra_fastrcnn"

    @property
    def balances_rpn(self) -> bool:
        """Whether the parts that are on are those of an RPN, too."""
        return self.rpn or self.is_rpn


@dataclass(frozen=True)
class LibraConfig:
    """The paper's three parts, where they are on."""

    num_bins: int = setting(3, "bins of IoU that negatives are drawn from", binds=COURSE, type=positive, metavar="K")
    instance_balanced: bool = setting(True, "draw as many positives of each ground truth", binds=COURSE)
    refine: str = setting(
        "non_local", "refinement of the pyramid's mean", binds=MODEL, choices=["non_local", "conv", "none"]
    )
    pyramid_init: str = setting(
        "zero", "start of the refinement; xavier: as the published weights", binds=COURSE, choices=["zero", "xavier"]
    )
    alpha: float = setting(0.5, "of balanced L1", binds=COURSE, type=above_zero)
    gamma: float = setting(1.5, "of balanced L1", binds=COURSE, type=above_zero)
    beta: float | None = setting(
        None,
        "where the box loss turns linear: balanced L1 (by default 1; RetinaNet 0.11) or, with --no-box-loss, smooth L1 "
        "(1/9; RetinaNet 0, which is L1)",
        binds=COURSE,
        type=amount,
    )
    box_loss_weight: float = setting(1.0, "factor of the box loss, not of an RPN's", binds=COURSE, type=amount)


@dataclass(frozen=True)
class ConventionsConfig:
    """What torchvision and mmdetection do differently. The defaults are torchvision's."""

    norm: str | None = setting(
        None,
        "the backbone's: batch norm, frozen, or with frozen statistics alone; by default frozen with weights, "
        "otherwise batch. A --small detector has batch norm in any case",
        binds=MODEL,
        choices=["batch", "frozen", "frozen_statistics"],
    )
    anchors: str = setting(
        "torchvision",
        "rounded: strides of 4, 8, 16, ... whatever the padding; exact: nor are corners rounded; centered: rounded, "
        "and in the middle of their cells",
        binds=MODEL,
        choices=["torchvision", "rounded", "exact", "centered"],
    )
    init: str = setting("torchvision", "of FPN and RoI heads", binds=COURSE, choices=["torchvision", "mmdet"])
    detections_per_image: int | None = setting(
        None,
        "boxes found in an image, by default 100 (RetinaNet 300)",
        binds=COURSE,
        type=positive,
        metavar="N",
    )
    roi_aligned: bool = setting(False, "RoIAlign without its offset of half a pixel", binds=MODEL)
    roi_sampling_ratio: int = setting(
        2, "points of a bin of RoIAlign, each way; 0: one a pixel", binds=MODEL, type=not_negative, metavar="N"
    )
    rpn_allowed_border: int | None = setting(
        None,
        "the RPN learns from anchors that reach at most N pixels beyond the image; by default from all",
        binds=COURSE,
        type=not_negative,
        metavar="N",
    )
    rpn_max_negatives_per_positive: float | None = setting(
        None, "negatives of a positive that the RPN learns from, at most", binds=COURSE, type=amount, metavar="X"
    )
    rpn_beta: float = setting(1 / 9, "where the RPN's box loss turns linear; 0: L1", binds=COURSE, type=amount)
    rpn_pre_nms_top_n_train: int | None = setting(
        None,
        "proposals of a level that enter NMS in training, usually 2000",
        binds=COURSE,
        type=positive,
        metavar="N",
    )
    rpn_pre_nms_top_n_test: int | None = setting(
        None, "the same in evaluation, usually 1000", binds=COURSE, type=positive, metavar="N"
    )
    rpn_post_nms_top_n_train: int | None = setting(
        None, "proposals of an image in training, usually 2000", binds=COURSE, type=positive, metavar="N"
    )
    rpn_post_nms_top_n_test: int | None = setting(
        None, "the same in evaluation, usually 1000", binds=COURSE, type=positive, metavar="N"
    )
    p6_from: str = setting("p5", "what RetinaNet's P6 is made of", binds=MODEL, choices=["p5", "c5"])
    p7_relu: bool = setting(True, "ReLU before RetinaNet's P7", binds=MODEL)
    loss_normalizer: str = setting(
        "image",
        "RetinaNet's losses: by the positives of each image or of the batch",
        binds=COURSE,
        choices=["image", "batch"],
    )


@dataclass(frozen=True)
class TrainingConfig:
    """The optimization. The command line settles ``lr``."""

    batch_size: int = setting(2, "images per process", "-b", type=positive, metavar="N")
    accumulation_steps: int = setting(
        1, "batches of a process that are added up to one step of the optimizer", type=positive, metavar="N"
    )
    epochs: int = setting(12, "passes over the data", type=positive, metavar="N")
    eval_interval: int = setting(1, "evaluate after every Nth epoch, and after the last", type=positive, metavar="N")
    opt: str = setting("sgd", "optimizer", binds=COURSE, choices=["sgd", "sgd_nesterov", "adamw"])
    lr: float = setting(
        None,
        f"learning rate, used as given; by default the paper's for {PAPER_IMAGES} images an iteration (Faster R-CNN "
        f"0.02, RetinaNet 0.01; with adamw {ADAMW_LR:g}), scaled linearly with the images of all processes",
        binds=COURSE,
        type=amount,
    )
    momentum: float = setting(0.9, "of SGD", binds=COURSE, type=amount)
    weight_decay: float = setting(1e-4, "weight decay", "--wd", binds=COURSE, type=amount)
    norm_weight_decay: float | None = setting(
        None, "weight decay of normalization layers, if another", binds=COURSE, type=amount
    )
    lr_scheduler: str = setting(
        "multisteplr", "decay of the learning rate", binds=COURSE, choices=["multisteplr", "cosineannealinglr"]
    )
    lr_steps: tuple[int, ...] = setting(
        (8, 11), "epochs after which lr drops", binds=COURSE, type=not_negative, nargs="*"
    )
    lr_gamma: float = setting(0.1, "factor of a drop", binds=COURSE, type=amount)
    warmup_iters: int = setting(500, "iterations of linear warm-up, an epoch at most", binds=COURSE, type=not_negative)
    warmup_factor: float = setting(
        1 / 3, "share of lr that the warm-up starts from", binds=COURSE, type=number(float, 1e-6, 1)
    )
    clip_grad_norm: float = setting(35.0, "largest norm of the gradient; 0: any", binds=COURSE, type=amount)
    ema: float | None = setting(
        None,
        "evaluate and keep an exponential moving average of the weights, too, with this decay, e.g. 0.9998",
        binds=COURSE,
        type=number(float, 0, 1),
        metavar="DECAY",
    )
    patience: int | None = setting(
        None, "end after N evaluated epochs without a higher AP (an RPN: AR1000)", type=positive, metavar="N"
    )
    max_skipped_steps: int = setting(
        10,
        "steps of an epoch that may be skipped because a loss or gradient is not finite",
        type=not_negative,
        metavar="N",
    )
    amp: str | None = setting(
        None,
        "mixed precision; without a value fp16",
        binds=COURSE,
        nargs="?",
        const="fp16",
        choices=["fp16", "bf16"],
    )
    seed: int = setting(0, "of weights, order, augmentation and sampling", binds=COURSE, type=int)
    use_deterministic_algorithms: bool = setting(False, "same bits every run, where torch can; slower")


@dataclass(frozen=True)
class RunConfig:
    """The place of the run, and its reports. The command line settles ``output_dir``."""

    device: str = setting("auto", "cuda, cpu, ...; auto: cuda if there is one")
    output_dir: Path = setting(None, "default: a new folder in runs/, or that of --resume", type=Path)
    resume: Path | None = setting(
        None,
        "checkpoint to continue from, or with --test-only to evaluate; its settings replace the defaults. auto: that "
        "of --output-dir, if there is one",
        type=Path,
        metavar="FILE|auto",
    )
    checkpoint_steps: int | None = setting(None, "also save every N steps of the optimizer", type=positive, metavar="N")
    checkpoint_minutes: float | None = setting(
        None, "also save when the last checkpoint is M minutes old", type=amount, metavar="M"
    )
    start_epoch: int = setting(
        0, "epoch to start counting from", "--start_epoch", binds=COURSE, type=not_negative, metavar="N"
    )
    test_only: bool = setting(False, "evaluate, do not train")
    check_data: bool = setting(False, "report on the data and its faults, do not train")
    dump_proposals: Path | None = setting(
        None,
        "write the proposals of all images for libra_fastrcnn, by an RPN or Faster R-CNN, do not train",
        type=Path,
        metavar="FILE",
    )
    dry_run: bool = setting(False, "train, save, continue, evaluate and predict on a few images, then end")
    replay: Path | None = setting(
        None, "repeat a step that was skipped, from the file that was saved of it", type=Path, metavar="FILE"
    )
    limit_batches: int | None = setting(
        None,
        "steps of an epoch and batches of an evaluation at most, to try things out",
        binds=COURSE,
        type=positive,
        metavar="N",
    )
    print_freq: int = setting(20, "iterations between reports", type=positive, metavar="N")
    tensorboard: bool = setting(False, "also log metrics and the IoUs of sampled negatives for TensorBoard")
    coco_backend: str = setting("faster-coco-eval", "computes AP", choices=["faster-coco-eval", "pycocotools"])
    dist_url: str = setting("env://", "where processes started by torchrun meet")


@dataclass(frozen=True)
class Config:
    """All settings of a run, in the groups of its flags."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    libra: LibraConfig = LibraConfig()
    conventions: ConventionsConfig = ConventionsConfig()
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
    return {each.name: each for group in fields(Config) for each in fields(group.type)}  # type: ignore[arg-type]


def _part(values: dict[str, Any], group: Any) -> dict[str, Any]:
    names = {each.name for each in fields(group)}
    return {name: value for name, value in values.items() if name in names}
