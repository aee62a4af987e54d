"""What the installation consists of and which implementation serves a call."""

import platform
from importlib import metadata

import torch


def backend_info() -> dict[str, str]:
    """Reports the installed versions and the implementation in use, in words fit for a bug report.

    Returns:
        dict: ``balanced_learning``, ``torch``, ``python``: versions; ``cuda``: the CUDA version torch was built for;
        ``gpu``: the devices torch sees; ``balanced_l1_loss``: what computes the loss, and why.

    Example:
        >>> backend_info()["torch"] == torch.__version__
        True
    """
    try:
        version = metadata.version("balanced-learning")
    except metadata.PackageNotFoundError:
        version = "unknown: used without being installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "balanced_learning": version,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none: this torch is built for the CPU alone",
        "gpu": ", ".join(gpus) or "none that torch can use",
        "balanced_l1_loss": "plain PyTorch: this version has no compiled kernels",
    }
