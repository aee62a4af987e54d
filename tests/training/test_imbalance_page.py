"""The report on imbalances that the documentation shows: its figures, its picture, and what the page says of it."""

import json
import math
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from balanced_learning import BalancedL1Loss
from balanced_learning.detection.imbalance.objective_level import gradients
from balanced_learning.training.errors import UserError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("imbalance_page")


def test_the_documentation_is_what_the_figures_say(page, tmp_path):
    content = json.loads((RESULTS / page.FILE).read_text())
    text = (ROOT / "docs/does_it_help.md").read_text()
    assert page.fill(text, {"imbalance": page.sentences(page.advices(content))}) == text
    assert page.sentences(page.advices(content)) in text
    page.draw(content, tmp_path / "picture.svg")
    drawn, kept = (texts(file) for file in (tmp_path / "picture.svg", ROOT / "docs/images/imbalance_report.svg"))
    assert drawn == kept
    assert "bccd: 200 training images, 72 evaluated" in drawn


def test_figures_come_back_as_they_were_written(page, tmp_path):
    content = json.loads((RESULTS / page.FILE).read_text())
    assert page.measured(content).plain() == {name: content[name] for name in ("sample", "feature", "objective")}
    paths = {"detector": {"weights_backbone": "/home/me/w.pth"}, "data": {"data_path": "/home/me/bccd"}}
    report = content | {part: content[part] | paths[part] for part in paths} | {"advice": []}
    report["versions"] |= {"files": "/home/me/_cpu.so"}
    (tmp_path / "imbalance.json").write_text(json.dumps(report))
    kept = page.kept(tmp_path)
    assert (kept["detector"]["weights_backbone"], kept["data"]["data_path"]) == ("w.pth", "bccd")
    assert "/home/me" not in json.dumps(kept)
    assert "advice" not in kept
    with pytest.raises(UserError, match=r"none: holds no imbalance\.json"):
        page.kept(tmp_path / "none")


def test_it_is_true_what_the_page_says_of_box_losses():
    errors = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    balanced, ours, papers = (
        gradients(torch.cat([errors, errors.new_tensor([2.0])]), loss)
        for loss in (BalancedL1Loss(), nn.SmoothL1Loss(beta=1 / 9), nn.SmoothL1Loss())
    )
    assert (balanced / balanced[-1] < ours / ours[-1])[:-1].all()
    assert (balanced > papers).all()
    assert torch.equal((balanced < ours)[:-1], (errors > 0.0065) & (errors < 0.3346))
    assert balanced[-1] / ours[-1] == 1.5


def test_it_is_true_what_the_page_says_of_seeds():
    stats = pytest.importorskip("scipy.stats")
    ap = {name: run["AP"] for name, run in json.loads((RESULTS / "training_shapes.json").read_text())["runs"].items()}
    ours, plain = ([ap[name] for name in sorted(ap) if name.startswith(of)] for of in ("Libra", "plain"))
    differences = [a - b for a, b in zip(ours, plain, strict=True)]
    assert min(differences) < 0 < max(differences)
    factors = [round(float(stats.t.ppf(0.975, seeds - 1)) / math.sqrt(seeds), 1) for seeds in (3, 5, 10)]
    words = " ".join((ROOT / "docs/does_it_help.md").read_text().split())
    assert "times {} with three seeds, {} with five and {} with ten".format(*factors) in words


def texts(file: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)", file.read_text())
