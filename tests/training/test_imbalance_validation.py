"""Whether the report on imbalances predicts what helps: from hand-made reports and runs to the page."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from balanced_learning.training.imbalance.advice import advise
from tests.training.imbalance_data import feature_level, measurements
from tests.training.small import name_as_untrained, save_untrained
from tests.training.test_imbalance_advice import OFF
from tests.training.test_study_benchmark import ROOT, cells, make_folder

PAGE = "Before.\n\n<!-- validation -->\nold\n\n<!-- end of validation -->\n\nAfter.\n"
PARTS = ("sampler", "pyramid", "balanced_l1")
APS = {
    "plain": {0: 0.30, 1: 0.40, 2: 0.50},
    "sampler": {0: 0.34, 1: 0.42, 2: 0.53},  # +2 to +4: above zero
    "pyramid": {0: 0.29, 1: 0.43, 2: 0.49},  # -1 to +3
    "balanced_l1": {0: 0.35, 1: 0.45},
    "plain_beta_1": {0: 0.20, 1: 0.40},
}


@pytest.fixture
def validation(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("imbalance_validation")


@pytest.fixture
def points(validation):
    return import_module("_validation")


@pytest.fixture
def reports(validation, monkeypatch):
    """The checkpoints that are measured; each report is the hand-made one."""
    asked: list[Path] = []

    def report(checkpoint, batches):
        asked.append(checkpoint)
        return content()

    monkeypatch.setattr(validation, "report", report)
    return asked


@pytest.fixture
def page(tmp_path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def content(**changes):
    """A report as the program writes it, of measurements made by hand."""
    measured = measurements(**changes)
    whole = {
        "data": {"images": 100, "evaluated_images": 50},
        **measured.plain(),
        "advice": [vars(each) for each in advise(measured, OFF)],
    }
    return json.loads(json.dumps(whole))


def reported(*strengths):
    """The reports on a situation with these strengths of the parts, which are all figures, too."""
    parts = zip(PARTS, strengths, strict=True)
    return {"plain": {"0": {part: {"strength": s, "verdict": "-", "figures": {"figure": s}} for part, s in parts}}}


def studied(*gains):
    """The study's situation in which the parts have these gains, one a seed."""
    rows = {"plain": [10.0] * 2} | {part: [10.0 + gain for gain in of] for part, of in zip(PARTS, gains, strict=True)}
    return {
        "boxes": {},
        "rows": {row: {"seeds": {f"{i}": {"AP": ap} for i, ap in enumerate(aps)}} for row, aps in rows.items()},
    }


def write_study(folder, root):
    """Puts the runs of a folder into the study's results in ``root``."""
    study = import_module("study")
    file = root / study.FILE
    results = study.read_results(file)
    results[folder.name] = study.joined(results.get(folder.name), study.gather(folder))
    file.write_text(json.dumps(results))


def test_the_page_is_what_the_results_say(validation):
    results, study = (
        validation.read_results(validation.RESULTS / file) for file in (validation.FILE, validation.STUDY)
    )
    text = (ROOT / "docs" / "study.md").read_text()
    assert f"<!-- validation -->\n{validation.block(results, study)}\n\n<!-- end of validation -->" in text


def test_the_figures_are_those_that_the_strength_is_the_least_of(validation):
    """Unevenness: 3/4 of the boxes use 0.3 too much of one map, the others 0.1; lost: 0.28 of 0.7."""
    of = validation.predictions(content(), validation.BASELINES["plain"])
    assert (of["images"], of["evaluated_images"]) == (100, 50)
    assert of["sampler"]["figures"] == pytest.approx({"changed": 0.31, "approach": 0.3, "hard minus random": 0.3})
    assert of["pyramid"]["figures"] == pytest.approx({"unevenness": 0.25, "likeness": 0.4})
    assert of["balanced_l1"]["figures"] == pytest.approx({"inliers' gain": 0.25, "growth": 1.9, "lost": 0.4})
    assert [of[part]["strength"] for part in PARTS] == pytest.approx([0.3, 0.25, 0.25])
    assert [of[part]["verdict"] for part in PARTS] == ["can help"] * 3


