"""setuptools as the build backend, with torch as a requirement where kernels will be compiled, and only there."""

import os
import shutil

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]


def _torch() -> list[str]:
    mode = os.environ.get("BALANCED_LEARNING_BUILD", "auto")
    compiles = shutil.which(os.environ.get("CXX", "c++")) if mode == "auto" else mode != "none"
    return ["torch>=2.11"] if compiles else []
