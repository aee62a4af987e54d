"""The benchmark of training: a stopped measurement goes on where it was."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROW = {"AP": 0.25, "AP50": 0.5, "AP75": 0.125, "total_seconds": 90.0}


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Measures the shapes with runs that take no time, of which the third fails if asked to."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    training = import_module("training")
    monkeypatch.setattr(training, "RESULTS", tmp_path)
    monkeypatch.setattr(training.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["training.py", "shapes"])

    def call(commit, *, fails=False):
        started = []

        def run(options, data_path, threads):
            started.append(options)
            if fails and len(started) == 3:
                raise KeyboardInterrupt
            return dict(ROW)

        monkeypatch.setattr(training, "environment", lambda device: {"device": device, "commit": commit})
        monkeypatch.setattr(training, "run", run)
        training.main()
        return len(started)

    return call


@pytest.mark.parametrize(("commits", "is_kept"), [("aa", True), ("ab", False), (["a-dirty"] * 2, False)])
def test_what_was_measured_of_the_same_commit_is_kept(measure, tmp_path, capsys, commits, is_kept):
    with pytest.raises(KeyboardInterrupt):
        measure(commits[0], fails=True)
    begun = len(json.loads((tmp_path / "training_shapes.unfinished.json").read_text())["runs"])
    assert begun >= 2
    assert measure(commits[1]) == (6 - begun if is_kept else 6)
    *_, means, _, difference = capsys.readouterr().out.splitlines()
    assert means.split(" | ")[:3] == ["| mean", "    25.0", "    25.0"]
    assert difference == "Libra minus plain, AP, with the 95 % interval: +0.0 [+0.0, +0.0]."
    results = json.loads((tmp_path / "training_shapes.json").read_text())
    assert len(results["runs"]) == 6
    assert [file.name for file in tmp_path.iterdir()] == ["training_shapes.json"]
