"""Builds the kernels that BALANCED_LEARNING_BUILD asks for: auto (what the machine can build), none, cpu or cuda."""

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

MODE = os.environ.get("BALANCED_LEARNING_BUILD", "auto")
COMPILER = os.environ.get("CXX", "c++")
NVCC = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "7.5;8.0;8.6;9.0;10.0;12.0+PTX").replace(" ", ";")
TORCH = Path((find_spec("torch") or find_spec("os")).origin).parent

# The stable ABI of torch 2.11: built with one later torch, the kernels run with any.
FLAGS = ["-O3", "-std=c++17", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
SOURCES = {
    "cpu": ["csrc/balanced_l1_cpu.cpp", "csrc/sample_cpu.cpp"],
    "cuda": ["csrc/balanced_l1_cuda.cu", "csrc/sample_cuda.cu"],
}


def missing(kind: str) -> str | None:
    """What it would take to build these kernels, if they cannot be built."""
    if os.name == "nt":
        return "Linux or macOS"
    if shutil.which(COMPILER) is None:
        return f"a C++ compiler: there is no {COMPILER}, and CXX could name another"
    if not (TORCH / "include/torch/csrc/stable").exists():
        return "torch"
    if kind == "cuda" and shutil.which(NVCC) is None:
        return f"nvcc: there is no {NVCC}, and CUDA_HOME could lead elsewhere"
    if kind == "cuda" and not (TORCH / "lib/libtorch_cuda.so").exists():
        return "a torch with CUDA"
    return None


def command(kind: str, output: str) -> list[str]:
    files = [f"-I{TORCH}/include", f"-L{TORCH}/lib", *SOURCES[kind], "-o", output, "-ltorch_cpu"]
    if kind == "cpu":
        return [COMPILER, *FLAGS, "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", *files]
    # nvcc links the CUDA runtime statically: it need not be the one of torch.
    codes = [architecture.removesuffix("+PTX").replace(".", "") for architecture in ARCHITECTURES.split(";")]
    targets = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    if ARCHITECTURES.endswith("+PTX"):
        targets.append(f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}")
    options = ["--threads=0", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xlinker=--exclude-libs,ALL"]
    return [NVCC, *FLAGS, *options, *targets, *files, "-ltorch_cuda"]


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        kind, output = ext.name.rpartition("_")[2], Path(self.get_ext_fullpath(ext.name))
        if missing(kind):
            raise CompileError(f"BALANCED_LEARNING_BUILD={MODE} needs {missing(kind)}")
        output.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run(command(kind, str(output))).returncode:
            raise CompileError(f"the {kind} kernels do not compile")

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the kernels do not call Python


choices = {"auto": [k for k in SOURCES if not missing(k)], "none": [], "cpu": ["cpu"], "cuda": ["cpu", "cuda"]}
if MODE not in choices:
    sys.exit(f"BALANCED_LEARNING_BUILD must be one of {', '.join(choices)}, got {MODE}")
if {"bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv):
    obstacles = [f"{kind} would need {missing(kind)}" for kind in SOURCES if missing(kind)]
    print(f"BALANCED_LEARNING_BUILD={MODE}: kernels for {', '.join(choices[MODE]) or 'nothing'}", *obstacles, sep="; ")
modules = [Extension(f"balanced_learning._{kind}", SOURCES[kind], optional=MODE == "auto") for kind in choices[MODE]]
setup(ext_modules=modules, cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})
