"""Uses what is installed as a newcomer would: ``smoke.py VERSION compiled|plain``. Needs torchvision, no network."""

import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torchvision.models import WeightsEnum

import balanced_learning

version, implementation = sys.argv[1:]
readme = (Path(__file__).parents[1] / "README.md").read_text()
info = balanced_learning.backend_info()

assert Path(balanced_learning.__file__).is_relative_to(sys.prefix), balanced_learning.__file__
assert info["balanced_learning"] == version, info
assert info["kernels"].startswith({"compiled": "CPU: compiled", "plain": "CPU: plain"}[implementation]), info

prediction, target = torch.linspace(-3, 3, 64, requires_grad=True), torch.zeros(64)
balanced_learning.balanced_l1_loss(prediction, target, reduction="sum").backward()
with balanced_learning.use_kernels(False):
    other = prediction.detach().requires_grad_()
    balanced_learning.balanced_l1_loss(other, target, reduction="sum").backward()
torch.testing.assert_close(prediction.grad, other.grad)

labels, ious = (torch.arange(2000) < 100).long(), torch.linspace(0, 0.49, 2000)
(positive,), (negative,) = balanced_learning.IoUBalancedSampler()([labels], [ious], [torch.arange(2000) % 7])
assert int(positive.sum() + negative.sum()) == 512
assert labels[positive.bool()].all()
assert not labels[negative.bool()].any()

blocks = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "load_detector" not in block]
assert blocks
names: dict = {}
with ExitStack() as stack:
    for owner, name in ((WeightsEnum, "get_state_dict"), (torch.nn.Module, "load_state_dict")):
        stack.enter_context(mock.patch.object(owner, name))
    for block in blocks:
        exec(block, names)

print(subprocess.run([sys.executable, "-m", "balanced_learning"], check=True, capture_output=True, text=True).stdout)
