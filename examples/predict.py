"""Finds objects in images with a detector that the training script has trained.

    python examples/predict.py runs/.../checkpoint_best.pth street.jpg
    python examples/predict.py runs/.../checkpoint_best.pth photos "more/*/*.png" --score 0.3 --output-dir found

Takes images, folders, which are searched with all folders in them, and patterns. Writes a picture with the boxes of
each image, a small one enlarged, and predictions.json: a list with file, boxes (x1, y1, x2, y2 in pixels of the upright
image), scores and labels of each image. What cannot be read is named and left out; what is done when the program is
stopped is kept.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from balanced_learning.training import files, load_detector
from balanced_learning.training.data.image_files import find_images, picture_files
from balanced_learning.training.distributed import find_device
from balanced_learning.training.errors import UserError, warn
from balanced_learning.training.inference import Prediction, predict_files
from balanced_learning.training.output_folder import require_writable
from balanced_learning.training.reporting.pictures import detection_marks, draw_marks


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pth or checkpoint_best.pth of a run")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="image, folder, or pattern such as 'photos/**/*.jpg'")
    parser.add_argument("--output-dir", type=Path, help="default: a folder predictions/ beside the checkpoint")
    parser.add_argument(
        "--score", type=float, default=0.5, help="lowest score shown (default: 0.5; there is none below 0.05)"
    )
    parser.add_argument("--device", default="auto", help="cuda, cpu, ...; auto: cuda if there is one")
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    if not 0 <= options.score <= 1:
        raise UserError(f"--score {options.score:g}: must be from 0 to 1")
    folder = options.output_dir or options.checkpoint.parent / "predictions"
    images = find_images(options.paths, folder)
    pictures = picture_files(images, folder)
    detector = load_detector(options.checkpoint, find_device(options.device))
    require_writable(folder)

    records: list[dict[str, Any]] = []
    interrupted, num_unread = False, 0
    try:
        for prediction, picture in zip(predict_files(detector, images, options.score), pictures, strict=True):
            if isinstance(prediction, UserError):
                num_unread += 1
                with tqdm.external_write_mode():  # not into the line of the progress bar
                    warn(str(prediction))
                continue
            save_picture(picture, prediction, detector.categories)
            records.append(prediction.record(detector.categories))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        write_records(folder / "predictions.json", records)

    if num_unread == len(images):
        raise UserError(f"no image could be read, of {num_unread}")
    num_found = sum(len(record["boxes"]) for record in records)
    print(f"images: {len(records)}; objects: {num_found} with a score of {options.score:g} or more")
    if not num_found:
        print("nothing is that sure; --score takes a lower one")
    if num_unread:
        print(f"left out: {num_unread} of {len(images)} images, which the warnings name")
    print(f"wrote the pictures and predictions.json to {folder}")
    if interrupted:
        sys.exit(f"stopped after {len(records) + num_unread} of {len(images)} images")


def save_picture(path: Path, prediction: Prediction, names: dict[int, str]) -> None:
    drawn = draw_marks(prediction.image, detection_marks(prediction.found, names))
    files.make_folder(path.parent)
    form = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    files.write_whole(path, lambda file: drawn.save(file, form, quality=92, subsampling=0))


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """A line an image."""
    files.write_text(path, "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")


if __name__ == "__main__":
    main()
