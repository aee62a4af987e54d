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


# Of the five files of configs/libra_rcnn and what they take over: mmdetection 3, then what 1 and 2 called otherwise.
MMDETECTION = """
_base_ model type data_preprocessor mean std bgr_to_rgb pad_size_divisor backbone depth groups base_width num_stages
out_indices frozen_stages norm_cfg requires_grad norm_eval style init_cfg checkpoint neck in_channels out_channels
num_outs start_level add_extra_convs num_levels refine_level refine_type rpn_head feat_channels anchor_generator
scales ratios strides octave_base_scale scales_per_octave bbox_coder target_means target_stds loss_cls use_sigmoid
loss_weight loss_bbox alpha gamma beta roi_head bbox_roi_extractor roi_layer output_size sampling_ratio
featmap_strides bbox_head fc_out_channels roi_feat_size num_classes reg_class_agnostic stacked_convs train_cfg rpn
assigner pos_iou_thr neg_iou_thr min_pos_iou match_low_quality ignore_iof_thr sampler num pos_fraction neg_pos_ub
add_gt_as_proposals pos_sampler neg_sampler floor_thr floor_fraction num_bins allowed_border pos_weight debug
rpn_proposal nms_pre max_per_img nms iou_threshold min_bbox_size rcnn test_cfg score_thr dataset_type data_root
backend_args file_client_args train_pipeline test_pipeline with_bbox scale keep_ratio prob meta_keys num_max_proposals
train_dataloader val_dataloader test_dataloader batch_size num_workers persistent_workers drop_last shuffle
batch_sampler dataset ann_file data_prefix proposal_file filter_cfg filter_empty_gt min_size val_evaluator
test_evaluator metric format_only max_epochs val_interval val_cfg param_scheduler start_factor by_epoch begin end
milestones optim_wrapper optimizer lr momentum weight_decay auto_scale_lr enable base_batch_size default_scope
default_hooks timer logger interval checkpoint sampler_seed visualization env_cfg cudnn_benchmark mp_cfg dist_cfg
backend vis_backends visualizer log_processor log_level load_from resume tta_model tta_pipeline img img_scales
mp_start_method name opencv_num_threads pipeline transforms tta_cfg window_size
pretrained extra_convs_on_inputs anchor_scales anchor_ratios anchor_strides out_size sample_num num_fcs floor
nms_across_levels nms_post max_num nms_thr iou_thr smoothl1_beta img_norm_cfg to_rgb data imgs_per_gpu samples_per_gpu
workers_per_gpu train val test img_prefix img_scale size_divisor flip_ratio with_mask with_crowd with_label test_mode
keys flip evaluation optimizer_config grad_clip max_norm norm_type lr_config policy warmup warmup_iters warmup_ratio
step checkpoint_config log_config hooks runner total_epochs device_ids dist_params work_dir resume_from workflow
"""


def test_mmdetection_has_every_key_of_its_configurations():
    spans = re.findall(r"`([^`\n]+)`", (GUIDES / "mmdetection.md").read_text())
    assert set(MMDETECTION.split()) - set(re.findall(r"\w+", " ".join(spans))) == set()


def test_mmdetection_names_flags_that_there_are():
    named = set(re.findall(r"--[a-z][a-z0-9-]*", (GUIDES / "mmdetection.md").read_text()))
    known = {flag for action in make_parser()._actions for flag in action.option_strings}
    assert named - known == set()


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
