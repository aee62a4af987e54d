"""Builds CUDA kernels as C++, to be run on the CPU: libraries of ops of torch, and programs."""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).parent
CXX = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20"]
# Without fused multiply-adds, which depend on what the compiler inlines: so all builds compute the same bits.
FLAGS = ["-fPIC", "-fvisibility=hidden", "-w", "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# An access off alignment, which CUDA does not allow, is undefined for C++, too.
SANITIZERS = {
    "none": ["-O3"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
    "address": ["-Og", "-g1", "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment"],
}

# What C++ has no grammar for, launches and variables of a block; and ops of this name, of both kinds for the CPU.
REWRITES = {
    r"(\w+(?:<[^;()]*?>)?)\s*<<<(.+?)>>>\s*\(": r"emulation::launch(\1, \2)(",
    r"extern __shared__ (.+?) (\w+)\[\];": r"\1* const \2 = static_cast<\1*>(emulation::dynamic_shared_memory());",
    r"__shared__ (.+?) (\w+)((?:\[.+?\])*);": (
        r"auto& \2 = emulation::static_shared<\1\3>([] { static char site; return &site; }());"
    ),
    r"LIBRARY_IMPL\(balanced_learning, CUDA,": "LIBRARY_IMPL(emulated, CPU,",
    r"LIBRARY_IMPL\(balanced_learning, CPU,": "LIBRARY_IMPL(host, CPU,",
}


class Builder:
    """Compiles into a folder.

    Args:
        folder (Path): an empty one.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def obstacle(self) -> str | None:
        """What keeps kernels from being built here."""
        if not (TORCH / "include/torch/csrc/stable").exists():
            return "this torch has no headers"
        probe = self.folder / "probe.cpp"
        probe.write_text("#include <bit>\nint main() { return std::popcount(0u); }\n")
        try:
            _run([*CXX, str(probe), "-o", str(self.folder / "probe")])
        except (OSError, RuntimeError):
            return f"{CXX[0]} does not compile C++20"
        return None

    def sanitizer_obstacle(self, *flags: str) -> str | None:
        """What keeps programs that are built with these flags from running."""
        probe = str(self.folder / "sanitized")
        try:
            _run([*CXX, *flags, str(self.folder / "probe.cpp"), "-o", probe])
            _run([probe])
        except RuntimeError as error:
            return f"{shlex.join(flags)} does not work here: {str(error).splitlines()[-1]}"
        return None

    def library(self, name: str, pattern: str, *flags: str) -> Path:
        """Builds the files of csrc that match the pattern: .cu files as ops of ``emulated``, .cpp files of ``host``."""
        link = ["-shared", f"-L{TORCH}/lib", "-ltorch_cpu"]
        return self._build(f"{name}.so", sorted(CSRC.glob(pattern)), flags, link)

    def program(self, name: str, source: Path, *flags: str) -> Path:
        return self._build(name, [source], flags, [])

    @cached_property
    def _runtime(self) -> Path:
        output = self.folder / "runtime.o"
        _run([*CXX, *FLAGS, "-O2", f"-I{HERE}/include", "-c", str(HERE / "runtime.cpp"), "-o", str(output)])
        return output

    def _build(self, name: str, sources: Sequence[Path], flags: Sequence[str], link: Sequence[str]) -> Path:
        folder, output = self.folder / f"{name}.build", self.folder / name
        folder.mkdir()
        for source in [*CSRC.iterdir(), *sources]:
            (folder / source.name).write_text(_rewrite(source))
        compile = [*CXX, *FLAGS, *flags, f"-I{HERE}/include", f"-isystem{TORCH}/include", "-c", "-xc++"]
        objects = {str(folder / f"{source.stem}.o"): str(folder / source.name) for source in sources}
        with ThreadPoolExecutor(len(sources)) as pool:
            list(pool.map(_run, ([*compile, file, "-o", object] for object, file in objects.items())))
        _run([*CXX, *flags, *objects, str(self._runtime), *link, "-o", str(output)])
        return output


def _rewrite(source: Path) -> str:
    """The file as C++, whose messages name its lines."""
    text = source.read_text()
    for pattern, replacement in REWRITES.items():
        text = re.sub(pattern, replacement, text)
    return f'#line 1 "{source.name}"\n{text}'


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stdout}")
