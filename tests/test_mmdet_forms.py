"""The drop-in forms of mmdetection's three files, alone and in stand-ins for its registries."""

import copy
import importlib
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import balanced_learning
from balanced_learning import BalancedFeaturePyramid, mmdet
from balanced_learning.mmdet import BFP, BalancedL1Loss, InstanceBalancedPosSampler, IoUBalancedNegSampler
from tests.reference.mmdet import explicit_pyramid


def scalar_loss(pred, target, weight, alpha, gamma, beta):
    """Equation 8 and a factor, number by number; elsewhere than at beta = 1 by the paper's gradient, integrated."""
    b = math.exp(gamma / alpha) - 1
    rows = []
    for p, t, w in zip(pred.flatten().tolist(), target.flatten().tolist(), weight.flatten().tolist(), strict=True):
        u = abs(p - t) / beta
        inlier = alpha / b * (b * u + 1) * math.log(b * u + 1) - alpha * u
        rows.append(w * beta * (inlier if u < 1 else gamma * u + gamma / b - alpha))
    return rows


@pytest.mark.parametrize("shape", [(7, 4), (7, 5), (7,), (2, 3, 8)])
@pytest.mark.parametrize("beta", [1.0, 0.11])
@pytest.mark.parametrize("kind", ["none", "elements", "boxes"])
def test_loss_is_the_scalar_one(shape, beta, kind):
    pred, target = (3 * torch.rand(2, *shape, dtype=torch.float64)).unbind()
    weights = {"none": None, "elements": torch.rand(shape), "boxes": torch.rand(shape[:-1] or shape)}[kind]
    factors = torch.ones(()) if weights is None else weights
    factors = factors if factors.shape == shape or weights is None else factors[..., None]
    settings = {"alpha": 0.4, "gamma": 1.2, "beta": beta}
    wanted = scalar_loss(pred, target, factors.double().expand(shape), **settings)

    def value(reduction, **arguments):
        """Of a loss that reduces otherwise unless a call says so."""
        loss = BalancedL1Loss(**settings, reduction=reduction, loss_weight=2.5)
        return loss(pred, target, weights, **arguments).flatten().tolist()

    total = 2.5 * sum(wanted)
    assert value("none") == pytest.approx([2.5 * each for each in wanted])
    assert value("none", avg_factor=3) == value("none")
    assert value("mean") == pytest.approx([total / len(wanted)])
    assert value("sum") == pytest.approx([total])
    assert value("mean", avg_factor=3) == pytest.approx([total / 3])
    assert value("mean", avg_factor=torch.tensor(3.0)) == pytest.approx([total / 3])
    assert value("none", reduction_override="mean") == value("mean")
    assert value("sum", avg_factor=3, reduction_override="mean") == value("mean", avg_factor=3)
    for arguments in ({"reduction": "sum"}, {"reduction": "mean", "reduction_override": "sum"}):
        with pytest.raises(ValueError, match="avg_factor must be None where reduction is 'sum', got 3"):
            value(**arguments, avg_factor=3)


def test_a_weight_of_four_boxes_is_one_a_box():
    pred, target, weight = torch.zeros(4, 4), torch.ones(4, 4), torch.tensor([1.0, 0.0, 0.0, 0.0])
    loss = BalancedL1Loss(reduction="none")(pred, target, weight)
    assert loss.count_nonzero(dim=1).tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize("arguments", [{}, {"avg_factor": 0}, {"avg_factor": 0.0, "weight": torch.zeros(0, 4)}])
def test_no_boxes_give_a_zero_with_a_graph(arguments):
    pred = torch.zeros(0, 4, requires_grad=True)
    loss = BalancedL1Loss()(pred, torch.zeros(0, 4), **arguments)
    loss.backward()
    assert loss == 0
    assert pred.grad.shape == (0, 4)


