"""What the installation consists of and which implementation serves a call."""

import platform
from importlib import metadata
from pathlib import Path

import torch


def backend_info() -> dict[str, str]:
    """Reports the installed versions and the implementation in use, in words fit for a bug report.

    Returns:
        dict: ``balanced_learning``, ``torch``, ``python``: versions; ``cuda``: the CUDA version torch was built for;
        ``gpu``: the devices torch sees; ``driver``: the CUDA version of their driver, as 13000 for 13.0; ``files``:
            where the package is; ``balanced_l1_loss``: what computes the loss, and why.

    Example:
        >>> backend_info()["torch"] == torch.__version__
        True
    """
    try:
        version = metadata.version("balanced-learning")
    except metadata.PackageNotFoundError:
        version = "unknown: used without being installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    driver = str(torch._C._cuda_getDriverVersion()) if gpus else "none that torch can use"  # type: ignore[attr-defined]
    return {
        "balanced_learning": version,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none: this torch is built for the CPU alone",
        "gpu": ", ".join(gpus) or "none that torch can use",
        "driver": driver,
        "files": str(Path(__file__).parent),
        "balanced_l1_loss": "plain PyTorch: this version has no compiled kernels",
    }
