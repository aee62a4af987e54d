"""The command line: torchvision's reference flags where it has them, the paper's recipe for defaults."""

import argparse
from pathlib import Path

import distributed
from errors import UserError

PAPER_IMAGES = 16  # images an iteration, to which the paper's learning rates belong
PAPER_LR = {"libra_fasterrcnn": 0.02, "libra_retinanet": 0.01}

# Without --data-path: a small detector, from scratch on drawn shapes, on a CPU in minutes.
SHAPES_DEFAULTS = {
    "small": True,
    "batch_size": 4,
    "epochs": 6,
    "opt": "adamw",
    "lr": 0.001,
    "lr_scheduler": "cosineannealinglr",
    "warmup_iters": 60,
    "min_size": 128,
    "max_size": 160,
    "workers": 0,
}


def parse_args(argv: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The options, settled; ``parser`` may be one of :func:`make_parser` that has more of them."""
    parser = parser or make_parser()
    given, _ = parser.parse_known_args(argv)
    if given.data_path is None:
        parser.set_defaults(**SHAPES_DEFAULTS)
    args = parser.parse_args(argv)
    _settle(args)
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains Libra Faster R-CNN or Libra RetinaNet, or their torchvision baselines, on data in COCO "
        "layout; without --data-path on shapes it draws itself.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    on_off = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data")
    data.add_argument("--data-path", type=Path, help="folder with annotations/, train2017/ and val2017/, as COCO's")
    data.add_argument("--dataset", choices=["coco"], default="coco", help="layout of the data")
    data.add_argument(
        "--data-augmentation",
        choices=["none", "hflip", "multiscale", "lsj", "ssd", "ssdlite"],
        default="hflip",
        help="torchvision's policies",
    )
    data.add_argument("--keep-empty", action="store_true", help="also train on images without boxes")
    data.add_argument("--limit", type=_positive, metavar="N", help="use the first N images of each split")
    data.add_argument("-j", "--workers", type=_not_negative, default=4, metavar="N", help="loader processes")
    data.add_argument(
        "--aspect-ratio-group-factor", type=int, default=3, metavar="N", help="batches of like shape; negative: off"
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=list(PAPER_LR), default="libra_fasterrcnn", help="the detector")
    model.add_argument("--backbone", default="resnet50", help="any ResNet or ResNeXt of torchvision")
    model.add_argument("--sampler", action=on_off, default=True, help="IoU-balanced sampling (Faster R-CNN)")
    model.add_argument("--pyramid", action=on_off, default=True, help="balanced feature pyramid")
    model.add_argument(
        "--path-aggregation", action=on_off, default=False, help="bottom-up path of PAFPN behind the FPN's levels"
    )
    model.add_argument("--box-loss", action=on_off, default=True, help="balanced L1")
    model.add_argument("--rpn", action=on_off, default=False, help="balance the RPN, too (Faster R-CNN)")
    model.add_argument(
        "--small", action=on_off, default=False, help="a ResNet-18 detector that a CPU can train from scratch"
    )
    model.add_argument("--weights", metavar="NAME", help="torchvision's COCO weights to start from, e.g. DEFAULT")
    model.add_argument(
        "--weights-backbone",
        default="IMAGENET1K_V1",
        metavar="NAME",
        help="torchvision's ImageNet weights of the backbone; none: from scratch",
    )
    model.add_argument("--trainable-backbone-layers", type=int, choices=range(6), help="stages trained, from the last")
    model.add_argument("--rpn-score-thresh", type=float, default=0.0, help="lowest objectness of a proposal")
    model.add_argument("--min-size", type=_positive, default=800, help="shorter side of an image, in pixels")
    model.add_argument("--max-size", type=_positive, default=1333, help="longer side at most, in pixels")
    model.add_argument("--sync-bn", action="store_true", help="synchronize batch norm over processes")

    training = parser.add_argument_group("training")
    training.add_argument("-b", "--batch-size", type=_positive, default=2, metavar="N", help="images per process")
    training.add_argument("--epochs", type=_positive, default=12, metavar="N", help="passes over the data")
    training.add_argument("--opt", choices=["sgd", "sgd_nesterov", "adamw"], default="sgd", help="optimizer")
    training.add_argument(
        "--lr",
        type=float,
        help=f"learning rate, used as given; by default the paper's for {PAPER_IMAGES} images an iteration (Faster "
        "R-CNN 0.02, RetinaNet 0.01), scaled linearly with the images of all processes",
    )
    training.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    training.add_argument("--wd", "--weight-decay", dest="weight_decay", type=float, default=1e-4, help="weight decay")
    training.add_argument("--norm-weight-decay", type=float, help="weight decay of normalization layers, if another")
    training.add_argument("--lr-scheduler", choices=["multisteplr", "cosineannealinglr"], default="multisteplr")
    training.add_argument("--lr-steps", type=int, nargs="*", default=[8, 11], help="epochs after which lr drops")
    training.add_argument("--lr-gamma", type=float, default=0.1, help="factor of a drop")
    training.add_argument("--warmup-iters", type=_not_negative, default=500, help="iterations of linear warm-up")
    training.add_argument("--warmup-factor", type=float, default=1 / 3, help="share of lr that the warm-up starts from")
    training.add_argument("--clip-grad-norm", type=float, default=35.0, help="largest norm of the gradient; 0: any")
    training.add_argument(
        "--amp", nargs="?", const="fp16", choices=["fp16", "bf16"], help="mixed precision; without a value fp16"
    )
    training.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation and sampling")
    training.add_argument(
        "--use-deterministic-algorithms", action="store_true", help="same bits every run, where torch can; slower"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", help="cuda, cpu, ...; auto: cuda if there is one")
    run.add_argument("--output-dir", type=Path, help="default: a new folder in runs/, or that of --resume")
    run.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint to continue from")
    run.add_argument(
        "--start-epoch",
        "--start_epoch",
        type=_not_negative,
        default=0,
        metavar="N",
        help="epoch to start counting from",
    )
    run.add_argument("--test-only", action="store_true", help="evaluate, do not train")
    run.add_argument("--print-freq", type=_positive, default=20, metavar="N", help="iterations between reports")
    run.add_argument(
        "--tensorboard", action="store_true", help="also log metrics and the IoUs of sampled negatives for TensorBoard"
    )
    run.add_argument(
        "--coco-backend", choices=["faster-coco-eval", "pycocotools"], default="faster-coco-eval", help="computes AP"
    )
    run.add_argument("--dist-url", default="env://", help="where processes started by torchrun meet")
    return parser


def _settle(args: argparse.Namespace) -> None:
    """Resolves what depends on the machine or on other options."""
    import torch

    if args.weights_backbone.lower() == "none":
        args.weights_backbone = None
    if args.small and (args.weights or args.backbone != "resnet50"):
        flag = f"--weights {args.weights}" if args.weights else f"--backbone {args.backbone}"
        raise UserError(f"{flag}: a --small detector has its own backbone and no weights; pass --no-small")
    if args.weights and args.backbone != "resnet50":
        raise UserError(f"--weights {args.weights}: torchvision has COCO weights for --backbone resnet50 alone")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if args.resume and not args.resume.is_file():
        raise UserError(f"--resume {args.resume}: no such file")
    if args.output_dir is None:
        args.output_dir = args.resume.parent if args.resume else _new_folder(args)


def _new_folder(args: argparse.Namespace) -> Path:
    name = f"{args.model}-{args.data_path.resolve().name if args.data_path else 'shapes'}"
    taken = {path.name for path in Path("runs").glob(f"{name}*")}
    return Path("runs") / next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10_000))) if n not in taken)


def scale_lr(args: argparse.Namespace) -> str:
    """Settles the learning rate, and tells how, for the processes that have joined."""
    if args.lr is not None:
        return f"learning rate {args.lr:g}, as given"
    images = args.batch_size * distributed.world_size()
    args.lr = PAPER_LR[args.model] * images / PAPER_IMAGES
    return (
        f"learning rate {args.lr:g}: {PAPER_LR[args.model]:g} for {PAPER_IMAGES} images an iteration, scaled linearly "
        f"to {images}; --lr sets another"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value
