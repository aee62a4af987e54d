"""What it runs, what it leaves, and how it ends; mostly with a program that only pretends to train."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from balanced_learning.training.reproduction import hours, running
from balanced_learning.training.reproduction.plan import make_plan
from examples import reproduce
from tests.training.reproduction_data import calls, pretend

LITTLE = ["--small", "--epochs", "2"]
ROWS = ["baseline", "integration", "refinement", "pafpn", "balanced_pafpn"]


class Pretended:
    """The program, with one in place of the training program that pretends to train, in the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"

    def words(self, *words: object) -> list[str]:
        words = (*words, "--output-dir", self.out, "--nproc-per-node", 1)
        return [*map(str, words), "--", *LITTLE]

    def prepare(self, *words: object, **does: str) -> list[str]:
        given = self.words(*words)
        pretend(self.folder, make_plan(reproduce.read_request(reproduce.read_arguments(given))), **does)
        return given

    def __call__(self, *words: object, **does: str) -> list[str]:
        """Runs it, and returns the recipes that were trained, or dumped, since the last time."""
        given = self.prepare(*words, **does)
        before = len(calls(self.folder))
        try:
            reproduce.main(given)
        finally:
            self.called = calls(self.folder)[before:]
        return [self.recipe(call) for call in self.called]

    @staticmethod
    def recipe(call: list[str]) -> str:
        name = call[call.index("--recipe") + 1].removeprefix("paper/")
        return f"{name} {call[call.index('--seed') + 1]}" + (" dump" if "--dump-proposals" in call else "")

    def table(self, number: int) -> dict:
        return json.loads((self.out / f"table_{number}.json").read_text())

    def states(self, number: int) -> dict[str, list[str]]:
        return {row["name"]: [run["status"] for run in row["runs"].values()] for row in self.table(number)["rows"]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "PROGRAM", tmp_path / "program.py")
    return Pretended(tmp_path)


def test_a_table_is_trained_and_written(run, capfd):
    trained = run("--table", 2, "--seeds", 5, 6)
    names = ["fast_rcnn_r50_1x", "fast_rcnn_r50_1x_sampler", "fast_rcnn_r50_1x_sampler_pyramid"]
    rows = [f"{name} {seed}" for seed in (5, 6) for name in [*names, "libra_fast_rcnn_r50_1x"]]
    assert trained == ["rpn_r50_1x 5", "rpn_r50_1x 5 dump", *rows]
    assert all(call[-7:] == ["--resume", "auto", *LITTLE, "--backbone", "resnet50"] for call in run.called[2:])
    assert run.states(2) == dict.fromkeys(["baseline", "sampler", "sampler_pyramid", "libra"], ["finished"] * 2)
    out = capfd.readouterr().out
    assert (run.out / "table_2.md").read_text() in out
    assert "run 1 of 10: RPN for tables 2, 4, 5 and 6, seed 5\n" in out
    assert re.search(r"run 10 of 10: table 2, libra, seed 6; about 0\.0 h left", out)


def test_what_is_finished_is_not_run_again(run):
    assert len(run("--table", 5, "--rows", "baseline", "pafpn")) == 4
    before = (run.out / "table_5.md").read_text()
    assert run("--table", 5, "--rows", "baseline", "pafpn") == []
    assert (run.out / "table_5.md").read_text() == before
    assert run("--table", 4, "--rows", "baseline", "k2") == ["fast_rcnn_r50_1x_k2 0"]
    assert run("--table", 5, "--rows", "baseline", "--seeds", 1, 0) == ["fast_rcnn_r50_1x 1"]


def test_all_tables_are_written(run):
    trained = run("--table", "all", "--rows", "baseline", "libra_rpn_r50_1x")
    assert trained == ["rpn_r50_1x 0", "rpn_r50_1x 0 dump", "fast_rcnn_r50_1x 0", "libra_rpn_r50_1x 0"]
    assert [run.states(number)["baseline"] for number in (2, 4, 5, 6)] == [["finished"]] * 4
    assert run.states(3)["rpn_r50_1x"] == run.states(3)["libra_rpn_r50_1x"] == ["finished"]
    assert set(map(tuple, run.states(1).values())) == {("to do",)}


