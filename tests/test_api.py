import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import balanced_learning


def test_public_names() -> None:
    assert balanced_learning.__all__ == [
        "BalancedFeaturePyramid",
        "BalancedL1Loss",
        "IoUBalancedSampler",
        "PathAggregation",
        "backend_info",
        "balanced_l1_loss",
        "use_kernels",
    ]
    _assert_documented(balanced_learning)


def test_public_names_of_detection() -> None:
    pytest.importorskip("torchvision")
    from balanced_learning import detection

    assert detection.__all__ == [
        "apply_libra",
        "from_mmdet",
        "libra_fasterrcnn",
        "libra_fasterrcnn_resnet50_fpn",
        "libra_retinanet",
        "libra_retinanet_resnet50_fpn",
        "to_mmdet",
    ]
    _assert_documented(detection)


def _assert_documented(module: ModuleType) -> None:
    assert all(getattr(module, name).__doc__ for name in module.__all__)


def test_import_needs_no_torchvision():
    code = "import sys; sys.modules['torchvision'] = None; import balanced_learning"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_detection_and_training_name_torchvision():
    package = Path(balanced_learning.__file__).parent
    naming = [path.relative_to(package) for path in package.rglob("*.py") if "torchvision" in path.read_text()]
    assert naming
    assert {path.parts[0] for path in naming} == {"detection", "training"}


def test_backend_info_is_fit_for_a_bug_report():
    info = balanced_learning.backend_info()
    assert all(isinstance(word, str) and word for item in info.items() for word in item)
    assert info["torch"] == torch.__version__
    assert info["python"] == sys.version.split()[0]
    assert {"balanced_learning", "cuda", "gpu", "driver", "files", "kernels"} < info.keys()
