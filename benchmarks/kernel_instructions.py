"""Counts what the compiler made of the CUDA kernels, of a revision and of the working tree. Needs nvcc, and no GPU.

    python benchmarks/kernel_instructions.py --revision e7a99fe

The instructions an element are those on the shortest way through the longest loop of a kernel, from the target of a
backward branch to that branch, over the elements of a pack: what runs where packs are full. Issue over memory divides
the time in which an H100 issues them by the time in which it moves the bytes that an element needs: below 1, memory is
the bound. Prints a table and writes kernel_instructions.json.
"""

import argparse
import contextlib
import io
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _common import RESULTS, commit, markdown, write
from _machine_code import double_precision, instructions, kernel_name, main_loop, resource_usage

ROOT = Path(__file__).parents[1]
H100 = {"SMs": 132, "schedulers of an SM": 4, "threads of a warp": 32, "GHz": 1.98, "GB/s": 3350}  # SXM, datasheet
TENSORS = {"sum_kernel": 2, "loss_kernel": 3, "gradient_kernel": 3}  # input, target, what is written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="9.0", help="of the GPU, as in TORCH_CUDA_ARCH_LIST")
    parser.add_argument("--revision", help="count the kernels of this commit, too")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for what is written")
    args = parser.parse_args()
    compiler = nvcc(args.architecture)
    version = subprocess.run([compiler[0], "--version"], capture_output=True, text=True).stdout
    counted = [count(ROOT, compiler, commit())]
    if args.revision:
        with tempfile.TemporaryDirectory() as folder:
            name = check_out(args.revision, Path(folder))
            counted.insert(0, count(Path(folder), compiler, name))
    print(markdown([cells(counts["commit"], row) for counts in counted for row in counts["kernels"]], words=2))
    results = {"compiler": version.splitlines()[-1], "architecture": args.architecture, "gpu": H100, "counted": counted}
    write(args.output / "kernel_instructions.json", results)


def nvcc(architecture: str) -> list[str]:
    """The command with which setup.py compiles CUDA kernels, for one architecture."""
    os.environ |= {"TORCH_CUDA_ARCH_LIST": architecture, "BALANCED_LEARNING_BUILD": "none"}
    sys.path.insert(0, str(ROOT))
    sys.argv = ["setup.py", "--name"]  # runs it without building anything
    folder = Path.cwd()
    os.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()):
        setup = runpy.run_path("setup.py")
    os.chdir(folder)
    if missing := setup["missing"]("cuda"):
        sys.exit(f"counting instructions needs {missing}")
    return setup["compiler"]("cuda")


def cuobjdump(compiler: str) -> str:
    """The program that prints machine code: the compiler's neighbour, or one on PATH, or Triton's."""
    triton = find_spec("triton")
    folders = [str(Path(compiler).parent), os.environ["PATH"]]
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    return found or sys.exit(f"counting instructions needs cuobjdump, which is not in {', '.join(folders)}")


def check_out(revision: str, folder: Path) -> str:
    """Writes the kernels of a commit, whose name it returns."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", revision, "csrc"))) as files:
        files.extractall(folder, filter="data")
    return git("rev-parse", "--short=12", revision).decode().strip()


def git(*arguments: str) -> bytes:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    return sys.exit(f"git {' '.join(arguments)}: {result.stderr.decode()}") if result.returncode else result.stdout


def count(folder: Path, compiler: list[str], commit: str) -> dict[str, Any]:
    """What became of all kernels in a checkout."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as built:
        for source in sorted(folder.glob("csrc/*.cu")):
            cubin = f"{built}/{source.stem}.cubin"
            usages = resource_usage(run([*compiler, "-cubin", "-Xptxas=-v", str(source), "-o", cubin]))
            codes = instructions(run([cuobjdump(compiler[0]), "-sass", cubin]))
            names = {symbol: kernel_name(symbol) for symbol in usages}
            for symbol in sorted(names, key=lambda symbol: names[symbol]):
                rows.append(describe(*names[symbol], codes[symbol]) | usages[symbol]._asdict())
    return {"commit": commit, "kernels": rows}


def run(command: list[str]) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return sys.exit(f"{command[0]} fails:\n{result.stdout}") if result.returncode else result.stdout


def describe(name: str, arguments: list[str], code: list[Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": f"{name}<{', '.join(arguments)}>"}
    if arguments[:1] != ["double"]:
        row["double_precision"] = double_precision(code)
    if name in TENSORS:
        row["instructions_per_element"] = each = len(main_loop(code)) / int(arguments[1])
        row["issue_over_memory"] = issue_over_memory(each, bytes_per_element(name, arguments))
    return row


def bytes_per_element(name: str, arguments: list[str]) -> int:
    """What is read and written; of kernels that find out as they run, without weights and from one gradient."""
    flags = [argument == "true" for argument in arguments[2:]]
    weighted, reduced = [*flags, False][0], [*flags, True, True][1]
    size = {"double": 8, "float": 4}.get(arguments[0], 2)
    return size * (TENSORS[name] + weighted + (name == "gradient_kernel" and not reduced))


def issue_over_memory(instructions: float, size: int) -> float:
    lanes = H100["SMs"] * H100["schedulers of an SM"] * H100["threads of a warp"]
    return instructions / (lanes * H100["GHz"]) / (size / H100["GB/s"])


def cells(commit: str, row: dict[str, Any]) -> dict[str, str]:
    formats = {
        "instructions_per_element": ".1f",
        "issue_over_memory": ".2f",
        "double_precision": "d",
        "registers": "d",
        "spilled_bytes": "d",
        "shared_bytes": "d",
    }
    numbers = {name: format(row[name], each) if name in row else "-" for name, each in formats.items()}
    return {"commit": commit, "kernel": row["kernel"]} | {name.replace("_", " "): n for name, n in numbers.items()}


if __name__ == "__main__":
    main()
