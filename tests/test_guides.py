"""The guides: their Python runs, block by block, their commands are understood, and their versions are those tested."""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import nn

from balanced_learning.detection.roi_heads import LibraRoIHeads
from balanced_learning.training.data.coco import read_split
from balanced_learning.training.flags import make_parser
from tests.training.coco_data import coco_root

__all__ = ["coco_root"]

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"
PAGES = [*sorted(GUIDES.glob("*.md")), ROOT / "docs" / "faq.md", ROOT / "docs" / "versions.md"]
BLOCK = re.compile(r"(?:<!-- (not run): .+? -->\n)?```python\n(.*?)```", re.DOTALL)


def blocks(page: Path) -> list[tuple[bool, str]]:
    """Of each block, whether it can be run here, and its code behind so many empty lines that its line numbers fit."""
    text = page.read_text()
    matches = BLOCK.finditer(text)
    return [(match[1] is None, "\n" * text.count("\n", 0, match.start(2)) + match[2]) for match in matches]


def run(name: str, *, marked: bool = False) -> dict:
    """Runs the blocks of a guide one after the other, those marked as not run only on demand; returns their names."""
    page = GUIDES / name
    names: dict = {"__name__": page.stem}
    for is_run, code in blocks(page):
        if is_run or marked:
            exec(compile(code, str(page), "exec"), names)  # noqa: S102
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_all_python_compiles(page):
    for _, code in blocks(page):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_training_program_are_understood(page):
    for command in re.findall(
        r"(?:train_torchvision_libra\.py|train\.sbatch) (.*)", page.read_text().replace("\\\n", " ")
    ):
        make_parser().parse_args([word for word in shlex.split(command) if not word.startswith("${")])


def test_custom_backbone():
    pytest.importorskip("timm", reason="the guide needs timm")
    names = run("custom_backbone.md")
    assert names["losses"]["loss_box_reg"].isfinite()
    assert type(names["model"].roi_heads) is LibraRoIHeads


def test_lightning(tmp_path, coco_root, monkeypatch):
    pytest.importorskip("lightning", reason="the guide needs lightning")
    monkeypatch.chdir(tmp_path)
    coco_root.rename("my-data")
    trainer = run("lightning.md")["trainer"]
    assert trainer.global_step == 1  # two images in batches of two
    assert 0 <= trainer.callback_metrics["AP"] <= 1


def test_mmdetection():
    names = run("mmdetection.md")
    model = names["model"]
    assert model.roi_heads.fg_bg_sampler.num_bins == 3
    labels = torch.cat([torch.ones(10), torch.zeros(900), -torch.ones(5)]).long()
    (positive,), (negative,) = model.rpn.fg_bg_sampler([labels], [torch.zeros(915)], [torch.zeros_like(labels)])
    assert (positive.sum(), negative.sum()) == (10, 50)
    assert not (positive & (labels != 1)).any()
    assert not (negative & (labels != 0)).any()


class StandardROIHeads(nn.Module):
    """The settings and the order of calls that the guide uses of detectron2's class of this name."""

    def __init__(self):
        super().__init__()
        self.num_classes, self.batch_size_per_image, self.positive_fraction = 80, 8, 0.25
        self.proposal_matcher = lambda ious: (
            ious.argmax(dim=0) if len(ious) else torch.zeros(ious.shape[1], dtype=torch.int64),
            (ious >= 0.5).any(dim=0).to(torch.int8),
        )

    def label_and_sample(self, ious, gt_classes):
        return self._sample_proposals(*self.proposal_matcher(ious), gt_classes)


