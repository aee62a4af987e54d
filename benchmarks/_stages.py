"""What a training loop spends its time on, stage by stage."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.optim import Optimizer

STAGES = (
    *("data", "transfer", "transform", "backbone", "neck", "RPN", "selection", "heads", "losses"),
    *("backward", "optimiser", "rest"),
)


class Stopwatch:
    """The seconds of each stage; time in a stage inside another counts for the inner one alone.

    Attributes:
        seconds (dict): by stage.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = ["rest"]
        self._since = self._now()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _mark(self) -> None:
        now = self._now()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def outside(self, name: str) -> None:
        """From now on, what is in no stage counts for this one."""
        self._mark()
        self._open[0] = name

    def timed(self, function: Callable, stage: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage):
                return function(*args, **kwargs)

        return call


@contextmanager
def watched(model: Any, optimizer: Optimizer, loader: Any, device: str) -> Iterator[Stopwatch]:
    """Times the stages of a loop that trains a Faster R-CNN with this optimizer on this loader's batches.

    On CUDA, the host waits for the device at each change of stage, so that the sum is more than the loop takes alone.
    """
    watch = Stopwatch(device)
    roi_heads = model.roi_heads
    stage_of: list[tuple[Any, str, str]] = [
        (model.transform, "forward", "transform"),
        (model.backbone, "forward", "neck"),
        (model.backbone.body, "forward", "backbone"),
        (model.rpn, "forward", "RPN"),
        (model.rpn, "assign_targets_to_anchors", "selection"),
        (model.rpn, "compute_loss", "losses"),
        (model.rpn, "fg_bg_sampler", "selection"),
        (roi_heads, "forward", "heads"),
        (roi_heads, "select_training_samples", "selection"),
        (roi_heads, "box_losses", "losses"),
    ]
    forward, backward, iterate = model.forward, torch.autograd.backward, type(loader).__iter__

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        watch.outside("rest")
        return forward(*args, **kwargs)

    def timed_backward(*args: Any, **kwargs: Any) -> None:
        with watch.stage("backward"):
            backward(*args, **kwargs)
        watch.outside("optimiser")

    def timed_batches(loader: Any) -> Iterator[Any]:
        batches = iterate(loader)
        watch.outside("data")
        for batch in batches:
            watch.outside("transfer")
            yield batch
            watch.outside("data")
        watch.outside("rest")

    with ExitStack() as patches:
        for owner, name, stage in stage_of:
            patches.enter_context(patch.object(owner, name, watch.timed(getattr(owner, name), stage)))
        patches.enter_context(patch.object(model, "forward", timed_forward))
        patches.enter_context(patch.object(torch.autograd, "backward", timed_backward))
        patches.enter_context(patch.object(type(loader), "__iter__", timed_batches))
        handle = optimizer.register_step_post_hook(lambda *_: watch.outside("rest"))
        patches.callback(handle.remove)
        yield watch
