"""What the scripts that draw figures share: the model and the images that the options of the training script name."""

from argparse import Namespace
from typing import Any

import torch

import checkpoint
from dataset import DetectionDataset
from errors import UserError
from model import build_model
from train_torchvision_libra import labels_of, made_for_of, read_data


def model_and_images(args: Namespace) -> tuple[Any, DetectionDataset]:
    """The model, with the weights of ``--resume``, and one batch of the training images that have boxes."""
    torch.manual_seed(args.seed)
    train, _ = read_data(args)
    label_of = labels_of(train, args.weights)
    model = build_model(args, max(label_of.values()) + 1).to(args.device)
    if args.resume:
        checkpoint.load(args.resume, {"model": model}, made_for_of(args, label_of))
    images = [image for image in train.images if train.boxes(image)][: args.batch_size]
    if not images:
        raise UserError(f"{train.json_file}: no image has a box")
    return model.eval(), DetectionDataset(train, label_of, images)
