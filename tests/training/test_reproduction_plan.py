"""The runs of a plan: which there are, in which order, with which words, and with which settings."""

import json
import os
import shlex
import sys
from dataclasses import replace

import pytest
import torch

from balanced_learning.training.errors import UserError
from balanced_learning.training.reproduction.folders import check_settings, is_finished, note_maker
from balanced_learning.training.reproduction.plan import Cell, make_plan, maker_file
from balanced_learning.training.reproduction.published import read_table
from tests.training.reproduction_data import finish, plan_of, request_of, settings_of, words_of


def titles(plan):
    return [job.title for job in plan.jobs]


def test_rows_of_fast_rcnn_need_an_rpn_and_its_proposals_once(tmp_path):
    plan = plan_of(tmp_path, 5, seeds=(3, 4))
    rpn, dump, *rows = plan.jobs
    names = ["baseline", "integration", "refinement", "pafpn", "balanced_pafpn"]
    assert (rpn.title, dump.title) == ("RPN for tables 2, 4, 5 and 6, seed 3", "proposals of the RPN, seed 3")
    assert [job.title for job in rows] == [f"table 5, {name}, seed {seed}" for seed in (3, 4) for name in names]
    assert all(job.needs == (rpn, dump) for job in rows)
    assert rpn.folder == dump.folder == tmp_path / "out/runs/paper/rpn_r50_1x/seed_3"
    file = tmp_path / "out/proposals.npy"
    assert dump.dumps == file
    assert {job.config.data.proposals for job in rows} == {file}


def test_a_job_is_a_command_of_the_training_program(tmp_path):
    plan = plan_of(tmp_path, 3, seeds=(7,), data_path=tmp_path / "a folder", options=("--lr", "0.5"))
    job = plan.jobs[0]
    folder = tmp_path / "out/runs/paper/rpn_r50_1x/seed_7"
    assert words_of(job, tmp_path) == [
        *("--recipe", "paper/rpn_r50_1x", "--seed", "7", "--output-dir", f"{folder}"),
        *("--data-path", f"{tmp_path / 'a folder'}", "--resume", "auto"),
        *("--small", "--epochs", "2", "--lr", "0.5", "--backbone", "resnet50"),
    ]
    assert (job.folder, job.config.training.seed, job.config.training.lr) == (folder, 7, 0.5)
    assert job.config.training.epochs == 2  # not the 12 of the recipe
    assert plan.cells[Cell("table_3", "rpn_r50_1x", 7)] == job


def test_tables_share_runs(tmp_path):
    request = request_of(tmp_path)
    tables = tuple(read_table(number) for number in range(1, 7))
    plan = make_plan(replace(request, tables=tables))
    commands = [job.command for job in plan.jobs]
    assert len(commands) == len(set(commands))
    recipes = {row.recipe for table in tables for row in table.rows}
    assert len(plan.jobs) == len(recipes) + 1  # and the dump: the RPN is a row of Table 3
    baselines = {plan.cells[Cell(f"table_{number}", "baseline", 0)] for number in (2, 4, 5, 6)}
    assert len(baselines) == 1
    before_dump = titles(plan)[: titles(plan).index("proposals of the RPN, seed 0")]
    assert not any("table 2" in title for title in before_dump)


def test_rows_alone_are_trained_with_what_they_need(tmp_path):
    plan = plan_of(tmp_path, 6, rows=("l1_w1.5",))
    assert [title.split(",")[0] for title in titles(plan)] == [
        "RPN for tables 2",
        "proposals of the RPN",
        "table 6",
    ]
    assert len(plan.cells) == 11
    with pytest.raises(UserError, match=r"--rows l1: the rows are baseline, smooth_l1_w1.5, .*a0.5_g2$"):
        plan_of(tmp_path, 6, rows=("baseline", "l1"))


def test_given_proposals_need_no_rpn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.npy").touch()
    plan = plan_of(tmp_path, 4, proposals=(tmp_path / "some.npy").relative_to(tmp_path))
    assert len(plan.jobs) == 5
    assert {job.config.data.proposals for job in plan.jobs} == {tmp_path / "some.npy"}
    assert all(job.needs == () for job in plan.jobs)


