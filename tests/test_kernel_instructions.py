"""Tests of benchmarks/kernel_instructions.py, on machine code made by hand, and on that of nvcc where there is one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
SYMBOL = "_ZN4name12_GLOBAL__N__1a_2_x_cu_0607d5ff10sum_kernelIN3c104HalfELi8ELb1EEEvNS_8OperandsIT_EE"
LISTING = """
code for sm_90
        Function : first
    /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */
                                                          /* 0x000fe20000000800 */
    /*0010*/                   MOV R2, RZ ;
    /*0020*/                   LDG.E R3, desc[UR4][R2.64] ;
    /*0030*/               @P0 BRA 0x60 ;
    /*0040*/                   FADD R4, R3, R3 ;
    /*0050*/                   DFMA R6, R4, R4, R6 ;
    /*0060*/                   FADD R2, R2, R3 ;
    /*0070*/              @!P1 BRA 0x20 ;
    /*0080*/                   EXIT ;
    /*0090*/                   BRA 0x90;
        Function : second
    /*0000*/                   EXIT ;
"""
USAGE = """
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 34 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""
NVCC = shutil.which("nvcc", path=os.pathsep.join([f"{os.environ.get('CUDA_HOME', '')}/bin", os.environ["PATH"]]))


@pytest.fixture
def machine_code(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where its folder is when it is run
    import _machine_code

    return _machine_code


def test_the_main_loop_is_the_shortest_way_through_the_longest_loop(machine_code: ModuleType) -> None:
    code = machine_code.instructions(LISTING)
    loop = [instruction.text for instruction in machine_code.main_loop(code["first"])]
    assert loop == ["LDG.E R3, desc[UR4][R2.64]", "@P0 BRA 0x60", "FADD R2, R2, R3", "@!P1 BRA 0x20"]
    assert machine_code.main_loop(code["second"]) == []
    assert machine_code.double_precision(code["first"]) == 1


def test_what_a_kernel_takes(machine_code: ModuleType) -> None:
    usages = machine_code.resource_usage(USAGE)
    assert usages == {"first": (34, 12, 64), "second": (8, 0, 0)}


def test_names(machine_code: ModuleType) -> None:
    assert machine_code.kernel_name(SYMBOL) == ("sum_kernel", ["Half", "8", "true"])
    assert machine_code.kernel_name("_ZN4name11draw_kernelIdEEvi") == ("draw_kernel", ["double"])


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or not torch.backends.cuda.is_built(), reason="needs nvcc and a torch with CUDA")
def test_half_types_take_30_instructions_at_most(tmp_path: Path) -> None:
    program = [sys.executable, ROOT / "benchmarks/kernel_instructions.py", "--output", tmp_path]
    subprocess.run(program, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    (counted,) = json.loads((tmp_path / "kernel_instructions.json").read_text())["counted"]
    loops = {row["kernel"]: row for row in counted["kernels"] if "instructions_per_element" in row}
    half = {name: row["instructions_per_element"] for name, row in loops.items() if "6, 8" in name or "Half, 8" in name}
    assert len(half) == 2 * (2 + 2 + 4)
    assert max(half.values()) <= 30
    assert all(row["spilled_bytes"] == 0 for row in counted["kernels"])
    assert all(row.get("double_precision", 0) == 0 for row in loops.values())


def test_a_machine_without_nvcc_is_told_so(machine_code: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools", minversion="77")
    import kernel_instructions

    monkeypatch.setattr(sys, "argv", sys.argv)
    for name, value in {"CUDA_HOME": "/nowhere", "TORCH_CUDA_ARCH_LIST": "", "BALANCED_LEARNING_BUILD": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="counting instructions needs nvcc: there is no /nowhere/bin/nvcc"):
        kernel_instructions.nvcc("9.0")
