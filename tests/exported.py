"""Comparison of exported modules with the originals."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def assert_survives_export(module: nn.Module, inputs: list[Any], dynamic_shapes: Any = None) -> None:
    """Exported with the first input, it gives the same for all of them, in PyTorch and in ONNX Runtime, and learns."""
    program = torch.export.export(module, (inputs[0],), dynamic_shapes=dynamic_shapes)
    exported = program.module()
    for found, wanted in zip(gradients(exported, inputs[0]), gradients(module, inputs[0]), strict=True):
        # Gradients of a whole backbone are sums of large terms: each is right to a share of its largest value.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1, wanted.abs().max().item()))
    expected = []
    for each in inputs:
        with torch.no_grad():
            expected.append(tree_leaves(module(each)))
            assert_close(tree_leaves(exported(each)), expected[-1])

    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="exports to ONNX need onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    onnx = torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
    session = runtime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for each, outputs in zip(inputs, expected, strict=True):
        feed = dict(zip(names, (x.numpy() for x in tree_leaves(each)), strict=True))
        assert_close([torch.from_numpy(x) for x in session.run(None, feed)], outputs)


def gradients(module: nn.Module, inputs: Any) -> list[Tensor]:
    """Of the inputs and, in the order of their names, of the parameters that are trained."""
    inputs = tree_map(lambda x: x.detach().requires_grad_(), inputs)
    parameters = [p for _, p in sorted(module.named_parameters()) if p.requires_grad]
    loss = sum(output.sin().sum() for output in tree_leaves(module(inputs)))
    return [*torch.autograd.grad(loss, [*tree_leaves(inputs), *parameters], materialize_grads=True)]


def assert_close(tensors: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(tensors, expected, rtol=1e-4, atol=1e-4)
