"""Shows what IoU-balanced sampling chooses on your data, beside random sampling: figures 3 and 6 of Libra R-CNN.

    python examples/plot_sampling.py                                                # drawn shapes, random weights
    python examples/plot_sampling.py --data-path coco --resume runs/.../checkpoint.pth -b 8

Takes the options of the training script, and one batch of its training images. Prints the share of the negatives in
each interval of IoU and writes sampling_ious.png and sampling_boxes.png to the output folder. Hard negatives are those
that the model takes for objects most; they mean something for trained weights only.
"""

import sys
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from balanced_learning import IoUBalancedSampler
from dataset import Target
from errors import UserError
from figures import model_and_images
from options import parse_args

mpl.use("Agg")
import matplotlib.pyplot as plt

INTERVALS = 10  # that the histogram divides [0, max_iou] into
DRAWS = 50  # that it averages
SHOWN_IMAGES = 3
SHOWN_BOXES = 60  # of an image, spread evenly over those chosen in order of IoU


class Candidates(NamedTuple):
    """What the samplers choose from in an image of the size the model works on."""

    image: Tensor  # [3, H, W], from 0 to 1
    gt_boxes: Tensor  # [G, 4], xyxy in pixels
    boxes: Tensor  # [M, 4]
    labels: Tensor  # [M]
    ious: Tensor  # [M]
    matched_idxs: Tensor  # [M]
    hardness: Tensor  # [M], the classification loss if the box is background


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_args(argv))
    except UserError as error:
        sys.exit(f"error: {error}")


def run(args: Namespace) -> None:
    if args.model != "libra_fasterrcnn":
        raise UserError(f"--model {args.model}: it trains on all anchors and samples none")
    args.sampler = True
    model, dataset = model_and_images(args)
    candidates = find_candidates(model, [dataset[i] for i in range(len(dataset))], args.device)

    balanced = model.roi_heads.fg_bg_sampler
    random = BalancedPositiveNegativeSampler(balanced.batch_size_per_image, balanced.positive_fraction)
    shares = interval_shares(candidates, balanced, random)
    print(table(shares, balanced.max_iou))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    plot_shares(shares, balanced.max_iou, args.output_dir / "sampling_ious.png")
    plot_boxes(candidates[:SHOWN_IMAGES], balanced, random, args.output_dir / "sampling_boxes.png")
    print(f"wrote sampling_ious.png and sampling_boxes.png to {args.output_dir}")


@torch.no_grad()
def find_candidates(model: Any, samples: list[tuple[Tensor, Target]], device: str) -> list[Candidates]:
    """The boxes that one training step would choose from."""
    model.rpn.train()  # in training it proposes more
    images = [image.to(device) for image, _ in samples]
    targets = [{key: target[key].to(device) for key in ("boxes", "labels")} for _, target in samples]
    batch, targets = model.transform(images, targets)
    features = model.backbone(batch.tensors)
    proposals, _ = model.rpn(batch, features, targets)
    boxes, matches = model.roi_heads.candidates(proposals, targets)
    pooled = model.roi_heads.box_head(model.roi_heads.box_roi_pool(features, boxes, batch.image_sizes))
    hardness = -model.roi_heads.box_predictor(pooled)[0].log_softmax(dim=1)[:, 0]
    resized = [
        F.interpolate(image[None], size, mode="bilinear")[0].cpu()
        for image, size in zip(images, batch.image_sizes, strict=True)
    ]
    hardness = hardness.split([len(each) for each in boxes])
    return [
        Candidates(image, target["boxes"].cpu(), *(each.cpu() for each in columns))
        for image, target, *columns in zip(resized, targets, boxes, *matches[:3], hardness, strict=True)
    ]


