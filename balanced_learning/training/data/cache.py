"""The folder for what can be drawn or read again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``balanced-learning`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "balanced-learning"