def test_what_was_made_with_other_settings_is_refused_by_name(run, capsys):
    run("--table", 3, "--rows", "rpn_r101_1x")
    given = [*run.words("--table", 3), "--lr", "1"]
    with pytest.raises(SystemExit) as caught:
        reproduce.main(given)
    folder = run.out / "runs/paper/rpn_r101_1x/seed_0"
    assert caught.value.code == (
        f"error: {folder}: was made with --lr 0.0025, and is asked for with --lr 1.0; "
        "name another --output-dir, or remove it"
    )
    reproduce.main([*run.prepare("--table", 3, "--rows", "rpn_r50_1x")[:-4], "--", *LITTLE])


def test_rows_that_are_not_asked_for_are_shown_but_not_trained(run):
    run("--table", 3, "--rows", "rpn_r101_1x")
    assert run("--table", 3, "--rows", "libra_rpn_r50_1x") == ["libra_rpn_r50_1x 0"]
    states = run.states(3)
    assert states == {
        "rpn_r50_1x": ["to do"],
        "rpn_r101_1x": ["finished"],
        "rpn_x101_1x": ["to do"],
        "libra_rpn_r50_1x": ["finished"],
    }


def test_a_run_that_fails_does_not_keep_others_from_their_turn(run, capfd):
    with pytest.raises(SystemExit) as caught:
        run("--table", 5, integration="fails")
    assert caught.value.code == "error: 1 of 7 runs failed; the same command tries them again"
    assert run.states(5) == {name: ["failed" if name == "integration" else "finished"] for name in ROWS}
    (failed,) = [row for row in run.table(5)["rows"] if row["name"] == "integration"]
    assert failed["runs"]["0"]["error"] == "error: there is no such thing"
    out, err = capfd.readouterr()
    assert "failed: table 5, integration, seed 0: error: there is no such thing\n" in err
    assert "warning: a matter of no weight\n" in err
    assert re.search(r"\| integration \(`integration`\) *\| failed ", out)
    assert run("--table", 5) == ["fast_rcnn_r50_1x_integration 0"]
    assert run.states(5) == {name: ["finished"] for name in ROWS}


def test_rows_fail_with_the_rpn_that_they_need(run):
    with pytest.raises(SystemExit, match="error: 7 of 7 runs failed"):
        run("--table", 5, rpn_r50_1x="fails")
    assert len(run.called) == 1
    assert run.states(5) == {name: ["failed"] for name in ROWS}
    assert run.table(5)["rows"][0]["runs"]["0"]["error"] == "RPN for tables 2, 4, 5 and 6, seed 0: failed"


def test_proposals_that_are_not_there_are_missed_once(run):
    missing = run.folder / "missing.npy"
    with pytest.raises(SystemExit, match=rf"^error: {missing}: cannot be read \(No such file"):
        run("--table", 5, "--proposals", missing)
    assert run.called == []
    assert len(run("--table", 3, "--proposals", missing)) == 4  # reads none


def test_tables_that_cannot_be_written_are_known_before_the_first_run(run):
    (run.out / "table_3.json").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"table_3\.json: cannot be written"):
        run("--table", 3)
    assert run.called == []


def test_a_run_that_ends_too_early_has_failed(run, capsys):
    with pytest.raises(SystemExit, match="error: 1 of 1 runs failed"):
        run("--table", 3, "--rows", "rpn_r50_1x", rpn_r50_1x="ends")
    assert "failed: table 3, rpn_r50_1x, seed 0: it ended before its last epoch\n" in capsys.readouterr().err
    assert run.states(3)["rpn_r50_1x"] == ["failed"]


def test_a_run_that_is_stopped_ends_the_program_with_its_code(run, capsys):
    with pytest.raises(SystemExit) as caught:
        run("--table", 5, refinement="stops")
    assert caught.value.code == 75
    assert capsys.readouterr().err.endswith(
        "stopped by a signal in table 5, refinement, seed 0; start it again to go on (exit code 75)\n"
    )
    states = run.states(5)
    assert [states[name] for name in ROWS] == [["finished"], ["finished"], ["to do"], ["to do"], ["to do"]]
    assert len(run("--table", 5)) == 3


