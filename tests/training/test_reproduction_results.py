"""The numbers of a table, as JSON and as Markdown, and the statistics behind them."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from balanced_learning.training.reproduction.hours import COCO, Images
from balanced_learning.training.reproduction.plan import Cell, make_plan
from balanced_learning.training.reproduction.results import write_table
from balanced_learning.training.reproduction.spreads import interval, mean, spread
from tests.training.reproduction_data import finish, request_of

FEW = Images(4, 3)
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def test_means_and_spreads():
    assert mean([1.0, 2.0, 6.0]) == 3.0
    assert spread([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert (mean([]), spread([]), spread([4.0])) == (None, None, None)


def test_an_interval_of_three_pairs_is_that_of_a_printed_table():
    """Student's t for 2 degrees of freedom and 95 % is 4.303; the standard deviation of 1, 2, 3 is 1."""
    pytest.importorskip("scipy")
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    assert interval([1.0, 2.0]) is None
    assert interval([0.5] * 4) == (0.5, 0.5)


def test_an_interval_is_that_of_the_paired_test():
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    for count in (3, 4, 9):
        before = [draw.gauss(36, 0.3) for _ in range(count)]
        after = [value + draw.gauss(1, 0.2) for value in before]
        expected = stats.ttest_rel(after, before).confidence_interval(0.95)
        found = interval([b - a for a, b in zip(before, after, strict=True)])
        assert found == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.fixture
def written(tmp_path):
    """Writes Table 5 with these runs: by row, AP by seed; the other metrics are AP + 0.1, + 0.2, ..."""

    def write(runs, *, seeds=(0, 1, 2), images=FEW, failures=(), **more):
        request = request_of(tmp_path, 5, seeds=seeds, **more)
        plan = make_plan(request)
        for row, aps in runs.items():
            for seed, ap in aps.items():
                values = {name: None if ap is None else (ap + i / 10) / 100 for i, name in enumerate(METRICS)}
                finish(plan.cells[Cell("table_5", row, seed)], **values)
        failed = {plan.cells[cell]: error for cell, error in failures}
        text = write_table(request, request.tables[0], plan, images, "abc123", failed)
        assert (request.output_dir / "table_5.md").read_text() == text
        content = (request.output_dir / "table_5.json").read_text()
        return json.loads(content, parse_constant=pytest.fail), text

    (tmp_path / "out").mkdir()
    return write


def rows_of(content):
    return {row["name"]: row for row in content["rows"]}


