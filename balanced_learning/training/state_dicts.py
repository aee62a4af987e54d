"""State dicts in files: reading what others saved, and loading it with the first misfit named."""

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from balanced_learning.training.errors import UserError, printable
from balanced_learning.training.opening import open_file

_DIRECTORY = 0x10  # attribute of an entry of a zip file
_ENTRIES = ("model", "state_dict", "model_state_dict")
_OTHER = "damaged, or another kind of file"
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DataParallel and averages, torch.compile, Lightning


class LeftOut:
    """What a file holds beside tensors and plain values, and nothing of it: no code of the file is run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_tensors(path: Path, source: str, *, hint: str = "", leaves_out: bool = False) -> Any:
    """Reads a file of torch.save or safetensors that holds tensors and plain values. No code of it is run.

    The checksums in a file of torch.save, which ``torch.load`` passes over, are verified.

    Args:
        path: the file.
        source: how errors name it.
        hint: what an error adds where no file can be opened.
        leaves_out: whether other objects in the file become :class:`LeftOut`, where ``torch.load`` can name them.

    Raises:
        UserError: if it cannot be read, or holds other things.
    """
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path, source)
        # torchvision's programs save their arguments as a Namespace.
        allowed: list[Any] = [argparse.Namespace]
        with open_file(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about forms of its files
            if zipfile.is_zipfile(file):
                _verify(file)
                if leaves_out:
                    file.seek(0)
                    others = torch.serialization.get_unsafe_globals_in_checkpoint(file)
                    allowed += [(LeftOut, name) for name in others]
            file.seek(0)
            with torch.serialization.safe_globals(allowed):
                return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error}){hint}") from None
    except UserError:
        raise
    except _DamagedError as error:
        raise UserError(f"{source}: damaged: {error}") from None
    except Exception as error:  # whatever zip and pickle make of other bytes
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"with a {printable(found[1])[:80]} in it; save a state_dict() alone" if found else _OTHER
        raise UserError(f"{source}: not a checkpoint of tensors and plain values: {what}") from None


class _DamagedError(Exception):
    """Names what is damaged."""


def _verify(file: BinaryIO) -> None:
    """Compares every entry of a zip file with its checksum. Only what torch.save could have written is read."""
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > size:
            raise _DamagedError("its entries are longer than the file")
        for entry in entries:
            is_packed = entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
            if is_packed or entry.is_dir() or entry.external_attr & _DIRECTORY:  # of which torch.load reads nothing
                raise _DamagedError(f"{printable(entry.filename)[:80]} (not as torch.save writes it)")
        if not any(entry.CRC for entry in entries):  # as torch.serialization.set_crc32_options(False) has it
            return
        for entry in entries:
            try:
                with archive.open(entry) as content:
                    while content.read(1 << 22):
                        pass
            except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
                raise _DamagedError(f"{printable(entry.filename)[:80]} ({printable(error)[:80]})") from None


def _read_safetensors(path: Path, source: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{source}: needs the package safetensors") from None
    open_file(path).close()
    return load_file(path)


def find_state_dict(content: Any, source: str) -> dict[str, Tensor]:
    """The state dict in the content of a file: as it is or as an entry, its keys without the prefixes of wrappers.

    Raises:
        UserError: if there is none; names the first entry that is no tensor.
    """
    entries = content if isinstance(content, Mapping) else {}
    nested = next((entries[key] for key in _ENTRIES if isinstance(entries.get(key), Mapping)), entries)
    state = {key: value for key, value in nested.items() if key != "n_averaged"}
    if not state:
        raise UserError(f"{source}: holds no state dict")
    for key, value in state.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise UserError(f"{source}: no state dict: {key!r} is a {type(value).__name__}")
    while prefix := next((prefix for prefix in _WRAPPERS if all(key.startswith(prefix) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load(
    module: nn.Module, state: Mapping[str, Tensor], source: str, *, may_miss: tuple[str, ...] = (), hint: str = ""
) -> list[str]:
    """Loads a state dict in which only keys with the prefixes ``may_miss`` may miss, and returns those that do.

    Raises:
        UserError: if something does not fit; names the first misfit, with ``hint`` behind it.
    """
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a headline, and a line for each tensor of another shape
        misfit = str(error).splitlines()[1].strip().rstrip(".")
    else:
        lacking = [key for key in missing if not key.startswith(may_miss)]
        if not (lacking or unexpected):
            return missing
        misfit = f"it has no {lacking[0]}" if lacking else f"{unexpected[0]!r} has no place in the model"
    raise UserError(f"{source}: does not fit: {misfit}{hint}")
