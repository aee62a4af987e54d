"""The study's results, gathered from folders, and the documentation that is made of them."""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from balanced_learning.training.errors import UserError

ROOT = Path(__file__).parents[2]
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
LABELS = {"plain": "plain", "balanced_l1": "+ balanced L1", "libra": "Libra", "l1": "L1"}


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("study")


@pytest.fixture
def tables(study, monkeypatch):
    """The same without pictures, which take most of the time."""
    monkeypatch.setattr(study, "draw", lambda results, docs: None)
    return study


@pytest.fixture
def root(tmp_path) -> Path:
    """A copy of the page, and others with a marker."""
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "docs" / "study.md").write_text((ROOT / "docs" / "study.md").read_text())
    for name in ("README.md", "docs/does_it_help.md"):
        (tmp_path / name).write_text("# Title\n\n<!-- study -->\nold\n\n<!-- end of study -->\n\nText.\n")
    return tmp_path


def make_folder(folder: Path, ap: dict[str, dict[int, float | None]], **settings: Any) -> Path:
    """An output folder with the AP of rows by seed, as fractions; None: the run is not over. APs is not defined."""
    settings = {"weights_backbone": "/home/me/weights.pth", "min_size": 224, "max_size": 320} | settings
    settings = {"lr": 0.0005, "fpn_channels": 64, "anchor_size": 8, "box_batch_size_per_image": 64} | settings
    settings |= {"opt": "adamw", "lr_scheduler": "cosineannealinglr", "weight_decay": 0.01, "backbone": "mobilenet_v2"}
    settings |= {"epochs": 3, "batch_size": 4, "accumulation_steps": 1, "world_size": 1, "patience": None}
    settings |= {"device": "cpu", "versions": {"torch": "2.14.1", "files": "/home/me/_cpu.so"}}
    rows = []
    for name, by_seed in ap.items():
        rows += [{"name": name, "label": LABELS.get(name, name), "recipe": f"study/{name}"}]
        rows[-1]["baseline"] = None if name == "plain" else "plain"
        for seed, value in by_seed.items():
            run = folder / "runs" / "study" / name / f"seed_{seed}"
            run.mkdir(parents=True)
            metrics = dict.fromkeys(("AP", "AP50", "AP75", "APm", "APl"), value) | {"APs": None}
            metrics |= {f"dAP50/{kind}": 0.02 for kind in KINDS} | {"AP/RBC": 0.9}
            lines = [{"epoch": 0, "loss": 2.0}, {"epoch": 1, **metrics, "AP": (value or 0.3) / 2}]
            lines += [{"epoch": 2, **metrics}] if value else []
            (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            (run / "args.json").write_text(json.dumps(settings))
    table = {"data": "/home/me/data/bccd", "images": {"train": 292, "val": 72}, "rows": rows, "commit": "abc"}
    table |= {"options": ["--weights-backbone", "/home/me/weights.pth"]}
    (folder / "table_study.json").write_text(json.dumps(table))
    return folder


def test_the_documentation_is_what_the_results_say(study):
    """README and page, and the pictures that they show; before there are results, the page says so."""
    results = study.read_results(study.RESULTS / study.FILE)
    parts = {**study.blocks(results), "study": study.table(results)}
    page = (ROOT / "docs/study.md").read_text()
    for name in study.blocks(results):
        assert f"<!-- {name} -->\n{parts[name]}\n\n<!-- end of {name} -->" in page
    for text in ((ROOT / name).read_text() for name in ("README.md", "docs/does_it_help.md")):
        assert f"<!-- study -->\n{parts['study']}\n\n<!-- end of study -->" in text
    pictures = {path.name for path in (ROOT / "docs" / "images").glob("study_*")}
    assert pictures == set(re.findall(r"\]\(images/([^)]+)\)", page))


def test_unfinished_runs_are_left_out_and_undefined_metrics_stay_so(study, root):
    folder = make_folder(root / "bccd_scratch", {"plain": {0: 0.4, 1: None, 10: 0.5}, "libra": {10: 0.5625}, "l1": {}})
    study.update([folder], root / "study.json", root)
    text = (root / "study.json").read_text()
    assert "/home/me" not in text
    situation = json.loads(text)["bccd_scratch"]
    assert situation["data"] == "bccd"
    assert situation["options"] == ["--weights-backbone", "weights.pth"]
    assert situation["settings"]["weights_backbone"] == "weights.pth"
    assert {name: list(row["seeds"]) for name, row in situation["rows"].items()} == {
        "plain": ["0", "10"],
        "libra": ["10"],
    }
    run = situation["rows"]["libra"]["seeds"]["10"]
    assert (run["AP"], run["APs"], run["dAP50/missed"]) == (56.25, None, 2.0)
    assert run["curve"] == [[2, 28.125], [3, 56.25]]
    command = "--rows plain libra --seeds 0 10 --data-path bccd --output-dir runs/bccd_scratch -- --weights-backbone"
    assert f"reproduce.py --table study {command} weights.pth\n" in (root / "docs" / "study.md").read_text()
    (line,) = (line for line in text.splitlines() if "28.125" in line)  # a run is a line
    assert json.loads("{" + line.strip().rstrip(",") + "}") == {"10": run}


def test_one_pair_has_no_interval(tables, root):
    folder = make_folder(root / "bccd_scratch", {"plain": {0: 0.4, 2: 0.5}, "libra": {2: 0.5625}})
    tables.update([folder], root / "study.json", root)
    page, readme = ((root / name).read_text() for name in ("docs/study.md", "README.md"))
    assert (root / "docs/does_it_help.md").read_text() == readme
    assert cells(page, "Libra", "`plain`")[2:6] == ["1 seed", "+6.2", "+6.2", "+6.2"]
    assert cells(page, "plain (`plain`)")[1:5] == ["2 seeds", "45.0 ± 7.1", "45.0 ± 7.1", "45.0 ± 7.1"]
    assert cells(readme, "BCCD, from scratch")[:3] == ["BCCD, from scratch", "1", "45.0 ± 7.1"]
    assert readme.startswith("# Title\n\n<!-- study -->\n| data")
    assert readme.endswith("|\n\n<!-- end of study -->\n\nText.\n")


def test_differences_are_paired_with_the_interval_of_students_t(tables, root):
    """Of +2, +3 and +4 points: 3 ± 4.3027 * 1 / sqrt(3) = 3 ± 2.4842. Without the pairs it would be far wider."""
    plain = {0: 0.30, 1: 0.40, 2: 0.50}
    rows = {"plain": plain, "balanced_l1": {0: 0.34, 1: 0.42, 2: 0.53}, "l1": {0: 0.33, 1: 0.39, 2: 0.49}}
    tables.update([make_folder(root / "deeppcb_finetuned", rows)], root / "study.json", root)
    page = (root / "docs" / "study.md").read_text()
    assert cells(page, "+ balanced L1", "`plain`")[2:4] == ["3 seeds", "**+3.0 [+0.5, +5.5]**"]
    # -1, -1 and +3: 1/3 ± 4.3027 * 2.3094 / sqrt(3)
    assert cells(page, "L1", "`plain`")[3] == "+0.3 [-5.4, +6.1]"
    # against L1: 1, 3 and 4: 8/3 ± 4.3027 * 1.5275 / sqrt(3)
    assert cells(page, "DeepPCB, fine-tuned", "L1")[3] == "+2.7 [-1.1, +6.5]"
    assert cells(page, "+ balanced L1", "`plain`")[6] == "-"  # APs
    assert cells(page, "+ balanced L1 (`balanced_l1`)")[2] == "43.0 ± 9.5"
    assert cells((root / "README.md").read_text(), "DeepPCB, fine-tuned")[-2:] == ["**+3.0 [+0.5, +5.5]**", "-"]


def test_what_one_seed_decides(tables, root):
    """Of +4, +2 and +3 points; and all three parts against the paper's baseline, 4 points lower than the plain one."""
    rows = {"plain": {0: 0.30, 1: 0.40, 2: 0.50}, "libra": {0: 0.34, 1: 0.42, 2: 0.53}}
    rows["plain_beta_1"] = {seed: ap - 0.04 for seed, ap in rows["plain"].items()}
    tables.update([make_folder(root / "deeppcb_finetuned", rows)], root / "study.json", root)
    page = (root / "docs" / "study.md").read_text()
    assert cells(page, "Libra", "`plain`")[-1] == "+2.5 to +3.5"
    assert cells((root / "README.md").read_text(), "DeepPCB, fine-tuned")[-1] == "**+7.0 [+4.5, +9.5]**"


def test_a_mean_without_one_seed_is_bold_where_its_interval_excludes_zero(tables, root):
    """Of +1, +1.1, +0.9 and +6 points: without the last, 1 ± 4.3027 * 0.1 / sqrt(3); without another, ± 7.2."""
    rows = {"plain": dict.fromkeys(range(4), 0.30), "libra": {0: 0.31, 1: 0.311, 2: 0.309, 3: 0.36}}
    tables.update([make_folder(root / "deeppcb_finetuned", rows)], root / "study.json", root)
    assert cells((root / "docs" / "study.md").read_text(), "Libra", "`plain`")[-1] == "**+1.0** to +2.7"


def test_ap_is_that_of_the_very_share_of_the_epochs(tables, root):
    """Of three epochs, of which the last two were evaluated."""
    tables.update([make_folder(root / "deeppcb_finetuned", {"plain": {0: 0.4}})], root / "study.json", root)
    line = cells((root / "docs" / "study.md").read_text(), "DeepPCB, fine-tuned", "plain")
    assert line[2:] == ["-", "-", "-", "20.0", "-", "40.0"]


def test_a_metric_of_few_boxes_is_none(tables, root):
    """Of 29 boxes of middle size, and 30 that are just large; crowds do not count."""
    folder = make_folder(root / "bccd_scratch", {"plain": {0: 0.4}, "libra": {0: 0.5}})
    write_boxes(root / "bccd", areas=[40.0**2] * 29 + [96.0**2] * 30, crowds=5)
    table = json.loads((folder / "table_study.json").read_text()) | {"data": f"{root / 'bccd'}"}
    (folder / "table_study.json").write_text(json.dumps(table))
    tables.update([folder], root / "study.json", root)
    boxes = json.loads((root / "study.json").read_text())["bccd_scratch"]["boxes"]
    assert boxes == {"small": 0, "medium": 29, "large": 30}
    page = (root / "docs" / "study.md").read_text()
    assert cells(page, "plain (`plain`)")[4:] == ["40.0", "-", "-", "40.0"]
    assert cells(page, "Libra", "`plain`")[3:] == ["+10.0", "+10.0", "+10.0", "-", "-", "+10.0", "-"]
    make_folder(root / "other" / "bccd_scratch", {"plain": {1: 0.4}})
    tables.update([root / "other" / "bccd_scratch"], root / "study.json", root)  # made where the data are no longer
    assert json.loads((root / "study.json").read_text())["bccd_scratch"]["boxes"] == boxes


def write_boxes(data: Path, areas: list[float], crowds: int) -> None:
    """COCO's JSON of one image with boxes of these areas, and crowds of middle size."""
    boxes = [{"area": area, "iscrowd": 0} for area in areas] + [{"area": 40.0**2, "iscrowd": 1}] * crowds
    common = {"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 40.0, 40.0]}
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 640, "height": 480}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [{"id": number, **common, **box} for number, box in enumerate(boxes)],
    }
    (data / "annotations").mkdir(parents=True)
    (data / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


def test_a_later_call_replaces_its_situations_alone(study, root):
    file = root / "study.json"
    first = make_folder(root / "one" / "bccd_scratch", {"plain": {0: 0.4}})
    other = make_folder(root / "one" / "a_third_one", {"plain": {0: 0.2}})
    study.update([first, other], file, root)
    study.update([make_folder(root / "two" / "bccd_scratch", {"plain": {0: 0.5}, "libra": {0: 0.6}})], file, root)
    results = json.loads(file.read_text())
    assert list(results) == ["a_third_one", "bccd_scratch"]
    assert results["a_third_one"]["rows"]["plain"]["seeds"]["0"]["AP"] == 20.0
    assert results["bccd_scratch"]["rows"]["plain"]["seeds"]["0"]["AP"] == 50.0
    page = (root / "docs" / "study.md").read_text()
    assert "### a third one\n" in page
    assert {path.name for path in (root / "docs" / "images").iterdir()} == {"study_curves.svg", "study_differences.svg"}
    study.update([], file, root)  # nothing new: nothing changes
    assert (root / "docs" / "study.md").read_text() == page


def test_later_runs_join_those_of_the_same_settings(tables, root):
    file = root / "study.json"
    first = {"plain": {0: 0.4, 10: 0.3}, "l1": {0: 0.4}}
    tables.update([make_folder(root / "one" / "bccd_scratch", first)], file, root)
    later = {"plain": {1: 0.5, 10: 0.2}, "libra": {1: 0.6}}
    tables.update([make_folder(root / "two" / "bccd_scratch", later)], file, root)
    rows = json.loads(file.read_text())["bccd_scratch"]["rows"]
    found = {name: {seed: run["AP"] for seed, run in row["seeds"].items()} for name, row in rows.items()}
    assert found == {"plain": {"0": 40.0, "1": 50.0, "10": 20.0}, "l1": {"0": 40.0}, "libra": {"1": 60.0}}
    assert list(found["plain"]) == ["0", "1", "10"]
    tables.update([make_folder(root / "three" / "bccd_scratch", {"plain": {2: 0.5}}, lr=0.1)], file, root)
    assert list(json.loads(file.read_text())["bccd_scratch"]["rows"]["plain"]["seeds"]) == ["2"]


def test_a_folder_without_a_table_is_named(tables, root):
    with pytest.raises(UserError, match=r"nowhere: holds no table_study\.json"):
        tables.update([root / "nowhere"], root / "study.json", root)
    assert not (root / "study.json").exists()


def test_a_run_of_other_settings_is_not_compared(tables, root):
    folder = make_folder(root / "bccd_scratch", {"plain": {0: 0.4, 1: 0.5}})
    file = folder / "runs" / "study" / "plain" / "seed_1" / "args.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"epochs": 2}))
    with pytest.raises(UserError, match=r"seed_1: was made with --epochs 2, and .*seed_0 with --epochs 3"):
        tables.update([folder], root / "study.json", root)


def cells(text: str, *first: str) -> list[str]:
    """The cells of the first row of a table that begins with these."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return next(row for row in rows if row[: len(first)] == list(first))
