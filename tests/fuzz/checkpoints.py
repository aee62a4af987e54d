"""Spoils checkpoints, and goes on from those that are taken."""

import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from balanced_learning.training.checkpoint import PREVIOUS, Checkpoint, Position, save
from balanced_learning.training.config import Config
from balanced_learning.training.data.batching import Batch
from balanced_learning.training.data.labels import Labels
from balanced_learning.training.model import make_model
from balanced_learning.training.optimization import Precision, make_average, make_optimizer
from balanced_learning.training.reporting.figures import save_curves
from balanced_learning.training.run import Run
from balanced_learning.training.step import Stepper
from balanced_learning.training.weights import DetectorWeights
from tests.fuzz.spoiling import PLAIN, cut, flip, replace_value, spoil_bytes
from tests.fuzz.verdict import ACCEPTED, REFUSED, SAME, WrongError, digest, read

LABELS = Labels({1: "cat", 2: "dog"}, {1: 1, 2: 7}, num_classes=3)
SETTINGS = {
    "small": True, "min_size": 64, "max_size": 96, "batch_size": 2, "epochs": 3, "lr": 0.001, "ema": 0.9,
    "workers": 0, "device": "cpu", "output_dir": Path("runs/x"),
}  # fmt: skip
ITERATIONS = 5

TENSORS: list[Callable[[Random], Any]] = [
    lambda r: torch.zeros([r.randrange(4) for _ in range(r.randrange(4))]),
    lambda r: torch.tensor(r.choice((0.0, -1.0, float("nan"), float("inf"), 3, True))),
    lambda _: torch.zeros(1).expand(10**12),
    lambda _: torch.zeros(3, dtype=torch.complex64),
    lambda _: torch.zeros(3, 3).to_sparse(),
    lambda _: torch.zeros(3, requires_grad=True),
    lambda _: nn.Parameter(torch.zeros(3)),
    lambda _: torch.zeros(3, device="meta"),
]
VALUES = [
    *PLAIN,
    *TENSORS,
    lambda r: r.randbytes(5),
    lambda _: (1, "x"),
    lambda _: OrderedDict(x=1),
    lambda _: Counter("x"),
    lambda _: {1, 2},
    lambda _: torch.float32,
    lambda _: torch.device("cpu"),
    lambda _: torch.Size((1, 2)),
    lambda _: 1j,
]


