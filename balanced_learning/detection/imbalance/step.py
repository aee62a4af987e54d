"""A training step of a detector as far as it is measured."""

from typing import Any

from torch import Tensor


def propose(model: Any, batch: Any, features: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[Tensor]:
    """The proposals of a training step: in training the RPN proposes more."""
    was_training = model.rpn.training
    model.rpn.train()
    try:
        return model.rpn(batch, features, targets)[0]
    finally:
        model.rpn.train(was_training)
