"""Makes a checkpoint of these programs of one of mmdetection.

    python examples/convert_mmdet_checkpoint.py libra_faster_rcnn_r50_fpn_1x_coco.pth libra_r50.pth
    python examples/predict.py libra_r50.pth street.jpg
    python examples/train_torchvision_libra.py --data-path coco --test-only --resume libra_r50.pth

Takes Faster R-CNN and RetinaNet of mmdetection 1 to 3, balanced or not, on a ResNet or ResNeXt of torchvision. No code
of the file is run; what is no tensor or plain value in it is left out. In a program,
balanced_learning.detection.from_mmdet takes the weights alone, and Mask R-CNN as well.
"""

import argparse
import sys
from pathlib import Path

from balanced_learning.training.errors import UserError
from balanced_learning.training.mmdet_checkpoint import convert


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path, help="checkpoint of mmdetection")
    parser.add_argument("target", metavar="OUT", type=Path, help="file to write")
    options = parser.parse_args(argv)
    try:
        print(convert(options.source, options.target))
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.target}")


if __name__ == "__main__":
    main()
