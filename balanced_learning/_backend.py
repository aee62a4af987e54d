"""Which compiled kernels serve, and if they do not, why."""

import ctypes
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

_LIBRARIES = {"cpu": Path(__file__).with_name("_cpu.so"), "cuda": Path(__file__).with_name("_cuda.so")}
_FIRST_DRIVER = {12: 525, 13: 580}  # of each CUDA major version


def load() -> None:
    """Loads the kernels that are installed and that this torch can run.

    Raises:
        ImportError: if a library is there but does not load. Without it the plain formula would serve, slower and
            unnoticed.
    """
    for name, path in _LIBRARIES.items():
        if _absence(name) is None:
            try:
                torch.ops.load_library(path)
            except OSError as error:
                raise ImportError(f"{path} is broken: {error}. Install balanced-learning anew.") from error


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether compiled kernels can run on the device."""
    return _problem(device.type, device.index) is None


def backend_info() -> dict[str, str]:
    """Reports the installed versions and the kernels in use, in words fit for a bug report.

    Returns:
        dict: ``balanced_learning``, ``torch``, ``python``: versions; ``cuda``: the CUDA version torch was built for;
        ``gpu``: the devices torch sees; ``cpu_kernels``, ``cuda_kernels``: whether compiled kernels are in use there,
        and if not, why. Where they are not, the plain formula computes the loss.

    Example:
        >>> backend_info()["torch"] == torch.__version__
        True
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cuda_problems = [_problem("cuda", i) for i in range(len(gpus))] or [
        _absence("cuda") or "installed, but torch sees no GPU"
    ]
    return {
        "balanced_learning": metadata.version("balanced-learning"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none: this torch is built for the CPU alone",
        "gpu": ", ".join(gpus) or "none that torch can use",
        "cpu_kernels": _problem("cpu", None) or "in use",
        "cuda_kernels": "; ".join(problem or "in use" for problem in dict.fromkeys(cuda_problems)),
    }


def _absence(name: str) -> str | None:
    """Why the kernels are not loaded, if they are not."""
    if not _LIBRARIES[name].exists():
        return f"not built: reinstall with BALANCED_LEARNING_BUILD={name} to see what is missing"
    if name == "cuda" and torch.version.cuda is None:
        return "not loaded: this torch is built for the CPU alone; install one with CUDA to use the GPU"
    return None


@cache
def _problem(device_type: str, index: int | None) -> str | None:
    """Why the kernels cannot run on a device, if they cannot."""
    if device_type not in _LIBRARIES:
        return f"there are none for {device_type}"
    absence = _absence(device_type)
    if absence is not None or device_type == "cpu":
        return absence

    library = ctypes.CDLL(str(_LIBRARIES["cuda"]))
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    library.balanced_learning_cuda_status.restype = ctypes.c_char_p
    error = library.balanced_learning_cuda_status(index, ctypes.byref(driver), ctypes.byref(runtime))
    if error is None:
        return None
    needed, offered = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime.value, driver.value))
    if driver.value // 1000 < runtime.value // 1000:
        release = _FIRST_DRIVER.get(runtime.value // 1000)
        return (
            f"the driver supports CUDA {offered}, the kernels need CUDA {needed}: install "
            f"{f'NVIDIA driver {release} or newer' if release else 'a newer NVIDIA driver'}"
        )
    return f"the kernels, built with CUDA {needed}, do not run on this GPU: {error.decode()}"