def test_loss_refuses_by_name():
    with pytest.raises(ValueError, match=r"target must have the shape of pred, \[3, 4\], got \[4\]"):
        BalancedL1Loss()(torch.zeros(3, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'max'"):
        BalancedL1Loss()(torch.zeros(3, 4), torch.zeros(3, 4), reduction_override="max")
    with pytest.raises(ValueError, match="alpha"):
        BalancedL1Loss(alpha=0)


def randomized(neck):
    for parameter in neck.parameters():
        nn.init.normal_(parameter, std=0.2)
    return neck


def maps(sides=(24, 12, 6, 3, 2)):
    return tuple(torch.randn(2, 8, side, side + 1) for side in sides)


@pytest.mark.parametrize("refine_type", [None, "conv", "non_local"])
@pytest.mark.parametrize("refine_level", [0, 2, 4])
def test_pyramid_is_mmdetections(refine_type, refine_level):
    neck, inputs = randomized(BFP(8, 5, refine_level, refine_type)), maps()
    outputs = neck(inputs)
    assert type(outputs) is type(neck(list(inputs))) is tuple
    for output, wanted in zip(outputs, explicit_pyramid(neck, list(inputs)), strict=True):
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)


CONVS = {"theta.conv": "theta", "phi.conv": "phi", "g.conv": "g", "conv_out.conv": "out"}  # in mmdetection and here
KEYS = {
    None: set(),
    "conv": {"refine.conv.weight", "refine.conv.bias"},
    "non_local": {f"refine.{conv}.{kind}" for conv in CONVS for kind in ("weight", "bias")},
}


@pytest.mark.parametrize("refine_type", KEYS)
def test_keys_are_mmdetections_and_those_of_the_balanced_pyramid_load(refine_type):
    trained, inputs = randomized(BFP(8, 5, 1, refine_type)), maps()
    state, plain = trained.state_dict(), BalancedFeaturePyramid(8, refine_level=1, refine=refine_type)
    assert state.keys() == KEYS[refine_type]
    own = {}
    for key, value in state.items():
        for theirs, ours in CONVS.items():
            key = key.replace(f".{theirs}.", f".{ours}.")
        own[key] = value
    plain.load_state_dict(own)
    for kind in (state, own):
        given = list(kind)
        # in a detector's list of necks, and alone, as an average of weights is begun
        necks, alone = nn.Sequential(nn.Identity(), BFP(8, 5, 1, refine_type)), copy.deepcopy(BFP(8, 5, 1, refine_type))
        necks.load_state_dict({f"1.{key}": value for key, value in kind.items()})
        alone.load_state_dict(kind)
        assert list(kind) == given  # what was given is not changed
        assert necks.state_dict().keys() == {f"1.{key}" for key in KEYS[refine_type]}
        assert alone.state_dict().keys() == KEYS[refine_type]
        for output, *others in zip(trained(inputs), plain(inputs), necks(inputs), alone(inputs), strict=True):
            assert all(torch.equal(output, other) for other in others)


def test_other_keys_are_named():
    state = BFP(8, 5, 2, "non_local").state_dict()
    del state["refine.g.conv.bias"]
    state["refine.g.bn.weight"] = torch.ones(8)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*refine\.g\.bias.*Unexpected.*refine\.g\.bn\.weight"):
        BFP(8, 5, 2, "non_local").load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": [8] * 5}, r"in_channels must be one whole number, for all levels, got \[8, 8"),
        ({"refine_level": 5}, "refine_level must be from 0 to num_levels - 1 = 4, got 5"),
        ({"refine_level": -1}, "refine_level"),
        ({"refine_type": "attention"}, "refine_type must be None, 'conv' or 'non_local', got 'attention'"),
        ({"conv_cfg": {"type": "DCN"}}, "conv_cfg must be None"),
        ({"norm_cfg": {"type": "BN"}}, "norm_cfg must be None, .* got {'type': 'BN'}"),
        ({"init_cfg": {"type": "Normal"}}, "init_cfg must be None"),
    ],
)
def test_pyramid_refuses_by_name(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        BFP(**({"in_channels": 8, "num_levels": 5} | arguments))


def test_pyramid_refuses_other_maps():
    with pytest.raises(ValueError, match="inputs must be a tuple of num_levels=5 maps, got tuple of 4"):
        BFP(8, 5)(maps()[:4])
    with pytest.raises(ValueError, match="num_levels=5 maps, got dict of 5"):
        BFP(8, 5)(dict(enumerate(maps())))


def assigned(**groups):
    """Boxes in random order: of each group as many as said, with its ground truth and IoU. Also the group of each."""
    of_group = {"zero": (0, 0.0), "low": (0, 0.05), "middle": (0, 0.25), "high": (0, 0.45), "ignored": (-1, 0.9)}
    names = [name for name, number in groups.items() for _ in range(number)]
    names = [names[i] for i in torch.randperm(len(names))]
    rows = [of_group[name] if name in of_group else (int(name[1:]), 0.7) for name in names]
    gt_inds, max_overlaps = (torch.tensor(column) for column in zip(*rows, strict=True))
    return SimpleNamespace(gt_inds=gt_inds, max_overlaps=max_overlaps), names


def counts(names, indices):
    assert indices.dtype == torch.int64
    assert len(indices.unique()) == len(indices)
    drawn = [names[i] for i in indices]
    return {name: drawn.count(name) for name in sorted(set(drawn))}


@pytest.mark.parametrize(
    ("settings", "num", "wanted"),
    [
        # bins of a third of 0.45 each; the ground truth's 0.7 does not stretch them
        ({}, 60, {"low": 20, "middle": 20, "high": 20}),
        ({}, 45, {"low": 15, "middle": 15, "high": 15}),
        ({"num_bins": 1}, 110, {"low": 30, "middle": 40, "high": 40}),
        ({}, 500, {"low": 30, "middle": 40, "high": 40}),
        ({}, 0, {}),
        # a floor: 4 of 10 from below, the rest by bins of (0.45 - 0.1) / 2, so that 0.25 is in the first
        ({"floor_thr": 0.1, "floor_fraction": 0.4, "num_bins": 2}, 50, {"low": 20, "middle": 15, "high": 15}),
        ({"floor_thr": 0.1, "floor_fraction": 0.4, "num_bins": 2}, 100, {"low": 30, "middle": None, "high": None}),
        ({"floor_thr": 0.3, "floor_fraction": 0}, 40, {"high": 40}),
        ({"floor_thr": 0.3, "floor_fraction": 0}, 42, {"high": 40, "below": 2}),
    ],
)
def test_negatives_come_as_forced(settings, num, wanted):
    assign_result, names = assigned(low=30, middle=40, high=40, ignored=9, g1=5)
    drawn = counts(names, IoUBalancedNegSampler(512, 0.25, **settings)._sample_neg(assign_result, num))
    assert sum(drawn.values()) == min(num, 110)
    for name, number in wanted.items():
        if name == "below":
            assert drawn["high"] + number == num
        elif number is not None:
            assert drawn[name] == number


@pytest.mark.parametrize(("floor_fraction", "num", "zeros"), [(0, 60, 0), (0, 110, 0), (0, 112, 2), (0.5, 60, 30)])
def test_a_floor_of_zero_keeps_back_boxes_of_iou_zero(floor_fraction, num, zeros):
    assign_result, names = assigned(zero=900, low=30, middle=40, high=40)
    sampler = IoUBalancedNegSampler(512, 0.25, floor_thr=0, floor_fraction=floor_fraction)
    for _ in range(2):
        drawn = counts(names, sampler._sample_neg(assign_result, num))
        assert drawn.get("zero", 0) == zeros
        assert sum(drawn.values()) == num


def test_without_a_floor_every_call_has_boxes_of_iou_zero_in_its_first_bin():
    assign_result, names = assigned(zero=900, middle=40, high=40)
    sampler = IoUBalancedNegSampler(512, 0.25)
    settings = dict(vars(sampler))
    for _ in range(3):
        assert counts(names, sampler._sample_neg(assign_result, 90)) == {"high": 30, "middle": 30, "zero": 30}
    assert vars(sampler) == settings  # mmdetection's first call makes 0 of its floor of -1


def test_images_without_ground_truth():
    nothing = SimpleNamespace(gt_inds=torch.zeros(50, dtype=torch.int64), max_overlaps=torch.zeros(50))
    assert len(IoUBalancedNegSampler(512, 0.25)._sample_neg(nothing, 20).unique()) == 20
    assert InstanceBalancedPosSampler(512, 0.25)._sample_pos(nothing, 20).shape == (0,)


@pytest.mark.parametrize(
    ("groups", "num", "wanted"),
    [
        ({"g1": 50, "g2": 50, "g3": 3}, 33, {"g1": 15, "g2": 15, "g3": 3}),
        ({"g1": 300, "g2": 2}, 128, {"g1": 126, "g2": 2}),  # mmdetection's has 113
        ({"g1": 4, "g2": 2}, 128, {"g1": 4, "g2": 2}),
        ({f"g{i}": 2 for i in range(1, 81)}, 80, {f"g{i}": 1 for i in range(1, 81)}),
        ({"g1": 9}, 0, {}),
    ],
)
def test_positives_come_as_forced(groups, num, wanted):
    assign_result, names = assigned(**groups, low=50, ignored=9)
    sampler = InstanceBalancedPosSampler(512, 0.25, add_gt_as_proposals=True)
    assert counts(names, sampler._sample_pos(assign_result, num, bboxes=None)) == wanted


def test_draws_follow_torchs_seed():
    assign_result, _ = assigned(low=300, g1=300)
    for draw in (IoUBalancedNegSampler(9, 0.5)._sample_neg, InstanceBalancedPosSampler(9, 0.5)._sample_pos):
        first, second = (draw(assign_result, 100) for _ in range(2))
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        first = draw(assign_result, 100)
        torch.manual_seed(3)
        assert torch.equal(first, draw(assign_result, 100))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"floor_thr": -0.5}, "floor_thr"), ({"floor_fraction": 2}, "floor_fraction"), ({"num_bins": 0}, "num_bins")],
)
def test_sampler_refuses_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        IoUBalancedNegSampler(512, 0.25, **settings)


