"""Tests of the program that makes checkpoints of mmdetection's."""

import re

import pytest
import torch
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet

from balanced_learning.detection import from_mmdet, to_mmdet
from balanced_learning.detection.mmdet.layout import Layout
from balanced_learning.training import load_detector
from examples.convert_mmdet_checkpoint import main


class MessageHub:
    """Stands for what mmengine keeps in its checkpoints."""

    def __init__(self) -> None:
        self.log = {"loss": [1.0]}


def state_of(kind: type, counts_last_pixel: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = to_mmdet(Layout(kind, "resnet18", 81, 256, "non_local", False, "c5", counts_last_pixel).build())
    if counts_last_pixel and kind is FasterRCNN:
        state["roi_head.bbox_head.fc_reg.weight"] = 0.01 * torch.randn(324, 1024)
        state["roi_head.bbox_head.fc_reg.bias"] = torch.zeros(324)
    if kind is RetinaNet:  # or all scores would be alike
        state["bbox_head.retina_cls.weight"] *= 50
    return state


@pytest.mark.parametrize("version", ["3.3.0", "1.0.0"])
@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet])
def test_a_converted_checkpoint_detects_what_the_weights_do(kind, version, tmp_path, capsys):
    content = {"state_dict": state_of(kind, version < "2"), "meta": {"mmdet_version": version}}
    torch.save(content | {"optimizer": {}, "message_hub": MessageHub()}, tmp_path / "in.pth")
    main([str(tmp_path / "in.pth"), str(tmp_path / "out.pth")])
    printed = capsys.readouterr().out
    assert f"of a Libra {kind.__name__} with resnet18, 80 classes; leaves out: optimizer, message_hub" in printed

    converted, expected = load_detector(tmp_path / "out.pth"), from_mmdet(content)
    assert converted.categories == expected.categories
    assert converted.state_dict().keys() == expected.state_dict().keys()
    image = torch.rand(3, 256, 320)  # of which no side is rounded
    for detector in (converted, expected):
        detector.transform.min_size = (256,)
        holder = detector if kind is RetinaNet else detector.roi_heads
        holder.score_thresh = 0.0
    with torch.no_grad():
        (ours,), (theirs,) = converted([image]), expected([image])
    assert len(ours["boxes"]) == 100
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no checkpoint", "not a checkpoint"),
        ({"a": 1}, "state_dict must be a dict of tensors, got int as 'a'"),
        ({"query_embed.weight": torch.zeros(3)}, "got 'query_embed.weight'"),
        (None, "No such file"),
    ],
)
def test_other_files_are_refused_by_their_first_odd_entry(content, message, tmp_path, monkeypatch):
    source, target = tmp_path / "in.pth", tmp_path / "out.pth"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    with pytest.raises(SystemExit, match=f"error: {re.escape(str(source))}: .*{re.escape(message)}"):
        main([str(source), str(target)])
    assert not target.exists()


def test_a_mask_rcnn_is_sent_to_the_function(tmp_path):
    torch.save(state_of(MaskRCNN, False), tmp_path / "in.pth")
    with pytest.raises(SystemExit, match=r"has no Mask R-CNN: use balanced_learning\.detection\.from_mmdet"):
        main([str(tmp_path / "in.pth"), str(tmp_path / "out.pth")])


def test_no_code_of_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"state_dict": state_of(FasterRCNN, False), "hub": Evil()}, tmp_path / "in.pth")
    main([str(tmp_path / "in.pth"), str(tmp_path / "out.pth")])
    assert not (tmp_path / "ran").exists()
