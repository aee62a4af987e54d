"""The compiled kernels: which are loaded, whether they are switched on, and what a user is told of both."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

_LIBRARIES = {kind: Path(__file__).with_name(f"_{kind}.so") for kind in ("cpu", "cuda")}
_DRIVERS = {12: "NVIDIA driver 525 or newer", 13: "NVIDIA driver 580 or newer"}  # by the CUDA version of the kernels
_SWITCH = "BALANCED_LEARNING_KERNELS"


def _is_switched_on() -> bool:
    value = os.environ.get(_SWITCH, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{_SWITCH} must be 0 or 1, got {value!r}")
    return value == "1"


enabled = _is_switched_on()  # a plain global, which torch.compile can guard


@contextmanager
def use_kernels(enabled: bool) -> Iterator[None]:
    """Switches the compiled kernels on or off, for the loss and the sampler, inside a ``with`` block.

    Without kernels both are computed in plain PyTorch, more slowly and with other random draws from one seed. The
    choice is the process's, in all its threads. It begins with the environment variable ``BALANCED_LEARNING_KERNELS``,
    read when the library is imported: 0 is off, 1 or nothing is on. A loss goes backward as it went forward.

    Args:
        enabled (bool): whether to use the kernels wherever they can run; those that are not installed (see
            :func:`backend_info`) are not used either way.

    Example:
        >>> with use_kernels(False):
        ...     print(backend_info()["kernels"].split(" (")[0])
        CPU: plain PyTorch
    """
    before = globals()["enabled"]
    globals()["enabled"] = enabled
    try:
        yield
    finally:
        globals()["enabled"] = before


def load() -> None:
    """Loads the kernels that are installed and that this torch can use.

    Raises:
        ImportError: if kernels are there but do not load: to fall back then would hide it.
    """
    for kind, path in _LIBRARIES.items():
        if _absence(kind) is None:
            try:
                torch.ops.load_library(path)
            except OSError as error:
                raise ImportError(f"{path} is broken; reinstall balanced-learning. Its error: {error}") from error


def has_kernels(device: torch.device) -> bool:
    """Tells whether compiled kernels can run on the device, whether or not they are switched on."""
    return _problem(device) is None


def backend_info() -> dict[str, str]:
    """Reports the installed versions and the implementation in use, in words fit for a bug report.

    Returns:
        dict: ``balanced_learning``, ``torch``, ``python``: versions; ``cuda``: the CUDA version torch was built for;
        ``gpu``: the devices torch sees; ``driver``: the CUDA version of their driver; ``files``: the kernels that were
        loaded; ``kernels``: the implementation of loss and sampler on each kind of device, and why.

    Example:
        >>> backend_info()["torch"] == torch.__version__
        True
    """
    try:
        version = metadata.version("balanced-learning")
    except metadata.PackageNotFoundError:
        version = "unknown: used without being installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    # Of GPUs of one name one is asked, the current one if it can be: asking takes some of its memory.
    asked = {name: gpus.index(name) for name in gpus}
    if gpus:
        asked[torch.cuda.get_device_name()] = torch.cuda.current_device()
    used = [f"CPU: {_implementation(_problem(torch.device('cpu')))}"]
    used += [f"{name}: {_implementation(_problem(torch.device('cuda', i)))}" for name, i in asked.items()]
    if not gpus:
        used.append(f"CUDA: {_implementation(_absence('cuda') or 'the kernels are there, but torch sees no GPU')}")
    files = [str(path) for kind, path in _LIBRARIES.items() if _absence(kind) is None]
    return {
        "balanced_learning": version,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none: this torch is built for the CPU alone",
        "gpu": ", ".join(gpus) or "none that torch can use",
        "driver": _driver() if gpus else "none that torch can use",
        "files": ", ".join(files) or f"no kernels in {Path(__file__).parent}",
        "kernels": "; ".join(used),
    }


def _implementation(problem: str | None) -> str:
    if problem is None and not enabled:
        problem = f"the kernels are switched off, by {_SWITCH}=0 or use_kernels(False)"
    return f"plain PyTorch ({problem})" if problem else "compiled kernels"


def _driver() -> str:
    """The CUDA version of the driver, as the driver's library tells it: torch has no public name for it."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1").cuDriverGetVersion(
            ctypes.byref(version)
        )
    except OSError:
        return "unknown"
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _absence(kind: str) -> str | None:
    """The reason for which kernels are not loaded, or None."""
    if not _LIBRARIES[kind].exists():
        return f"not built: reinstall with BALANCED_LEARNING_BUILD={kind}, which will say what it needs"
    if kind == "cuda" and torch.version.cuda is None:
        return "not loaded: this torch is built for the CPU alone; install one with CUDA"
    return None


@cache
def _problem(device: torch.device) -> str | None:
    """The reason for which kernels cannot run on the device, or None."""
    if device.type not in _LIBRARIES:
        return f"there are no kernels for {device.type}"
    absence = _absence(device.type)
    if absence or device.type == "cpu":
        return absence

    cuda_error = ctypes.CDLL(str(_LIBRARIES["cuda"])).balanced_learning_cuda_error
    cuda_error.restype = ctypes.c_char_p
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    with torch.cuda.device(device):  # which, unlike cudaSetDevice, takes no memory of the device that it returns to
        error = cuda_error(ctypes.byref(driver), ctypes.byref(runtime))
    if error is None:
        return None
    needed, offered = runtime.value // 1000, driver.value // 1000
    if offered < needed:
        remedy = _DRIVERS.get(needed, "a newer NVIDIA driver")
        return f"the driver is for CUDA {offered}, the kernels need CUDA {needed}: install {remedy}"
    return f"the kernels do not run on this GPU: {error.decode()}"