# A registry as mmengine's: a name is taken once, unless forced, and what it holds is imported when first asked for.
STAND_IN = {
    "mmdet/__init__.py": "",
    "mmdet/registry.py": """
class Registry:
    def __init__(self):
        self.modules = {}
    def register_module(self, name=None, force=False, module=None):
        if module is None:
            return lambda module: self.register_module(name, force, module)
        name = name or module.__name__
        if name in self.modules and not force:
            raise KeyError(f"{name} is already registered")
        self.modules[name] = module
        return module
    def build(self, cfg, default_args=None):
        import mmdet.models
        cfg = {**(default_args or {}), **cfg}
        return self.modules[cfg.pop("type")](**cfg)
MODELS, TASK_UTILS = Registry(), Registry()
""",
    "mmdet/models/__init__.py": """
from ..registry import MODELS
from .task_modules import samplers
@MODELS.register_module()
class BFP: pass
@MODELS.register_module()
class BalancedL1Loss: pass
""",
    "mmdet/models/task_modules/__init__.py": "",
    "mmdet/models/task_modules/samplers/__init__.py": """
from mmdet.registry import TASK_UTILS
class BaseSampler:
    def __init__(self, num, pos_fraction, neg_pos_ub=-1, add_gt_as_proposals=True, **kwargs):
        self.num, self.pos_fraction = num, pos_fraction
        self.pos_sampler = self.neg_sampler = self
    def sample(self, assign_result):
        positives = self.pos_sampler._sample_pos(assign_result, int(self.num * self.pos_fraction), bboxes=None).unique()
        missing = self.num - positives.numel()
        return positives, self.neg_sampler._sample_neg(assign_result, missing, bboxes=None).unique()
@TASK_UTILS.register_module()
class RandomSampler(BaseSampler):
    def _sample_pos(self, assign_result, num_expected, **kwargs):
        return (assign_result.gt_inds > 0).nonzero().flatten()[:num_expected]
    def _sample_neg(self, assign_result, num_expected, **kwargs):
        return (assign_result.gt_inds == 0).nonzero().flatten()[:num_expected]
@TASK_UTILS.register_module()
class IoUBalancedNegSampler(RandomSampler): pass
@TASK_UTILS.register_module()
class InstanceBalancedPosSampler(RandomSampler): pass
@TASK_UTILS.register_module()
class CombinedSampler(BaseSampler):
    def __init__(self, pos_sampler, neg_sampler, **kwargs):
        super().__init__(**kwargs)
        self.pos_sampler = TASK_UTILS.build(pos_sampler, default_args=kwargs)
        self.neg_sampler = TASK_UTILS.build(neg_sampler, default_args=kwargs)
""",
}


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """Imports a module where mmdet is the stand-in, with some of its files changed, and forgets it all afterwards."""

    def leave_no_trace():
        for name in [name for name in sys.modules if name.split(".")[0] in ("mmdet", "mmcv")]:
            del sys.modules[name]

    def import_module(name, changes):
        for path, text in (STAND_IN | changes).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(name)

    leave_no_trace()
    monkeypatch.setattr(balanced_learning, "mmdet", mmdet)
    monkeypatch.delitem(sys.modules, "balanced_learning.mmdet")
    yield import_module
    leave_no_trace()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("first", ["mmdet.models", "balanced_learning.mmdet"])