def test_what_is_not_known_of_a_level_stays_out(validation):
    nan = float("nan")
    one_level, none = feature_level([[0.8, 0.2], [nan, nan]]), feature_level([[nan, nan], [nan, nan]], before=nan)
    of = [validation.predictions(content(feature=each), {"pyramid": "feature"}) for each in (one_level, none)]
    assert [each["pyramid"]["figures"]["unevenness"] for each in of] == [0.3, None]
    assert of[1]["pyramid"]["figures"]["likeness"] is None


def test_the_program_writes_what_is_read(validation, coco_root, edit, tmp_path, monkeypatch):
    name_as_untrained(edit)
    monkeypatch.setattr(validation.imbalance_report, "save_imbalance", lambda *_: None)
    checkpoint = save_untrained(tmp_path / "run" / "checkpoint.pth", data_path=coco_root)
    of = validation.predictions(validation.report(checkpoint, 1), validation.BASELINES["plain_beta_1"])
    assert set(of) == {"images", "evaluated_images", "balanced_l1"}
    assert of["balanced_l1"]["figures"]["growth"] > 0
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint.pth"]


def test_each_baseline_is_measured_once_and_gains_are_paired(validation, reports, tmp_path, page, capsys):
    file, folder = tmp_path / "validation.json", make_folder(tmp_path / "bccd_scratch", APS)
    write_study(folder, tmp_path)
    validation.update([folder], 2, file, page)
    assert [f"{path.parent.relative_to(folder)}" for path in reports] == [
        *(f"runs/study/plain/seed_{seed}" for seed in range(3)),
        *(f"runs/study/plain_beta_1/seed_{seed}" for seed in range(2)),
    ]
    assert "bccd_scratch: report 4 of 5, plain_beta_1 with seed 0\n" in capsys.readouterr().out
    rows = json.loads(file.read_text())["bccd_scratch"]
    assert rows["plain_beta_1"]["0"].keys() & set(PARTS) == {"balanced_l1"}

    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- validation -->\n| situation")
    assert text.endswith("<!-- end of validation -->\n\nAfter.\n")
    start = ["BCCD, from scratch", "`sampler`", "`plain`"]
    figures = "changed 0.31, approach 0.30, hard minus random 0.30"
    end = ["0.30", "3 seeds", "**+3.0 [+0.5, +5.5]**", "3 seeds"]
    assert cells(text, *start)[:10] == [*start, figures, "can help", "right", *end]
    assert cells(text, start[0], "`pyramid`")[5] == "undecided"
    assert cells(text, start[0], "`pyramid`")[8] == "+0.3 [-5.4, +6.1]"
    assert cells(text, start[0], "`balanced_l1`", "`plain_beta_1`")[8:10] == ["+10.0", "2 seeds"]
    assert cells(text, start[0], "`balanced_l1`", "`plain`")[5:10] == [
        "undecided",
        "0.25",
        "3 seeds",
        "+5.0",
        "2 seeds",
    ]
    assert "The verdict is right in 1 of 1 cases that are decided." in text
    assert "be right in 1 of them, and of none in 0." in text

    other = make_folder(tmp_path / "a_first_one", APS)
    write_study(other, tmp_path)
    validation.update([other], 2, file, page)
    text = page.read_text()
    assert text.index("a first one") < text.index("BCCD, from scratch")
    validation.update([], 2, file, page)  # the page from the file
    assert (len(reports), page.read_text()) == (10, text)


def test_a_stop_loses_no_report_and_later_runs_are_taken_in(validation, reports, tmp_path, page, monkeypatch):
    file = tmp_path / "validation.json"
    few = {"plain": APS["plain"], "sampler": {0: 0.34}}
    first = make_folder(tmp_path / "one" / "bccd_scratch", few)
    write_study(first, tmp_path)
    of_two = iter((content(), content()))
    monkeypatch.setattr(validation, "report", lambda *_: next(of_two))
    with pytest.raises(StopIteration):
        validation.update([first], 2, file, page)
    assert list(json.loads(file.read_text())["bccd_scratch"]["plain"]) == ["0", "1"]
    validation.update([], 2, file, page)
    assert cells(page.read_text(), "BCCD, from scratch", "`sampler`")[7:10] == ["2 seeds", "+4.0", "1 seed"]

    monkeypatch.undo()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(validation, "report", lambda checkpoint, _: reports.append(checkpoint) or content())
    validation.update([first], 2, file, page)
    assert [path.parent.name for path in reports] == ["seed_2"]
    assert cells(page.read_text(), "BCCD, from scratch", "`pyramid`")[7:10] == ["3 seeds", "-", "-"]
    assert cells(page.read_text(), "BCCD, from scratch", "`sampler`")[7:10] == ["3 seeds", "+4.0", "1 seed"]

    second = make_folder(tmp_path / "two" / "bccd_scratch", APS)
    write_study(second, tmp_path)
    validation.update([second], 2, file, page)
    assert cells(page.read_text(), "BCCD, from scratch", "`sampler`")[9] == "3 seeds"
    assert len(reports) == 3  # two more, of plain_beta_1


