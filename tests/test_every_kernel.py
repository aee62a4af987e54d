"""The program that runs under compute-sanitizer: it calls every op in every type, and notices what is wrong."""

from collections import Counter

import pytest
import torch

from balanced_learning import _ops
from tests import every_kernel
from tests.kernels import DTYPES

pytestmark = pytest.mark.usefixtures("kernels")
OPS = ("_forward_op", "_backward_op", "_sample_op")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs it on small tensors, with some ops exchanged, and returns its status, what it prints, and all calls."""
    monkeypatch.setattr(every_kernel, "LARGE", 2_000)
    calls = Counter()

    def call(**exchanged):
        for name in OPS:
            op = exchanged.get(name, getattr(_ops, name))

            def counted(*args, name=name, op=op, **kwargs):
                calls[name, (args[1][0] if name == "_sample_op" else args[0]).dtype] += 1
                return op(*args, **kwargs)

            monkeypatch.setattr(_ops, name, counted)
        with pytest.raises(SystemExit) as caught:
            every_kernel.main(["--device", "cpu", "--rounds", "10"])
        return caught.value.code, capsys.readouterr().out, calls

    return call


def test_every_op_in_every_type(run):
    status, printed, calls = run()
    assert (status, printed) == (0, "all calls agree on cpu\n")
    assert calls.keys() == {
        *((name, dtype) for name in OPS[:2] for dtype in DTYPES),
        *((OPS[2], dtype) for dtype in (torch.float32, torch.float64)),
    }


def test_a_wrong_loss_is_named(run):
    def wrong(input, *others):
        result = forward(input, *others)
        return result * 1.1 if input.dtype == torch.bfloat16 and input.numel() == 7 else result

    forward = _ops._forward_op
    status, printed, _ = run(_forward_op=wrong)
    assert status == 1
    *lines, last = printed.splitlines()
    assert last == "12 calls differ on cpu"
    assert len(lines) == 12
    assert all(line.startswith("loss, torch.bfloat16, ") and " 7 elements from " in line for line in lines)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [("another box", "other boxes than on the CPU"), ("one too few", "drawn, not ("), ("no NaN", "has a NaN")],
)
def test_a_wrong_draw_is_named(run, wrong, words):
    """From the same seed the first call is that on the device, and the second one the CPU's."""

    def changed(labels, ious, matched_idxs, seed, **settings):
        results = sample(labels, ious, matched_idxs, seed, **settings)
        if next(turns) % 2:
            return results
        if wrong == "no NaN":
            results[-1].zero_()
        else:
            for mask, label in zip(results[len(labels) : -1], labels, strict=True):
                drawn, others = mask.nonzero().flatten(), ((label == 0) & ~mask).nonzero().flatten()
                if len(drawn) and (len(others) or wrong == "one too few"):
                    mask[drawn[0]] = False
                    mask[others[:1]] = wrong == "another box"
                    break
        return results

    sample, turns = _ops._sample_op, iter(range(10_000))
    status, printed, _ = run(_sample_op=changed)
    assert status == 1
    assert {"another box": "other boxes than on the CPU", "one too few": "not (", "no NaN": "has a NaN"}[
        wrong
    ] in printed
