"""The maps of a pyramid, in the list, tuple or dict that a detector keeps them in."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

from torch import Tensor, nn

Features = TypeVar("Features", list[Tensor], tuple[Tensor, ...], dict[str, Tensor])


def levels_of(features: Features) -> list[Tensor]:
    """The maps alone, finest first."""
    if not isinstance(features, list | tuple | Mapping):
        raise TypeError(f"features must be a list, tuple or dict of tensors, got {type(features).__name__}")
    return list(features.values()) if isinstance(features, Mapping) else list(features)


def like(features: Features, levels: list[Tensor]) -> Features:
    """The levels in a container like that of the features, with the same keys."""
    if isinstance(features, Mapping):
        # By its name, as torch.compile knows it; other mappings take more than their items.
        kind: Callable = OrderedDict if isinstance(features, OrderedDict) else dict
        return kind(zip(features, levels, strict=True))
    return getattr(type(features), "_make", type(features))(levels)  # named tuples take no list


class Neck(nn.Module):
    """A module from the maps of a pyramid to as many maps. TorchScript has no type for the containers it takes."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script does not take {type(self).__name__}: use torch.jit.trace, torch.export or torch.onnx, "
            "or leave it out by apply_libra(model, pyramid=False, path_aggregation=False)"
        )