def interval_shares(
    candidates: list[Candidates], balanced: IoUBalancedSampler, random: BalancedPositiveNegativeSampler
) -> dict[str, Tensor]:
    """The share of negatives in each interval of IoU: of all, the hard ones, and those chosen. [INTERVALS] each"""
    chosen: dict[str, list[Tensor]] = {"all": [], "hard": [], "random": [], "IoU-balanced": []}
    for each in candidates:
        negative = each.labels == 0
        hardest = each.hardness[negative].topk(min(balanced.batch_size_per_image, int(negative.sum()))).indices
        chosen["all"].append(each.ious[negative])
        chosen["hard"].append(each.ious[negative][hardest])
        for _ in range(DRAWS):
            chosen["random"].append(each.ious[draw_random(each, random)])
            chosen["IoU-balanced"].append(each.ious[draw_balanced(each, balanced)])
    top = balanced.max_iou or 1.0
    counts = {name: torch.cat(ious).clamp(max=top).histc(INTERVALS, 0, top) for name, ious in chosen.items()}
    return {name: count / count.sum().clamp(min=1) for name, count in counts.items()}


def draw_balanced(each: Candidates, sampler: IoUBalancedSampler) -> Tensor:
    """A mask of the negatives. [M]"""
    return sampler([each.labels], [each.ious], [each.matched_idxs])[1][0]


def draw_random(each: Candidates, sampler: BalancedPositiveNegativeSampler) -> Tensor:
    return sampler([each.labels])[1][0].bool()


def table(shares: dict[str, Tensor], max_iou: float | None) -> str:
    edges = torch.linspace(0, max_iou or 1.0, INTERVALS + 1).tolist()
    lines = [f"{'share of negatives with IoU':>28}" + "".join(f"{name:>14}" for name in shares)]
    for i, (low, high) in enumerate(pairwise(edges)):
        values = "".join(f"{100 * share[i].item():>12.1f} %" for share in shares.values())
        lines.append(f"{f'{low:.2f} to {high:.2f}':>28}{values}")
    return "\n".join(lines)


def plot_shares(shares: dict[str, Tensor], max_iou: float | None, path: Path) -> None:
    """As figure 3: how the negatives are spread over IoU."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    edges = torch.linspace(0, max_iou or 1.0, INTERVALS + 1)
    width = (edges[1] - edges[0]).item() / (len(shares) + 1)
    for i, (name, share) in enumerate(shares.items()):
        axis.bar((edges[:-1] + (i + 1) * width).numpy(), 100 * share.numpy(), width, label=name)
    axis.set(xlabel="IoU with the nearest ground truth", ylabel="share of the negatives in %", xticks=edges.tolist())
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_boxes(
    candidates: list[Candidates], balanced: IoUBalancedSampler, random: BalancedPositiveNegativeSampler, path: Path
) -> None:
    """As figure 6: the negatives that one draw of each sampler chooses, some of them shown, coloured by IoU."""
    figure, axes = plt.subplots(
        len(candidates), 2, figsize=(11, 4.2 * len(candidates)), squeeze=False, layout="constrained"
    )
    top = balanced.max_iou or 1.0
    color_of = plt.get_cmap("plasma")
    for each, (left, right) in zip(candidates, axes, strict=True):
        for axis, mask in ((left, draw_random(each, random)), (right, draw_balanced(each, balanced))):
            axis.imshow(0.7 * each.image.permute(1, 2, 0).numpy().clip(0, 1))
            chosen = mask.nonzero().flatten()
            by_iou = chosen[each.ious[chosen].argsort()]
            for index in by_iou[torch.linspace(0, len(by_iou) - 1, min(SHOWN_BOXES, len(by_iou))).long()].tolist():
                iou = each.ious[index].item()
                _outline(axis, each.boxes[index].tolist(), color_of(iou / top), 0.6 + 1.4 * iou / top)
            for box in each.gt_boxes.tolist():
                _outline(axis, box, "lime", 2)
            near = int((each.ious[mask] >= 0.1 * top).sum())
            axis.set_title(f"{len(chosen)} negatives, {near} with IoU of {0.1 * top:.2g} or more", size=10)
            axis.set_axis_off()
    axes[0, 0].set_title("random: " + axes[0, 0].get_title(), size=10)
    axes[0, 1].set_title("IoU-balanced: " + axes[0, 1].get_title(), size=10)
    figure.colorbar(
        mpl.cm.ScalarMappable(mpl.colors.Normalize(0, top), color_of),
        ax=axes,
        label="IoU with the nearest ground truth (green)",
        shrink=0.6,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _outline(axis: plt.Axes, box: list[float], color: object, width: float) -> None:
    x1, y1, x2, y2 = box
    axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width))


if __name__ == "__main__":
    main()