def test_detectron2(monkeypatch):
    modeling = ModuleType("detectron2.modeling")
    modeling.StandardROIHeads = StandardROIHeads
    modeling.ROI_HEADS_REGISTRY = type("Registry", (), {"register": lambda: lambda cls: cls})
    monkeypatch.setitem(sys.modules, "detectron2", ModuleType("detectron2"))
    monkeypatch.setitem(sys.modules, "detectron2.modeling", modeling)
    heads = run("detectron2.md", marked=True)["LibraROIHeads"]()

    easy, hard, positive = [0.0] * 500, [0.2, 0.2, 0.4, 0.4], [0.7]
    ious = torch.tensor([easy + hard + [0.0], easy + [0.0] * 4 + positive])
    drawn, classes = heads.label_and_sample(ious, torch.tensor([0, 5]))
    assert drawn[0] == 504  # the only positive
    assert {500, 501, 502, 503} <= set(drawn.tolist())  # two of each bin above the first
    assert classes.tolist() == [5] + 7 * [80]

    drawn, classes = heads.label_and_sample(torch.zeros(0, 20), torch.zeros(0, dtype=torch.int64))
    assert len(drawn.unique()) == 8
    assert classes.tolist() == 8 * [80]


def test_own_data_needs_no_more_than_its_example(tmp_path):
    content = re.search(r"```json\n(.*?)```", (GUIDES / "own_data.md").read_text(), re.DOTALL)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text(content[1])
    (tmp_path / "train2017").mkdir()
    Image.new("RGB", (640, 480)).save(tmp_path / "train2017" / "0001.jpg")
    split = read_split(tmp_path, "train2017")
    assert [box["bbox"] for box in split.boxes(split.images[0])] == [[10, 20, 100, 50]]


VOC_OBJECT = (
    """<object><name>{}</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>60</ymax></bndbox></object>"""
)


def test_own_data_from_other_formats(tmp_path, monkeypatch):
    pytest.importorskip("supervision", reason="the guide needs supervision")
    monkeypatch.chdir(tmp_path)
    for folder in ("yolo/train/images", "yolo/valid/images", "voc/JPEGImages"):
        Path(folder).mkdir(parents=True)
    for folder in ("yolo/train", "yolo/valid"):
        Image.new("RGB", (100, 80)).save(f"{folder}/images/a.png")
        Path(folder, "labels").mkdir()
        Path(folder, "labels", "a.txt").write_text("1 0.3 0.5 0.4 0.5\n")
    Path("yolo/data.yaml").write_text("names: [cat, dog]\n")
    Path("voc/Annotations").mkdir()
    for i, name in enumerate(["cat", "dog", "cat", "dog", "cat"]):
        Image.new("RGB", (100, 80)).save(f"voc/JPEGImages/{i}.png")
        Path(f"voc/Annotations/{i}.xml").write_text(f"<annotation>{VOC_OBJECT.format(name)}</annotation>")

    wanted = {0: ([1], [10, 20, 40, 40]), 1: ([4, 1], [10, 20, 40, 40])}
    for number, (_, code) in enumerate(blocks(GUIDES / "own_data.md")):
        exec(compile(code, "own_data.md", "exec"), {})  # noqa: S102
        splits = [read_split(Path("my-data"), name) for name in ("train2017", "val2017")]
        sizes, box = wanted[number]
        assert [len(split.images) for split in splits] == (sizes if len(sizes) == 2 else sizes * 2)
        assert splits[0].categories == splits[1].categories == {1: "cat", 2: "dog"}
        boxes = [annotation["bbox"] for split in splits for image in split.images for annotation in split.boxes(image)]
        assert boxes == [pytest.approx(box)] * sum(len(split.images) for split in splits)
        for path in Path("my-data").rglob("*.*"):
            path.unlink()


def test_versions_are_those_required_and_tested():
    page = (ROOT / "docs" / "versions.md").read_text()
    project, ci = (ROOT / "pyproject.toml").read_text(), (ROOT / ".ci" / "run").read_text()
    table = page.partition("\n\n| ")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| (\w+).*? \| (.*) \|$", table, re.MULTILINE))
    oldest = {name: re.search(rf'"{name}==(\d+\.\d+)\.\*"', ci)[1] for name in ("torch", "torchvision")}
    core = re.search(r'"torch==(\d+\.\d+\.\d+)"', ci)[1]
    assert rows["Python"].startswith(re.search(r'requires-python = ">=(.*)"', project)[1] + " or later")
    for name, version in oldest.items():
        assert f'"{name}>={version}"' in project
        assert rows[name].startswith(f"{version} or later")
        assert version in rows[name].split("|")[1]
    assert core in rows["torch"]
    assert f"| {oldest['torchvision']} | {oldest['torch']} |" in page
