"""The CUDA kernels as ops of the CPU, ``torch.ops.emulated``, beside those for the CPU, ``torch.ops.host``."""

import os

import pytest
import torch

from balanced_learning import _ops
from tests.cuda_emulation.build import SANITIZERS, Builder

LIBRARIES = "BALANCED_LEARNING_EMULATED"  # names libraries that are built already, for a process with a sanitizer


@pytest.fixture(scope="session")
def builder(tmp_path_factory) -> Builder:
    builder = Builder(tmp_path_factory.mktemp("cuda_emulation"))
    if obstacle := builder.obstacle():
        pytest.skip(obstacle)
    return builder


@pytest.fixture(scope="session")
def host_library(builder):
    return builder.library("host", "*_cpu.cpp", "-O2")


@pytest.fixture(scope="session")
def ops(request):
    """Defines both kinds of ops, as ``torch.ops.balanced_learning`` is."""
    if LIBRARIES in os.environ:
        paths = os.environ[LIBRARIES].split(os.pathsep)
    else:
        builder = request.getfixturevalue("builder")
        paths = [builder.library("emulated", "*_cuda.cu", *SANITIZERS["none"]), request.getfixturevalue("host_library")]
    definitions = [torch.library.Library(namespace, "DEF") for namespace in ("emulated", "host")]
    for op in (_ops._forward_op, _ops._backward_op, _ops._sample_op):
        for definition in definitions:
            definition.define(str(op._schema).partition("::")[2])
    for path in paths:
        torch.ops.load_library(path)
    return definitions  # which undefine the ops when they are collected
