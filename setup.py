"""Builds the kernels that BALANCED_LEARNING_BUILD asks for: auto (those that the machine can build), none, cpu, cuda."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

COMPILER = os.environ.get("CXX", "c++")
NVCC = str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"))
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "7.5;8.0;8.6;9.0;10.0;12.0+PTX")

MODE = os.environ.get("BALANCED_LEARNING_BUILD", "auto")
TORCH = Path(find_spec("torch").origin).parent if find_spec("torch") else None

# The LibTorch stable ABI of torch 2.11: what is built with any later torch also runs with any later torch.
FLAGS = ["-O3", "-std=c++17", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def missing(kernels: str) -> str | None:
    """What it would take to build them."""
    if os.name == "nt":
        return "a Linux or macOS system"
    if TORCH is None:
        return "torch"
    if shutil.which(COMPILER) is None:
        return f"a C++ compiler ({COMPILER} is not there, and CXX does not name one)"
    if kernels == "cuda" and shutil.which(NVCC) is None:
        return f"nvcc ({NVCC} is not there; CUDA_HOME can say where it is)"
    if kernels == "cuda" and not list(TORCH.glob("lib/libtorch_cuda.*")):
        return "a torch with CUDA"
    return None


def command(kernels: str, source: str, output: str) -> list[str]:
    paths = [f"-I{TORCH}/include", f"-L{TORCH}/lib", source, "-o", output]
    if kernels == "cpu":
        options = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
        return [COMPILER, *FLAGS, *options, *paths, "-ltorch_cpu"]
    # nvcc links the CUDA runtime statically, so that it need not be that of torch.
    options = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-Xlinker=--exclude-libs,ALL", "-DUSE_CUDA", "--threads=0"]
    for architecture in ARCHITECTURES.replace(" ", ";").split(";"):
        number = architecture.removesuffix("+PTX").replace(".", "")
        codes = f"sm_{number},compute_{number}" if architecture.endswith("+PTX") else f"sm_{number}"
        options.append(f"-gencode=arch=compute_{number},code=[{codes}]")
    return [NVCC, *FLAGS, *options, *paths, "-ltorch_cuda", "-ltorch_cpu"]


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        kernels, output = ext.name.rpartition("_")[2], Path(self.get_ext_fullpath(ext.name))
        if missing(kernels):
            raise CompileError(f"BALANCED_LEARNING_BUILD={MODE} needs {missing(kernels)}")
        output.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run(command(kernels, ext.sources[0], str(output))).returncode:
            raise CompileError(f"the {kernels} kernels do not compile")

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the kernels know nothing of Python


CHOICES = {"auto": [k for k in ("cpu", "cuda") if not missing(k)], "none": [], "cpu": ["cpu"], "cuda": ["cpu", "cuda"]}
if MODE not in CHOICES:
    sys.exit(f"BALANCED_LEARNING_BUILD must be one of {', '.join(CHOICES)}, got {MODE}")
BUILT = CHOICES[MODE]
if {"bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv):
    lacking = [f"{k} would need {missing(k)}" for k in ("cpu", "cuda") if missing(k)]
    print(f"balanced-learning: BALANCED_LEARNING_BUILD={MODE}: kernels: {', '.join(BUILT) or 'none'}", *lacking, sep="; ")

SOURCES = {"cpu": "csrc/balanced_l1_cpu.cpp", "cuda": "csrc/balanced_l1_cuda.cu"}
setup(
    ext_modules=[Extension(f"balanced_learning._{k}", [SOURCES[k]], optional=MODE == "auto") for k in BUILT],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