class Checkpoints:
    """Ways to spoil a checkpoint, by name; each does so once, and returns what became of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "checkpoint.pth"
        self.mark = folder / "executed"
        self.parts = _toy_parts()
        self.before = digest(_content(self._write_toy()))
        self.toy = self.path.read_bytes()
        self.toy_content = torch.load(self.path)
        self.detector_content = self._detector()
        self.regions = _regions(self.path)
        self.ways: dict[str, Callable[[Random], str]] = {
            **{f"checkpoint: flip in {name}": self._flips(name) for name in self.regions},
            "checkpoint: bytes": lambda r: self._bytes(spoil_bytes(self.toy, r)),
            "checkpoint: cut": lambda r: self._bytes(cut(self.toy, r)),
            "checkpoint: generations": self._generations,
            "checkpoint: pickle": self._pickle,
            "checkpoint: foreign globals": self._globals,
            "checkpoint: values": self._values,
            "checkpoint: values of a detector": self._detector_values,
            "checkpoint: as weights": self._weights,
        }

    def _write_toy(self) -> Checkpoint:
        position = Position(1, 2, ITERATIONS, 2, [{"images": 4.0, "loss": 1.5}], [{"epoch": 0, "AP": None}], 1, 2.5)
        fault = {
            "cause": "x",
            "rank": 0,
            "images": [torch.rand(3, 8, 8)],
            "targets": [{"boxes": torch.rand(1, 4), "labels": torch.tensor([1]), "image_id": 3}],
        }
        about: Any = {"config": Config.of(SETTINGS), "labels": LABELS, "position": position, "fault": fault}
        save(self.path, self.parts, **about)
        return Checkpoint.load(self.path)

    def _detector(self) -> Any:
        config = Config.of(SETTINGS | {"output_dir": self.folder / "run"})
        (self.folder / "run").mkdir()
        run = Run(config, LABELS, make_model(config, LABELS, None), Precision(None, torch.device("cpu")), ITERATIONS)
        _step(run)
        run.save()
        return torch.load(self.folder / "run" / "checkpoint.pth")

    def _flips(self, name: str) -> Callable[[Random], str]:
        def way(random: Random) -> str:
            return self._bytes(flip(self.toy, random, *random.choice(self.regions[name])))

        return way

    def _bytes(self, data: bytes) -> str:
        """Spoilt bytes are refused, or do not matter."""
        self.path.write_bytes(data)
        checkpoint = read(lambda: Checkpoint.load(self.path))
        if checkpoint is None:
            return REFUSED
        if digest(_content(checkpoint)) != self.before:
            raise WrongError("is taken, but is not as it was")
        return SAME

    def _generations(self, random: Random) -> str:
        self.path.write_bytes(spoil_bytes(self.toy, random))
        previous = self.path.with_name(PREVIOUS)
        previous.write_bytes(self.toy)
        try:
            checkpoint = read(lambda: Checkpoint.newest(self.folder))
        finally:
            previous.unlink()
        if checkpoint is None or digest(_content(checkpoint)) != self.before:
            raise WrongError("the one before it is not taken")
        return REFUSED if checkpoint.path == previous else SAME

    def _pickle(self, random: Random) -> str:
        """Spoils what the checksum is of, and writes another checksum."""
        with zipfile.ZipFile(self.folder / "run" / "checkpoint.pth" if random.random() < 0.05 else self._toy()) as old:
            entries = {entry: old.read(entry) for entry in old.namelist()}
        name = next(entry for entry in entries if entry.endswith("data.pkl"))
        for _ in range(random.choice((1, 1, 2, 3))):
            entries[name] = spoil_bytes(entries[name], random)
        self._write_zip(entries)
        return self._go_on("a pickle", is_toy=True)

    def _globals(self, random: Random) -> str:
        """A pickle that would leave a mark if it were run."""
        mark = str(self.mark)
        module, name, arguments = random.choice(
            [
                ("os", "mkdir", (mark,)),
                ("posix", "mkdir", (mark,)),
                ("os", "system", (f"mkdir {mark}",)),
                ("builtins", "exec", (f"import os; os.mkdir({mark!r})",)),
                ("builtins", "eval", (f"__import__('os').mkdir({mark!r})",)),
                ("builtins", "open", (mark, "w")),
                ("builtins", "getattr", ("torch", "save")),
                ("subprocess", "call", (["mkdir", mark],)),
                ("torch", "save", ({}, mark)),
                ("torch.serialization", "save", ({}, mark)),
                ("torch", "ops.load_library", (mark,)),
                ("torch._utils", "__builtins__.exec", (f"import os; os.mkdir({mark!r})",)),
                ("numpy", "save", (mark, 1)),
                ("balanced_learning.training.files", "write_text", (mark, "x")),
                ("argparse", "open", (mark, "w")),
                ("argparse", "_os.mkdir", (mark,)),
            ]
        )
        called = _global(module, name) + pickle.dumps(arguments, 2)[2:-1] + b"R"
        place = random.choice(("alone", "value", "key", "build", "item"))
        spoilt = {
            "alone": b"\x80\x02" + called + b".",
            "value": b"\x80\x02}X\x05\x00\x00\x00modelq\x00" + called + b"s.",
            "key": b"\x80\x02}" + called + b"K\x01s.",
            "build": b"\x80\x02" + _global("collections", "OrderedDict") + b")R" + called + b"b.",
            "item": b"\x80\x02](" + called + b"e.",
        }[place]
        with zipfile.ZipFile(self._toy()) as old:
            entries = {entry: old.read(entry) for entry in old.namelist()}
        entries[next(entry for entry in entries if entry.endswith("data.pkl"))] = spoilt
        if random.random() < 0.2:  # the form of old versions, which has no zip file
            self.path.write_bytes(spoilt * random.randrange(1, 6))
        else:
            self._write_zip(entries)
        return self._go_on("globals", is_toy=True)

    def _values(self, random: Random) -> str:
        content, what = self.toy_content, ""
        for _ in range(random.choice((1, 1, 1, 2))):
            content, more = replace_value(content, random, VALUES)
            what += more
        return self._save(content) or self._go_on(what, is_toy=True)

    def _detector_values(self, random: Random) -> str:
        content, what = replace_value(self.detector_content, random, VALUES)
        return self._save(content) or self._go_on(what, is_toy=False)

    def _weights(self, random: Random) -> str:
        content, what = replace_value(random.choice((self.toy_content, self.toy_content["model"])), random, VALUES)
        if refused := self._save(content):
            return refused
        config = Config.of(SETTINGS | {"weights": str(self.path)}).model
        weights = read(lambda: DetectorWeights.read(config))
        if weights is None:
            return REFUSED
        weights.unknown(["cat"])
        if all(isinstance(value, torch.Tensor) for value in weights.state().values()):
            return ACCEPTED
        raise WrongError(f"{what}: a state dict with something else in it")

    def _toy(self) -> Path:
        self.path.write_bytes(self.toy)
        return self.path

    def _write_zip(self, entries: dict[str, bytes]) -> None:
        with zipfile.ZipFile(self.path, "w") as new:
            for name, data in entries.items():
                new.writestr(name, data)

    def _save(self, content: Any) -> str | None:
        try:
            torch.save(content, self.path)
        except Exception:  # what torch cannot save, nobody can load
            return REFUSED
        return None

    def _go_on(self, what: str, *, is_toy: bool) -> str:
        """Goes on for a step from what is taken."""
        try:
            checkpoint = read(lambda: Checkpoint.load(self.path))
            if checkpoint is None:
                return REFUSED
            taken = read(lambda: self._restore(checkpoint) if is_toy else self._run(checkpoint))
        except Exception as error:
            raise WrongError(f"with {what}: {type(error).__name__}: {error}") from error
        finally:
            if self.mark.exists():
                raise WrongError("code of the file was executed")
        if taken is None:
            return REFUSED
        return ACCEPTED

    def _restore(self, checkpoint: Checkpoint) -> bool:
        parts = _toy_parts()
        checkpoint.restore(parts)
        for _ in range(2):
            parts["optimizer"].zero_grad()
            loss = parts["model"](torch.rand(2, 3, 4, 4)).square().sum()
            parts["scaler"].scale(loss).backward()
            parts["scaler"].step(parts["optimizer"])
            parts["scaler"].update()
            parts["ema"].update_parameters(parts["model"])
        _check_finite(parts["model"])
        return True

    def _run(self, checkpoint: Checkpoint) -> bool:
        config = Config.of(SETTINGS | {"output_dir": self.folder / "again"})
        (self.folder / "again").mkdir(exist_ok=True)
        model = make_model(config, checkpoint.labels, checkpoint)
        run = Run(config, checkpoint.labels, model, Precision(None, torch.device("cpu")), ITERATIONS, checkpoint)
        _step(run)
        run.end_epoch({"AP": 0.5})
        _check_finite(model)
        save_curves(self.folder / "curves.png", run.history)
        return True


def _toy_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    optimizer = make_optimizer(model, Config.of(SETTINGS | {"opt": "adamw", "norm_weight_decay": 0.0}).training)
    model(torch.rand(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    return {"model": model, "optimizer": optimizer, "scaler": scaler, "ema": make_average(model, 0.9)}


def _step(run: Run) -> None:
    torch.manual_seed(0)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1]), "image_id": 1}
    images = [torch.rand(3, 64, 64) for _ in range(2)]
    faults: list[Any] = []
    stepper = Stepper(run, faults.append)
    run.model.train()
    stepper(Batch(images, [target, target], of=2, is_filler=False, unreadable=[], step=run.step))
    stepper.finish()
    if faults:
        raise WrongError("the step was left out")


def _check_finite(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise WrongError(f"after a step, {name} is not finite")


def _content(checkpoint: Checkpoint) -> list[Any]:
    about = (checkpoint.config, checkpoint.labels, checkpoint.position, checkpoint.norm_eps)
    return [repr(about), checkpoint.states, checkpoint.fault]


def _regions(path: Path) -> dict[str, list[tuple[int, int]]]:
    """The places of the parts of a zip file."""
    data = path.read_bytes()
    found: dict[str, list[tuple[int, int]]] = {"headers": [], "pickle": [], "tensors": [], "other entries": []}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name_length, extra_length = struct.unpack("<HH", data[entry.header_offset + 26 : entry.header_offset + 30])
            start = entry.header_offset + 30 + name_length + extra_length
            found["headers"].append((entry.header_offset, start))
            kind = "pickle" if entry.filename.endswith("data.pkl") else "other entries"
            kind = "tensors" if "/data/" in entry.filename else kind
            if entry.file_size:
                found[kind].append((start, start + entry.file_size))
        found["directory"] = [(archive.start_dir, len(data))]
    return found


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()