def cells_of(text, label):
    """The cells of the first lines of the Markdown that begin with this label, one list a line."""
    lines = [line for line in text.splitlines() if re.match(rf"\| {re.escape(label)}( \(`|  *\|)", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_row_has_published_and_measured_numbers_and_their_difference(written):
    pytest.importorskip("scipy")
    content, text = written({"baseline": {0: 30.0, 1: 31.0, 2: 32.0}, "pafpn": {0: 31.0, 1: 33.0, 2: 35.0}})
    row = rows_of(content)["pafpn"]
    assert row["published"] == {"AP": 36.3, "AP50": 58.4, "AP75": 39.0, "APs": 21.7, "APm": 39.9, "APl": 46.3}
    assert [row["runs"][seed]["values"]["AP"] for seed in "012"] == [31.0, 33.0, 35.0]
    assert row["mean"]["AP"] == pytest.approx(33)
    assert row["std"]["AP"] == pytest.approx(2)
    assert row["mean"]["APl"] == pytest.approx(33.5)
    difference = row["difference"]["AP"]
    assert (difference["published"], difference["mean"]) == (0.4, pytest.approx(2))
    half = 4.3027 / math.sqrt(3)
    assert difference["interval"] == pytest.approx([2 - half, 2 + half], abs=1e-4)
    assert difference["seeds"] == [0, 1, 2]
    assert row["baseline"] == "baseline"
    assert rows_of(content)["baseline"]["difference"] is None

    values, differences = cells_of(text, "PAFPN")
    assert values[:3] == ["PAFPN (`pafpn`)", "3", "36.3 / 33.0 +- 2.0"]
    assert differences[:4] == ["PAFPN", "`baseline`", "3", f"+0.4 / +2.0 [{2 - half:+.1f}, {2 + half:+.1f}]"]


def test_seeds_are_compared_in_pairs(written):
    content, text = written({"baseline": {0: 30.0, 2: 34.0}, "pafpn": {0: 31.0, 1: 99.0}}, seeds=(0, 1, 2))
    difference = rows_of(content)["pafpn"]["difference"]["AP"]
    assert (difference["mean"], difference["interval"], difference["seeds"]) == (1.0, None, [0])
    values, differences = cells_of(text, "PAFPN")
    assert values[1:3] == ["2, 1 to do", "36.3 / 65.0 +- 48.1"]
    assert differences[2:4] == ["1", "+0.4 / +1.0"]


def test_a_table_shows_what_is_there(written):
    content, text = written(
        {"baseline": {0: 30.0}}, seeds=(0,), failures=[(Cell("table_5", "pafpn", 0), "error: no memory")]
    )
    assert cells_of(text, "baseline")[0][:3] == ["baseline (`baseline`)", "1", "35.9 / 30.0"]
    assert cells_of(text, "PAFPN")[0][:3] == ["PAFPN (`pafpn`)", "failed", "36.3 / -"]
    assert cells_of(text, "integration")[0][:3] == ["integration (`integration`)", "to do", "36.3 / -"]
    assert cells_of(text, "integration")[1][:4] == ["integration", "`baseline`", "0", "+0.4 / -"]
    row = rows_of(content)["pafpn"]
    assert row["runs"]["0"]["error"] == "error: no memory"
    assert row["mean"] == dict.fromkeys(METRICS)


def test_a_metric_that_is_not_defined_is_none(written):
    """COCO has no AP of small objects where there are none."""
    content, text = written({"baseline": {0: 30.0}, "pafpn": {0: None}}, seeds=(0,))
    row = rows_of(content)["pafpn"]
    assert (row["runs"]["0"]["status"], row["mean"]["AP"]) == ("finished", None)
    assert cells_of(text, "PAFPN")[0][:3] == ["PAFPN (`pafpn`)", "1", "36.3 / -"]


def test_runs_with_other_settings_are_not_shown(written):
    written({"baseline": {0: 30.0}}, seeds=(0,))
    content, _ = written({}, seeds=(0,), options=("--lr", "3"))
    assert rows_of(content)["baseline"]["runs"]["0"]["status"] == "to do"


def test_a_table_says_what_is_not_as_in_the_paper(written):
    content, text = written({"baseline": {0: 30.0}}, seeds=(0,), options=("--lr", "3"))
    told = "\n".join(content["notes"])
    assert "Trained with --small --epochs 2 --lr 3: not with the settings of the recipes" in told
    assert "Trained on 4 images and evaluated on 3, not on COCO's 117,266 and 5,000" in told
    assert "an interval from 3 seeds on" in told
    assert all(note in text for note in content["notes"])
    assert (content["commit"], content["device"], content["seeds"]) == ("abc123", "1 x CPU", [0])
    assert content["versions"] == [{"torch": "2", "gpu": "none that torch can use"}]
    assert content["rows"][0]["runs"]["0"]["epochs"] == 2
    of_coco, _ = written({}, images=COCO)
    assert not any("images" in note and "COCO's" in note for note in of_coco["notes"])


def test_a_table_of_which_nothing_is_published_shows_what_is_measured(tmp_path):
    request = request_of(tmp_path, "study", seeds=(0, 1))
    plan = make_plan(request)
    for cell, job in plan.cells.items():
        if cell.row in ("plain", "libra"):
            finish(job, AP=0.3 + 0.01 * cell.seed + 0.02 * (cell.row == "libra"), AP50=0.6)
    text = write_table(request, request.tables[0], plan, Images(4, 3), None, {})
    assert text.startswith("# The parts of Libra R-CNN")
    assert "\nMeasured on val2017, in percent: mean +- sample standard deviation of seeds 0, 1.\n" in text
    assert cells_of(text, "all three parts") == [
        ["all three parts (`libra`)", "2", "32.5 +- 0.7", "60.0 +- 0.0", *["-"] * 4],
        ["all three parts", "`plain`", "2", "+2.0", "+0.0", *["-"] * 4],
    ]
    assert "published" not in text.lower()
    assert "paper" not in text


def test_options_that_change_no_result_are_no_other_settings(tmp_path):
    request = replace(request_of(tmp_path), options=("--accumulation-steps", "4", "-j", "0"))
    (tmp_path / "out").mkdir()
    text = write_table(request, request.tables[0], make_plan(request), COCO, None, {})
    assert "- Trained with --accumulation-steps 4 -j 0.\n" in text
    assert "- A step has 8 images, not 16 as in the paper.\n" in text


def test_a_table_names_its_proposals(written):
    content, _ = written({})
    assert any("share those of the RPN trained here" in note for note in content["notes"])
    content, _ = written({}, proposals=Path("of/others.npy"))
    assert any("share those of of/others.npy" in note for note in content["notes"])


def test_notes_of_recipes_name_their_rows(tmp_path):
    request = request_of(tmp_path, 1)
    (tmp_path / "out").mkdir()
    text = write_table(request, request.tables[0], make_plan(request), COCO, None, {})
    assert re.search(r"^- faster_rcnn_x101_1x, libra_rcnn_x101_1x: .*X-101", text, re.MULTILINE)
    assert "test-dev" in text
    bare = replace(request, options=(), processes=8)
    assert "A step has" not in write_table(bare, bare.tables[0], make_plan(bare), COCO, None, {})
    assert "Trained with" not in write_table(bare, bare.tables[0], make_plan(bare), COCO, None, {})


def test_a_number_that_is_none_gets_no_place(written):
    content, _ = written({"baseline": {0: math.nan}}, seeds=(0,))
    assert rows_of(content)["baseline"]["runs"]["0"]["values"]["AP"] is None