def test_proposals_that_are_there_serve_other_seeds(tmp_path):
    rpn, dump, *_ = plan_of(tmp_path, 5, seeds=(3,)).jobs
    finish(rpn)
    note_maker(dump)
    assert not is_finished(dump)
    assert titles(plan_of(tmp_path, 5, seeds=(8,)))[0] == "RPN for tables 2, 4, 5 and 6, seed 8"
    dump.dumps.touch()
    assert json.loads(maker_file(dump.dumps).read_text()) == json.loads(json.dumps(settings_of(rpn)))
    assert is_finished(dump)
    again = plan_of(tmp_path, 5, seeds=(8,))
    assert titles(again)[:2] == ["proposals of the RPN, seed 3", "table 5, baseline, seed 8"]
    check_settings(again.jobs[0])
    with pytest.raises(UserError, match=r"out/proposals.npy: .*--epochs 2, and is asked for with --epochs 3; name"):
        check_settings(plan_of(tmp_path, 5, seeds=(8,), options=("--epochs", "3")).jobs[0])


def test_a_note_of_nothing_known_is_refused_by_name(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/proposals.npy").touch()
    with pytest.raises(UserError, match=r"out/proposals.npy: without proposals.json, .* Pass them as --proposals"):
        plan_of(tmp_path, 5)
    for text, told in (("[]", "must have the settings of the RPN"), ("{", "cannot be read")):
        (tmp_path / "out/proposals.json").write_text(text)
        with pytest.raises(UserError, match=f"out/proposals.json: {told}"):
            plan_of(tmp_path, 5)


def test_several_processes_are_started_by_torchrun_and_share_a_batch(tmp_path):
    one, four = (plan_of(tmp_path, 1, processes=processes).jobs[0] for processes in (1, 4))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert list(four.command[:7]) == [sys.executable, *launcher, f"{tmp_path / 'program.py'}"]
    assert four.command[7:] == one.command[2:]
    assert (one.images_per_step, four.images_per_step) == (2, 8)
    assert (one.config.training.lr, four.config.training.lr) == (0.0025, 0.01)


def test_there_is_a_process_for_each_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert plan_of(tmp_path, 1, processes=None).jobs[0].images_per_step == 6
    on_cpu = plan_of(tmp_path, 1, processes=None, options=("--device", "cpu"))
    assert on_cpu.jobs[0].images_per_step == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert plan_of(tmp_path, 1, processes=None).jobs[0].images_per_step == 2


def test_the_world_size_of_others_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert plan_of(tmp_path, 1, processes=2).jobs[0].images_per_step == 4
    with pytest.raises(UserError):
        plan_of(tmp_path, 1, options=("--ema", "1"))
    assert os.environ["WORLD_SIZE"] == "5"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--seed 3", "-- --seed: is not for this program to pass on"),
        ("--output-dir x", "-- --output-dir: is not"),
        ("--recipe shapes", "-- --recipe: is not"),
        ("--resume x", "-- --resume: is not"),
        ("--model libra_rpn", "-- --model: is not"),
        ("--test-only", "-- --test-only: is not"),
        ("--dry-run", "-- --dry-run: is not"),
        ("--dump-proposals x", "-- --dump-proposals: is not"),
        ("--epoch many", r"options of the training program, behind --: .*--epoch.*must be a whole number, got 'many'"),
        ("--speed 3", "options of the training program, behind --: unrecognized arguments: --speed 3"),
    ],
)
def test_options_that_are_no_options_are_refused(tmp_path, options, told):
    with pytest.raises(UserError, match=told):
        plan_of(tmp_path, 1, options=shlex.split(options))


def test_a_small_detector_has_its_own_backbone_in_every_row(tmp_path):
    plan = plan_of(tmp_path, 1)
    assert {job.config.model.backbone for job in plan.jobs} == {"resnet50"}
    large = make_plan(replace(request_of(tmp_path, 1), options=()))
    assert {job.config.model.backbone for job in large.jobs} == {"resnet50", "resnet101", "resnext101_64x4d"}