def waiting_run(run: Pretended) -> Path:
    """The note that a run has left which waits, when it does."""
    deadline = time.monotonic() + 60
    while not (waiting := [file for file in run.out.rglob("waits") if file.read_text()]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return waiting[0]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_reaches_the_run(run, capsys, name):
    """It hears of SIGUSR1 as SIGTERM, for torchrun would die of it."""

    def send() -> None:
        waiting_run(run)
        os.kill(os.getpid(), getattr(signal, name))

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(SystemExit) as caught:
        run("--table", 3, "--rows", "rpn_r50_1x", rpn_r50_1x="waits")
    sender.join()
    assert caught.value.code == 75
    assert capsys.readouterr().err.endswith(
        f"stopped by {name} in table 3, rpn_r50_1x, seed 0; start it again to go on (exit code 75)\n"
    )
    waiting = waiting_run(run)
    assert (waiting.parent / "stopped_by").read_text() == ("SIGINT" if name == "SIGINT" else "SIGTERM")
    assert not is_alive(int(waiting.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, a run goes on without the program")
def test_a_run_ends_with_the_program_that_is_killed(run):
    words = run.prepare("--table", 3, "--rows", "rpn_r50_1x", "libra_rpn_r50_1x", libra_rpn_r50_1x="waits")
    process = os.fork()
    if process == 0:
        try:
            reproduce.main(words)
        finally:
            os._exit(3)
    waiting = waiting_run(run)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while is_alive(int(waiting.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(int(waiting.read_text()))
    assert (waiting.parent / "stopped_by").read_text() == "SIGTERM"
    assert run("--table", 3, "--rows", "rpn_r50_1x", "libra_rpn_r50_1x") == ["libra_rpn_r50_1x 0"]


def test_a_program_without_a_parent_does_not_begin(tmp_path):
    """It was killed before its run could ask to end with it."""
    words = [sys.executable, "-I", running.ends_with_parent.__file__, "1", sys.executable, "-c", "print('begins')"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    words[3] = f"{os.getpid()}"
    assert subprocess.run(words, capture_output=True, text=True).stdout == "begins\n"


@pytest.fixture
def lock(run):
    """Lets another process hold the lock of the first run's folder for some seconds."""
    folder = run.out / "runs/paper/rpn_r50_1x/seed_0"
    folder.mkdir(parents=True)
    code = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
    code += "print('locked', flush=True); time.sleep(float(sys.argv[2]))"
    holders = []

    def hold(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", code, folder / ".lock", f"{seconds}"]
        holders.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert holders[0].stdout.readline() == "locked\n"
        return holders[0]

    yield hold
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_a_run_that_has_not_ended_yet_is_waited_for(run, lock, capsys, monkeypatch):
    words = run.prepare("--table", 3, "--rows", "rpn_r50_1x")
    holder = lock(600)

    def let_go(_):
        holder.kill()
        holder.wait()

    monkeypatch.setattr(running, "time", SimpleNamespace(sleep=let_go, monotonic=time.monotonic))
    reproduce.main(words)
    assert "waiting: --output-dir" in capsys.readouterr().out


def test_a_run_that_does_not_end_is_not_waited_for_for_ever(run, lock, monkeypatch):
    monkeypatch.setattr(running, "PATIENCE", 0.1)
    lock(60)
    assert run("--table", 3, "--rows", "rpn_r50_1x") == ["rpn_r50_1x 0"]  # which says itself that it cannot


def test_a_dry_run_prints_commands_for_a_shell_and_does_nothing(run, capsys, tmp_path):
    run("--table", 3, "--rows", "rpn_r50_1x")
    before = sorted(tmp_path.rglob("*"))
    assert run("--table", 5, "--dry-run", "--images-per-second", 0.1) == []
    assert sorted(tmp_path.rglob("*")) == before
    first, *lines = capsys.readouterr().out.rpartition("# 1,280 images")[2].splitlines()
    assert first == " to train on, 120 to evaluate; throughput as told"
    # Two epochs of 1,400 images; and the proposals of as many.
    row, dump = 2 * 1_400 / 0.1 / 3600, 1_400 / 0.1 / 3600
    assert lines[0] == "# 1 of 7: RPN for tables 2, 4, 5 and 6, seed 0: finished"
    assert lines[2] == f"# 2 of 7: proposals of the RPN, seed 0: {dump:.1f} h"
    assert [line for line in lines if line.startswith("# 4")] == [
        f"# 4 of 7: table 5, integration, seed 0: {row:.1f} h"
    ]
    assert lines[-1] == f"# in all {5 * row + dump:.1f} h"
    commands = [shlex.split(line) for line in lines if line[0] != "#"]
    assert len(commands) == 6
    assert commands[-1][:4] == [sys.executable, f"{tmp_path / 'program.py'}", "--recipe", commands[-1][3]]


def test_a_dry_run_without_data_is_of_coco(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reproduce.main(["--table", "1", "--rows", "faster_rcnn_r101_2x", "--dry-run", "--images-per-second", "42.7"])
    first, title, command, total = capsys.readouterr().out.splitlines()
    assert first == "# 117,266 images to train on, 5,000 to evaluate; throughput as told"
    hours_of_2x = 24 * 122_266 / 42.7 / 3600
    assert title == f"# 1 of 1: table 1, faster_rcnn_r101_2x, seed 0: {hours_of_2x:.1f} h"
    assert total == f"# in all {hours_of_2x:.1f} h"
    assert command.endswith("runs/reproduce/runs/paper/faster_rcnn_r101_2x/seed_0 --data-path coco --resume auto")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_the_images_of_the_data_and_the_epochs_that_are_left(run, coco_root, capsys):
    words = ["--table", 3, "--rows", "rpn_r50_1x", "--data-path", coco_root]
    with pytest.raises(SystemExit):
        run(*words, rpn_r50_1x="stops")
    (run.out / "runs/paper/rpn_r50_1x/seed_0/metrics.jsonl").write_text('{"epoch": 0}\n')
    capsys.readouterr()
    run(*words, "--dry-run", "--images-per-second", 0.05)
    out = capsys.readouterr().out
    assert out.startswith("# 2 images to train on, 1 to evaluate; throughput as told\n")
    assert "# 1 of 1: table 3, rpn_r50_1x, seed 0: 1.0 min\n" in out  # of two


def test_a_dry_run_measures_a_detector_once(run, coco_root, capsys, monkeypatch):
    measured = []

    def note(config, device):
        measured.append((config.model.model, device.type))
        return hours.Throughput(100.0, 50.0)

    monkeypatch.setattr(hours, "_measure", note)
    for number, detectors in ((4, 2), (5, 6)):  # with the RPN; samplers count for nothing, necks do
        words = run.prepare("--table", number, "--seeds", 0, 1, "--dry-run", "--data-path", coco_root)
        reproduce.main([*words, "--device", "cpu"])
        assert measured == [("libra_rpn", "cpu"), *[("libra_fastrcnn", "cpu")] * (detectors - 1)]
        measured.clear()
    out = capsys.readouterr().out
    assert "throughput as measured on CPU, without what it takes to read images" in out
    assert "(100 images/s in training, 50 in evaluation)" in out


def test_throughput_is_measured_of_the_detector_itself(run, capsys):
    words = run.prepare("--table", 1, "--rows", "libra_rcnn_r50_1x", "--dry-run")
    reproduce.main([*words, "--device", "cpu", "--min-size", "64", "--max-size", "96", "-b", "1"])
    (speeds,) = re.findall(r"\((\S+) images/s in training, (\S+) in evaluation\)", capsys.readouterr().out)
    assert all(0.1 < float(speed) < 1000 for speed in speeds)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--table 4 --rows k4", "--rows k4: the rows are baseline, pos_balance, k2, k3, k5"),
        ("--table 4 --family modern", "--table 4: of the modern family there are 1 and 3 alone"),
        ("--table 4 --nproc-per-node 0", "--nproc-per-node 0: must be above 0"),
        ("--table 4 --images-per-second nan", "--images-per-second nan: must be above 0"),
        ("--table 4", "--data-path: pass COCO's folder; without, only -- --small is trained, on drawn shapes"),
        ("--table 4 --data-path /nowhere", "/nowhere: no such folder; --data-path needs"),
        ("--table 4 -- --seed 3", "-- --seed: is not for this program to pass on"),
    ],
)
def test_an_error_of_the_user_is_told_in_a_line(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        reproduce.main(words.split())
    assert f"{caught.value.code}".startswith(f"error: {told}")
    assert "\n" not in f"{caught.value.code}"
    assert not list(tmp_path.iterdir())


def test_torchrun_is_not_for_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="error: torchrun: it starts that itself"):
        reproduce.main(["--table", "3"])
