"""The build backend: setuptools, with torch as a requirement only where kernels will be compiled."""

import os
import shlex
import shutil
from itertools import takewhile

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

# A launcher such as ccache, if any, and the compiler; then the options that follow them.
CXX = shlex.split(os.environ.get("CXX") or "c++")
PROGRAMS = list(takewhile(lambda word: not word.startswith("-"), CXX))


def missing_compiler() -> str | None:
    """The first program of CXX that is not there, if any."""
    return next((program for program in PROGRAMS if shutil.which(program) is None), None)


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]


def _torch() -> list[str]:
    mode = os.environ.get("BALANCED_LEARNING_BUILD", "auto")
    compiles = missing_compiler() is None if mode == "auto" else mode != "none"
    return ["torch>=2.11"] if compiles else []