def test_gains_are_of_all_runs_also_of_those_without_a_report(validation, reports, tmp_path, page):
    gone = make_folder(tmp_path / "gone" / "bccd_scratch", {"plain": {0: 0.3, 1: 0.4}, "sampler": {0: 0.34, 1: 0.42}})
    later = make_folder(tmp_path / "later" / "bccd_scratch", {"plain": {2: 0.5}, "sampler": {2: 0.53}})
    write_study(gone, tmp_path)
    write_study(later, tmp_path)
    validation.update([later], 2, tmp_path / "validation.json", page)
    assert len(reports) == 1
    line = cells(page.read_text(), "BCCD, from scratch", "`sampler`")
    assert line[7:10] == ["1 seed", "**+3.0 [+0.5, +5.5]**", "3 seeds"]


@pytest.mark.parametrize(
    ("strength", "gains", "is_right"),
    [
        (0.30, [2.0, 3.0, 4.0], True),
        (0.06, [2.0, 3.0, 4.0], True),  # "little" is said to help, too
        (0.04, [2.0, 3.0, 4.0], False),
        (0.30, [-1.0, 3.0, 4.0], None),  # the interval has zero in it
        (0.04, [-1.0, 3.0, 4.0], None),
        (0.30, [-4.0, -3.0, -2.0], False),
        (0.04, [-4.0, -3.0, -2.0], True),
        (0.30, [-0.1, 0.0, 0.2], False),  # up to 0.4: less than half a point
        (0.04, [-0.1, 0.0, 0.2], True),
        (0.04, [-0.2, 0.0, 0.3], None),  # up to 0.7
        (0.30, [0.1, 0.11, 0.12], True),  # little, but sure
        (0.30, [3.0, 4.0], None),
        (0.04, [], None),
    ],
)
def test_when_a_verdict_is_right(points, strength, gains, is_right):
    point = points.Point("bccd_scratch", "sampler", "plain", [strength - 0.01, strength + 0.01], gains, {})
    assert point.is_right is is_right


def test_spearmans_correlation_by_hand(points):
    """One minus six times the squared differences of ranks over n (n^2 - 1): 1 - 6 * 4 / 60."""
    assert points.correlation([0.1, 0.2, 0.3, 0.9], [2.0, 1.0, 70.0, 3.0]) == pytest.approx(0.6)
    assert points.correlation([0.1, 0.2, 0.3, 0.4], [4.0, 3.0, 2.0, -9.0]) == pytest.approx(-1)
    assert points.correlation([0.1, 0.2, 0.3], [1.0, 2.0, 3.0]) is None
    assert points.correlation([0.1] * 4, [1.0, 2.0, 3.0, 4.0]) is None


def test_the_correlations_are_of_means_over_seeds(points):
    """Strengths and mean gains of four points rank (1, 2, 3, 4) and (2, 1, 4, 3); two more have no gain yet."""
    results = {"bccd_scratch": reported(0.1, 0.2, 0.9), "deeppcb_scratch": reported(0.3, 0.4, 0.0)}
    study = {
        "bccd_scratch": studied([3.0, 1.0], [1.0, 2.0], []),
        "deeppcb_scratch": studied([9.0, 7.0], [5.0], []),
    }
    assert len(points.points(results, study)) == 6
    text = points.block(results, study)
    assert "No case is decided yet. Spearman's rank correlation of strength and gain over 4 points: +0.60." in text
    assert cells(text, "figure", "`sampler`, `pyramid`, `balanced_l1`")[2:4] == ["4", "+0.60"]
    assert "over 0 points: none." in points.block(results, {})
    assert points.block({}, study) == points.NOTHING
