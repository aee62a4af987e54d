"""What the folder of a run is taken for: finished, not finished, or somebody else's."""

import json
import shutil
from dataclasses import replace

import pytest

from balanced_learning.training.errors import UserError
from balanced_learning.training.reproduction.folders import check_settings, difference, is_finished, read_rows
from balanced_learning.training.reproduction.plan import make_plan
from tests.training.reproduction_data import finish, plan_of, request_of, settings_of


def change(job, **settings):
    file = job.folder / "args.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def job(tmp_path):
    """A run of two epochs that is finished."""
    job = plan_of(tmp_path, 3, data_path=tmp_path / "data").jobs[0]
    finish(job)
    return job


def test_a_run_is_finished_when_all_epochs_are_there(job):
    assert is_finished(job)
    lines = (job.folder / "metrics.jsonl").read_text().splitlines()
    (job.folder / "metrics.jsonl").write_text(lines[0] + "\n")
    assert not is_finished(job)
    assert read_rows(job.folder) == [{"epoch": 0}]
    shutil.rmtree(job.folder)
    assert not is_finished(job)
    assert difference(job) is None


def test_a_run_without_settings_is_not_finished(job):
    (job.folder / "args.json").unlink()
    assert not is_finished(job)


def test_a_run_is_finished_when_its_patience_is_over(job):
    change(job, epochs=9)
    assert not is_finished(job)
    finish(job, AR1000=0.5)  # not higher in the second epoch
    change(job, epochs=9, patience=1)
    assert is_finished(job)
    change(job, patience=2)
    assert not is_finished(job)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("lr", 0.25, "--lr 0.25, and is asked for with --lr 0.0025"),
        ("epochs", 1, "--epochs 1, and is asked for with --epochs 2"),
        ("limit", 4, "--limit 4, and is asked for with no --limit"),
        ("lr_steps", [8], "--lr-steps 8, and is asked for with --lr-steps 8 11"),
        ("pyramid", True, "--pyramid, and is asked for with --no-pyramid"),
        ("data_path", "/elsewhere", "--data-path /elsewhere, and is asked for with --data-path "),
        ("seed", 1, "--seed 1, and is asked for with --seed 0"),
        ("world_size", 2, "4 images a step, not 2"),
        ("batch_size", 4, "4 images a step, not 2"),
    ],
)
def test_a_run_with_other_settings_is_refused_by_name(job, name, value, told):
    change(job, **{name: value})
    with pytest.raises(UserError, match=f"{job.folder}: was made with {told}"):
        check_settings(job)


def test_a_learning_rate_that_follows_from_the_images_of_a_step_is_not_what_is_told(job):
    change(job, world_size=2, lr=0.005)
    with pytest.raises(UserError, match="4 images a step, not 2"):
        check_settings(job)


@pytest.mark.parametrize("settings", [{"device": "cuda"}, {"workers": 9}, {"batch_size": 1, "world_size": 2}])
def test_what_changes_no_result_may_be_another(job, settings):
    change(job, **settings)
    check_settings(job)


def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default(job):
    settings = settings_of(job)
    del settings["alpha"]
    (job.folder / "args.json").write_text(json.dumps(settings | {"of_a_newer_version": 1}))
    check_settings(job)


def test_a_run_that_has_not_saved_may_be_begun_anew_with_other_settings(job):
    (job.folder / "metrics.jsonl").unlink()
    change(job, batch_size=64, lr=3.0)
    check_settings(job)
    (job.folder / "checkpoint_previous.pth").touch()
    with pytest.raises(UserError, match="64 images a step, not 2"):
        check_settings(job)


def test_runs_and_proposals_may_be_moved_together(tmp_path):
    request = request_of(tmp_path, 5)
    for job in make_plan(request).jobs:
        if not job.dumps:
            finish(job)
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = make_plan(replace(request, output_dir=tmp_path / "moved"))
    for job in moved.jobs:
        check_settings(job)
        assert is_finished(job) != bool(job.dumps)
    change(moved.jobs[-1], proposals="/other/proposals.npy")
    with pytest.raises(UserError, match=r"--proposals /other/proposals\.npy, and .*/moved/proposals\.npy"):
        check_settings(moved.jobs[-1])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("metrics.jsonl", "{\n", "is no JSON"),
        ("metrics.jsonl", "[]\n", r"a line must be the row of an epoch, got \[\]"),
        ("metrics.jsonl", '{"epoch": "one"}\n', "a line must be the row of an epoch"),
        ("args.json", "{", "is no JSON"),
        ("args.json", '{"epochs": "2"}', "epochs must be a whole number, got '2'"),
        ("args.json", "[1]", r"must have settings by name, got \[1\]"),
    ],
)
def test_a_file_of_something_else_is_refused_by_name(job, name, text, told):
    (job.folder / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: {told}"):
        is_finished(job)
