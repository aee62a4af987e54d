"""Builds the kernels that BALANCED_LEARNING_BUILD asks for: auto (what the machine can build), none, cpu or cuda.

CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, CUDA_PATH and TORCH_CUDA_ARCH_LIST are read as torch's own extensions read them.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from build_backend import CXX, PROGRAMS, missing_compiler

MODE = os.environ.get("BALANCED_LEARNING_BUILD", "auto")
CXXFLAGS, LDFLAGS = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
CUDA_HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
NVCC = f"{CUDA_HOME}/bin/nvcc" if CUDA_HOME else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")
TORCH = Path((find_spec("torch") or find_spec("os")).origin).parent

# The stable ABI of torch 2.11: built with one later torch, the kernels run with any.
FLAGS = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH}/include"]
SOURCES = {
    "cpu": ["csrc/balanced_l1_cpu.cpp", "csrc/sample_cpu.cpp"],
    "cuda": ["csrc/balanced_l1_cuda.cu", "csrc/sample_cuda.cu"],
}
LIBRARIES = {"cpu": ["-ltorch_cpu"], "cuda": ["-ltorch_cpu", "-ltorch_cuda"]}
SECONDS_BETWEEN_REPORTS = 15

report = partial(print, flush=True)  # at once, through the pipe that pip reads


def missing(kind: str) -> str | None:
    """Names what it would take to build these kernels, if they cannot be built."""
    if os.name == "nt":
        return "Linux or macOS"
    if missing_compiler():
        return f"a C++ compiler: there is no {missing_compiler()}, and CXX could name another"
    if not (TORCH / "include/torch/csrc/stable").exists():
        return "torch"
    if kind == "cuda" and shutil.which(NVCC) is None:
        searched = "" if CUDA_HOME else " and none on PATH"
        return f"nvcc: there is no {NVCC}{searched}, and CUDA_HOME could lead elsewhere"
    if kind == "cuda" and not (TORCH / "lib/libtorch_cuda.so").exists():
        return "a torch with CUDA"
    return None


@cache
def architectures() -> str:
    """TORCH_CUDA_ARCH_LIST or, as far as this nvcc knows them, our own, with PTX of the last for GPUs to come."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = [each for each in ARCHITECTURES if f"compute_{each.replace('.', '')}" in listed]
    return ";".join(known or ARCHITECTURES) + "+PTX"


def machine_code() -> list[str]:
    """The options of nvcc for these architectures: machine code of each, and PTX after +PTX."""
    options = []
    for architecture in architectures().replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", architecture)
        if match is None:
            sys.exit(f"TORCH_CUDA_ARCH_LIST must hold numbers such as 9.0, 9.0a or 9.0+PTX, got {architecture}")
        virtual = f"compute_{match[1]}{match[2]}"
        codes = [virtual.replace("compute", "sm")] + ([virtual] if match[3] else [])
        options += [f"-gencode=arch={virtual},code={code}" for code in codes]
    return options


def compiler(kind: str) -> list[str]:
    """The compiler of these kernels and the options that it needs both to compile and to link."""
    if kind == "cpu":
        return [*CXX, *FLAGS, "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", *CXXFLAGS]
    host_flags = ["-fPIC", "-fvisibility=hidden", *CXX[len(PROGRAMS) :], *CXXFLAGS]
    host_compiler = [f"-ccbin={PROGRAMS[-1]}"] if os.environ.get("CXX") else []
    return [NVCC, *FLAGS, "--threads=0", "-DUSE_CUDA", *machine_code(), *host_compiler, *through_nvcc(host_flags)]


def linker_flags(kind: str) -> list[str]:
    # nvcc links the CUDA runtime statically: it need not be the one of torch.
    return LDFLAGS if kind == "cpu" else ["-Xlinker=--exclude-libs,ALL", *through_nvcc(LDFLAGS)]


def through_nvcc(flags: list[str]) -> list[str]:
    """The options with which nvcc hands these flags on to the compiler of the host, which is also its linker."""
    # nvcc splits such an option at commas, and leaves the rest to a shell.
    return ["-Xcompiler=" + shlex.quote(flag).replace(",", r"\,") for flag in flags]


def run(commands: dict[str, list[str]]) -> bool:
    """Runs the commands, named after what they make, side by side, and returns whether all succeeded."""
    start, succeeded = time.monotonic(), True
    with ThreadPoolExecutor(len(commands)) as pool:
        call = partial(subprocess.run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        running = {pool.submit(call, command): name for name, command in commands.items()}
        report(*map(shlex.join, commands.values()), sep="\n")
        while running:
            done, _ = wait(running, SECONDS_BETWEEN_REPORTS, FIRST_COMPLETED)
            elapsed = f"after {time.monotonic() - start:.0f} s"
            for future in done:
                name, result = running.pop(future), future.result()
                succeeded = succeeded and result.returncode == 0
                report(f"{result.stdout}{name}: {'failed' if result.returncode else 'done'} {elapsed}")
            if not done:
                report(f"still at {', '.join(running.values())} {elapsed}")
    return succeeded


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        kind, output = ext.name.rpartition("_")[2], Path(self.get_ext_fullpath(ext.name))
        if missing(kind):
            raise CompileError(f"BALANCED_LEARNING_BUILD={MODE} needs {missing(kind)}")
        output.parent.mkdir(parents=True, exist_ok=True)
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        # One file a command, since ccache keeps no others.
        objects = {source: f"{self.build_temp}/{Path(source).stem}.o" for source in ext.sources}
        report(f"compiling the {kind} kernels", f"for {architectures()}: this takes minutes" if kind == "cuda" else "")
        compiles = {source: [*compiler(kind), "-c", source, "-o", object] for source, object in objects.items()}
        libraries = [f"-L{TORCH}/lib", *LIBRARIES[kind]]
        link = [*compiler(kind), "-shared", *linker_flags(kind), *objects.values(), "-o", str(output), *libraries]
        if not (run(compiles) and run({output.name: link})):
            raise CompileError(f"the {kind} kernels do not compile")

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]  # the kernels do not call Python


def readme() -> str:
    """The README for a page elsewhere: its links to files lead to those of this version in the repository."""
    project = Path("pyproject.toml").read_text(encoding="utf-8")
    source, version = (re.search(rf'^{key} = "(.+)"$', project, re.MULTILINE)[1] for key in ("Source", "version"))

    def absolute(link: re.Match) -> str:
        before, image, path = link.groups()
        return f"{before}{source}/{'raw' if image else 'blob'}/v{version}/{path}" if Path(path).exists() else link[0]

    return re.sub(r"((!\[[^]]*)?\]\()([^)#]+)", absolute, Path("README.md").read_text(encoding="utf-8"))


choices = {"auto": [k for k in SOURCES if not missing(k)], "none": [], "cpu": ["cpu"], "cuda": ["cpu", "cuda"]}
if MODE not in choices:
    sys.exit(f"BALANCED_LEARNING_BUILD must be one of {', '.join(choices)}, got {MODE}")
if {"bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv):
    obstacles = [f"{kind} would need {missing(kind)}" for kind in SOURCES if missing(kind)]
    report(f"BALANCED_LEARNING_BUILD={MODE}: kernels for {', '.join(choices[MODE]) or 'nothing'}", *obstacles, sep="; ")
modules = [Extension(f"balanced_learning._{kind}", SOURCES[kind], optional=MODE == "auto") for kind in choices[MODE]]
setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
