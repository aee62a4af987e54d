"""Checks saved states against the parts that load them, before a step could use what does not fit."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from balanced_learning.training.errors import shown

_FLOAT = torch.finfo(torch.float32)
# What training changes, and its bounds; all else follows from the settings.
_CHANGING = {"lr": (0, _FLOAT.max), "scale": (_FLOAT.tiny, _FLOAT.max), "_growth_tracker": (0, 2**31 - 1)}
_WAYS = ("foreach", "fused", "capturable", "differentiable")  # of computing a step; those of this machine stay


def load_state(part: Any, saved: Any) -> None:
    """Loads the saved state of a module, an optimizer or a scaler.

    Raises:
        ValueError: for the first entry that is none of this part: of another type, shape or value.
    """
    fresh = part.state_dict()
    if isinstance(part, nn.Module):
        state = _checked_dict(saved, set(fresh), "it")
        for name, tensor in fresh.items():
            _check_tensor(state[name], tensor.shape, tensor.dtype, name)
    elif isinstance(part, Optimizer):
        state = _checked_dict(saved, set(fresh), "it")
        groups = _updated(fresh["param_groups"], state["param_groups"], "param_groups")
        state = {"state": _optimizer_states(part, state["state"], set(fresh["state"])), "param_groups": groups}
    else:
        state = _updated(fresh, saved, "it")
    try:
        part.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(shown(error)) from None


def check_tensors(state: Any) -> None:
    """Looks at a state dict before a model is built for it.

    Raises:
        ValueError: if something in it is no tensor of plain numbers in memory.
    """
    if not isinstance(state, dict):
        raise ValueError(f"it is {shown(state)}, no state dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not is_plain(tensor):
            raise ValueError(f"{shown(name)} is no tensor of plain numbers, but a {type(tensor).__name__}")


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor with memory for each of its elements, so that the file bounds its size."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _check_tensor(saved: Any, shape: torch.Size, dtype: torch.dtype, where: str) -> None:
    if not is_plain(saved):
        raise ValueError(f"{where} is no tensor of plain numbers, but a {type(saved).__name__}")
    if saved.shape != shape:
        raise ValueError(f"{where} has the shape {list(saved.shape)}, not {list(shape)}")
    if saved.dtype != dtype:
        raise ValueError(f"{where} has the type {saved.dtype}, not {dtype}")
    if not saved.isfinite().all():
        raise ValueError(f"{where} has values that are not finite")


def _checked_dict(saved: Any, names: set[str], where: str) -> dict[str, Any]:
    if not isinstance(saved, Mapping):
        raise ValueError(f"{where} is {shown(saved)}, not a dict")
    for name in sorted(names - saved.keys()):
        raise ValueError(f"{where} has no {name}")
    for name in saved.keys() - names:
        raise ValueError(f"{where} has an entry {shown(name)} that has no place in it")
    return dict(saved)


def _updated(fresh: Any, saved: Any, where: str, name: str = "") -> Any:
    """The fresh value with what training changes as it was saved; all else must be the same, or left out."""
    if isinstance(fresh, dict):
        if not isinstance(saved, dict):
            raise ValueError(f"{where} is {shown(saved)}, not a dict")
        result = dict(fresh)
        for key, value in fresh.items():
            if key in saved and key not in _WAYS:
                result[key] = _updated(value, saved[key], f"{where}.{key}", key)
            elif key in _CHANGING:
                raise ValueError(f"{where} has no {key}")
        return type(fresh)(result)
    if isinstance(fresh, list | tuple):
        if type(saved) is not type(fresh) or len(saved) != len(fresh):
            raise ValueError(f"{where} is {shown(saved)}, not a {type(fresh).__name__} of {len(fresh)}")
        return type(fresh)(
            _updated(f, s, f"{where}[{i}]", name) for i, (f, s) in enumerate(zip(fresh, saved, strict=True))
        )
    if name in _CHANGING:
        low, high = _CHANGING[name]
        kinds = (int, float) if type(fresh) is float else (type(fresh),)
        if type(saved) not in kinds or not low <= saved <= high:
            raise ValueError(f"{where} is {shown(saved)}")
        return saved
    if type(saved) is not type(fresh) or saved != fresh:
        raise ValueError(f"{where} is {shown(saved)}, not {shown(fresh)}")
    return fresh


def _optimizer_states(optimizer: Optimizer, saved: Any, needed: set[int]) -> dict[int, dict[str, Any]]:
    """The saved states of parameters, in memory of their own. All but the needed may have had no gradient yet."""
    if not isinstance(saved, dict):
        raise ValueError(f"state is {shown(saved)}, not a dict")
    parameters: dict[int, Any] = {}
    for group in optimizer.param_groups:
        example = _example_state(optimizer, group)
        for parameter in group["params"]:
            parameters[len(parameters)] = parameter, example
    for index in saved:
        if type(index) is not int or index not in parameters:
            raise ValueError(f"state has an entry {shown(index)}, and there are {len(parameters)} parameters")
    for index in sorted(needed - saved.keys()):
        raise ValueError(f"state has no entry {index}")
    states = {}
    for index in saved:
        parameter, example = parameters[index]
        where = f"state[{index}]"
        state = _checked_dict(saved[index], set(example), where)
        for name, value in example.items():
            shape = parameter.shape if value.dim() else value.shape
            dtype = parameter.dtype if value.dim() else value.dtype
            _check_tensor(state[name], shape, dtype, f"{where}.{name}")
            if not value.dim() and state[name] < 0:
                raise ValueError(f"{where}.{name} is {shown(state[name].item())}")
        states[index] = {name: tensor.detach().clone() for name, tensor in state.items()}
    return states


def _example_state(optimizer: Any, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state that a step makes of a parameter of this group: with dimensions where it has the parameter's."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    options = {name: value for name, value in group.items() if name not in _WAYS}
    other = type(optimizer)([options | {"params": [parameter]}], lr=0.1)
    other.step()
    return dict(other.state[parameter])
