"""All six tables and the study in little on real images; and a program that is killed in the middle of one."""

import json
import os
import signal
import time
from importlib import import_module
from pathlib import Path

import pytest

from balanced_learning.training.reporting import reports
from balanced_learning.training.reproduction import reproducing
from examples import reproduce, train_torchvision_libra

ROOT = Path(__file__).parents[2]
TOY = ["--", "--small", "--epochs", "1", "--min-size", "64", "--max-size", "96", "-j", "0", "--device", "cpu"]


def train_here(job, _) -> None:
    """In place of ``run_job``: no start of Python with torch for each run."""
    train_torchvision_libra.main(list(job.command[2:]))


def words(data: Path, out: Path, *more: str) -> list[str]:
    return [*more, "--data-path", f"{data}", "--output-dir", f"{out}", *TOY]


@pytest.mark.slow
def test_all_tables_end_with_numbers_in_every_row(real_data, tmp_path, monkeypatch):
    monkeypatch.setattr(reproducing, "run_job", train_here)
    monkeypatch.setattr(train_torchvision_libra, "save_evaluation", lambda *_: None)  # pictures take most of the time
    monkeypatch.setattr(reports, "save_curves", lambda *_: None)
    given = [*words(real_data("bccd"), tmp_path, "--table", "all"), "--limit", "4"]
    reproduce.main(given)
    tables = [json.loads((tmp_path / f"table_{number}.json").read_text()) for number in range(1, 7)]
    assert [len(table["rows"]) for table in tables] == [10, 4, 4, 5, 5, 11]
    for table in tables:
        assert table["images"] == {"train": 4, "val": 4}
        for row in table["rows"]:
            (run,) = row["runs"].values()
            assert run["status"] == "finished"
            # At this size BCCD has no small objects.
            assert {name for name, value in run["values"].items() if value is None} <= {"APs"}
            assert all(0 <= value <= 100 for value in run["values"].values() if value is not None)
    monkeypatch.setattr(reproducing, "run_job", lambda job, _: pytest.fail(f"{job.title} was finished"))
    reproduce.main(given)


@pytest.mark.slow
def test_the_study_ends_with_numbers_in_every_row(real_data, tmp_path, monkeypatch):
    """With its own detector, from scratch; what the page is made of finds them all."""
    out = tmp_path / "bccd_scratch"
    monkeypatch.setattr(reproducing, "run_job", train_here)
    monkeypatch.setattr(train_torchvision_libra, "save_evaluation", lambda *_: None)
    monkeypatch.setattr(reports, "save_curves", lambda *_: None)
    given = ["--table", "study", "--data-path", f"{real_data('bccd')}", "--output-dir", f"{out}", "--"]
    reproduce.main([*given, "--weights-backbone", "none", "--epochs", "1", "--limit", "4", "--device", "cpu"])
    table = json.loads((out / "table_study.json").read_text())
    assert table["images"] == {"train": 4, "val": 4}
    assert len(table["rows"]) == 10
    for row in table["rows"]:
        assert row["runs"]["0"]["status"] == "finished"
        assert 0 <= row["mean"]["AP"] <= 100
        if row["name"] == "plain":
            assert row["difference"] is None
        else:
            assert row["difference"]["AP"]["seeds"] == [0]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gathered = import_module("study").gather(out)
    assert gathered["rows"].keys() == {row["name"] for row in table["rows"]}
    for row in table["rows"]:
        assert gathered["rows"][row["name"]]["seeds"]["0"]["AP"] == pytest.approx(row["mean"]["AP"], abs=0.01)


@pytest.mark.slow
def test_a_table_is_the_same_when_the_program_was_killed(real_data, tmp_path, monkeypatch):
    """In the second run, after its first epoch; the run that is cut off ends on its own, and goes on."""
    rows = ("--table", "3", "--rows", "rpn_r50_1x", "libra_rpn_r50_1x")
    toy = ["--limit", "12", "--epochs", "2", "--checkpoint-steps", "1"]
    given = [*words(real_data("bccd"), tmp_path / "killed", *rows), *toy]
    process = os.fork()
    if process == 0:
        try:
            reproduce.main(given)
        finally:
            os._exit(3)
    deadline = time.monotonic() + 600
    cut_off = tmp_path / "killed/runs/paper/libra_rpn_r50_1x/seed_0"
    while not (cut_off / "evaluation_00.json").exists():
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert len((cut_off / "metrics.jsonl").read_text().splitlines()) < 2
    reproduce.main(given)  # waits for the run that is still there, if it is

    monkeypatch.setattr(reproducing, "run_job", train_here)
    reproduce.main([*words(real_data("bccd"), tmp_path / "whole", *rows), *toy])
    killed, whole = ((tmp_path / name / "table_3.json").read_text() for name in ("killed", "whole"))
    assert killed.replace(f"{tmp_path}/killed", f"{tmp_path}/whole") == whole
    states = [run["status"] for row in json.loads(whole)["rows"] for run in row["runs"].values()]
    assert states == ["finished", "to do", "to do", "finished"]