def test_registered_in_mmdetection(beside, first):
    beside(first, {})
    forms = beside("balanced_learning.mmdet", {})
    registry = beside("mmdet.registry", {})
    neck = registry.MODELS.build({"type": "BFP", "in_channels": 8, "num_levels": 5})
    assert type(neck) is forms.BFP is not BFP
    assert len(neck(maps())) == 5
    assert type(registry.MODELS.build({"type": "BalancedL1Loss", "loss_weight": 2.0})) is forms.BalancedL1Loss

    boxes, names = assigned(zero=100, middle=100, high=100, g1=50, g2=5)
    samplers = {
        "pos_sampler": {"type": "InstanceBalancedPosSampler"},
        "neg_sampler": {"type": "IoUBalancedNegSampler", "floor_thr": -1, "floor_fraction": 0, "num_bins": 3},
    }
    common = {"num": 100, "pos_fraction": 0.1, "add_gt_as_proposals": True, "context": None}
    combined = registry.TASK_UTILS.build({"type": "CombinedSampler", **common, **samplers})
    assert type(combined.neg_sampler) is forms.IoUBalancedNegSampler
    positives, negatives = combined.sample(boxes)
    assert counts(names, positives) == {"g1": 5, "g2": 5}
    assert counts(names, negatives) == {"high": 30, "middle": 30, "zero": 30}
    alone = registry.TASK_UTILS.build({"type": "IoUBalancedNegSampler", **common})
    assert counts(names, alone.sample(boxes)[1]) == {"high": 30, "middle": 30, "zero": 30}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mmdet/__init__.py": "assert False, 'MMCV==2.2.0'"}, "AssertionError: MMCV==2.2.0"),
        (
            {"mmdet/models/__init__.py": "import mmcv._ext", "mmcv/__init__.py": ""},
            "ModuleNotFoundError: No module named 'mmcv._ext'",
        ),
        ({"mmdet/registry.py": "raise OSError('libtorch.so: not found')"}, "OSError: libtorch.so: not found"),
    ],
    ids=["version", "extension", "library"],
)
def test_an_mmdet_that_cannot_be_imported_leaves_plain_classes(beside, changes, reason):
    with pytest.warns(UserWarning, match="mmdet cannot be used") as caught:
        forms = beside("balanced_learning.mmdet", changes)
    (warning,) = (str(each.message) for each in caught)
    assert warning == f"mmdet cannot be used, so these are not registered: {forms.__all__} ({reason})"
    assert forms.IoUBalancedNegSampler.__base__.__module__ == "balanced_learning.mmdet"


def test_a_copied_file_in_mmdet_that_takes_its_form_from_here(beside):
    """Nothing is registered then, so that the files of mmdetection that come later find their names free."""
    models = STAND_IN["mmdet/models/__init__.py"]
    with pytest.warns(UserWarning, match=r"\(ImportError: it is importing balanced_learning.mmdet itself"):
        beside("mmdet.models", {"mmdet/models/__init__.py": f"import balanced_learning.mmdet{models}"})
    assert beside("balanced_learning.mmdet", {}).BFP(8, 5) is not None


def test_nothing_else_imports_it():
    code = (
        "import sys, balanced_learning\n"
        "assert not {name for name in sys.modules if 'mmdet' in name}\n"
        "sys.modules['torchvision'] = None\n"
        "import warnings; warnings.simplefilter('error')\n"
        "import balanced_learning.mmdet"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
