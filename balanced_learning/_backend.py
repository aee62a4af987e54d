"""Which compiled kernels there are, and why the others do not serve."""

import ctypes
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

_LIBRARIES = {kind: Path(__file__).with_name(f"_{kind}.so") for kind in ("cpu", "cuda")}
_DRIVERS = {12: "NVIDIA driver 525 or newer", 13: "NVIDIA driver 580 or newer"}  # by the CUDA version of the kernels


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
    """Whether compiled kernels can run on the device."""
    return _problem(device) is None


def backend_info() -> dict[str, str]:
    """Reports the installed versions and the implementation in use, in words fit for a bug report.

    Returns:
        dict: ``balanced_learning``, ``torch``, ``python``: versions; ``cuda``: the CUDA version torch was built for;
        ``gpu``: the devices torch sees; ``driver``: the CUDA version of their driver; ``files``: the kernels that were
        loaded; ``kernels``: what computes the loss and draws the samples on each device, and why.

    Example:
        >>> backend_info()["torch"] == torch.__version__
        True
    """
    try:
        version = metadata.version("balanced-learning")
    except metadata.PackageNotFoundError:
        version = "unknown: used without being installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    served = [f"CPU: {_served(_problem(torch.device('cpu')))}"]
    served += [f"{name}: {_served(_problem(torch.device('cuda', i)))}" for i, name in enumerate(gpus)]
    if not gpus:
        served.append(f"CUDA: {_served(_absence('cuda') or 'the kernels are there, but torch sees no GPU')}")
    driver = torch._C._cuda_getDriverVersion() if gpus else 0  # type: ignore[attr-defined]
    files = [str(path) for kind, path in _LIBRARIES.items() if _absence(kind) is None]
    return {
        "balanced_learning": version,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none: this torch is built for the CPU alone",
        "gpu": ", ".join(gpus) or "none that torch can use",
        "driver": f"CUDA {driver // 1000}.{driver % 1000 // 10}" if gpus else "none that torch can use",
        "files": ", ".join(files) or f"no kernels in {Path(__file__).parent}",
        "kernels": "; ".join(served),
    }


def _served(problem: str | None) -> str:
    return f"plain PyTorch ({problem})" if problem else "compiled kernels"


def _absence(kind: str) -> str | None:
    """Why the kernels are not loaded, if they are not."""
    if not _LIBRARIES[kind].exists():
        return f"not built: reinstall with BALANCED_LEARNING_BUILD={kind}, which will say what it needs"
    if kind == "cuda" and torch.version.cuda is None:
        return "not loaded: this torch is built for the CPU alone; install one with CUDA"
    return None


@cache
def _problem(device: torch.device) -> str | None:
    """Why kernels cannot run on the device, if they cannot."""
    if device.type not in _LIBRARIES:
        return f"there are no kernels for {device.type}"
    absence = _absence(device.type)
    if absence or device.type == "cpu":
        return absence

    status = ctypes.CDLL(str(_LIBRARIES["cuda"])).balanced_learning_cuda_status
    status.restype = ctypes.c_char_p
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    error = status(device.index, ctypes.byref(driver), ctypes.byref(runtime))
    if error is None:
        return None
    needed, offered = runtime.value // 1000, driver.value // 1000
    if offered < needed:
        remedy = _DRIVERS.get(needed, "a newer NVIDIA driver")
        return f"the driver is for CUDA {offered}, the kernels need CUDA {needed}: install {remedy}"
    return f"the kernels do not run on this GPU: {error.decode()}"
