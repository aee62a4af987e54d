"""mmdetection's backbones and necks as functions of their state dict: ResNet, ResNeXt, FPN, PAFPN and BFP."""

from collections.abc import Mapping
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from balanced_learning import BalancedFeaturePyramid
from tests.reference.mmdet import explicit_pyramid, path_aggregation

State = Mapping[str, Tensor]


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """The convolution of this name, padded so that stride 1 keeps the size."""
    weight = state[f"{name}.weight"]
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[-1] // 2, groups=groups)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """Batch norm with the statistics that training left."""
    mean, var, weight, bias = (
        state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def backbone(state: State, x: Tensor) -> list[Tensor]:
    """C2 to C5 of a ResNet or ResNeXt; the stride of a bottleneck is in its 3 x 3 convolution."""
    x = F.max_pool2d(norm(state, "backbone.bn1", conv(state, "backbone.conv1", x, 2)).relu(), 3, 2, 1)
    maps = []
    for stage in range(1, 5):
        for block in count():
            key = f"backbone.layer{stage}.{block}"
            if f"{key}.conv1.weight" not in state:
                break
            x = _residual_block(state, key, x, 2 if stage > 1 and block == 0 else 1)
        maps.append(x)
    return maps


def _residual_block(state: State, key: str, x: Tensor, stride: int) -> Tensor:
    bottleneck = f"{key}.conv3.weight" in state
    strides = (1, stride, 1) if bottleneck else (stride, 1)
    y = x
    for i, step in enumerate(strides, start=1):
        y = norm(state, f"{key}.bn{i}", conv(state, f"{key}.conv{i}", y, step))
        if i < len(strides):
            y = y.relu()
    if f"{key}.downsample.0.weight" in state:
        x = norm(state, f"{key}.downsample.1", conv(state, f"{key}.downsample.0", x, stride))
    return (x + y).relu()


def pyramid(state: State, maps: list[Tensor]) -> list[Tensor]:
    """Five levels of the neck before it balances them: of FPN or PAFPN, from C2 on or, with extra convolutions, C3."""
    neck = "neck.0" if "neck.0.lateral_convs.0.conv.weight" in state else "neck"
    used = next(i for i in count() if f"{neck}.lateral_convs.{i}.conv.weight" not in state)
    laterals = [conv(state, f"{neck}.lateral_convs.{i}.conv", x) for i, x in enumerate(maps[-used:])]
    for i in range(used - 1, 0, -1):
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], laterals[i - 1].shape[2:], mode="nearest")
    outputs = [conv(state, f"{neck}.fpn_convs.{i}.conv", x) for i, x in enumerate(laterals)]
    if f"{neck}.fpn_convs.{used}.conv.weight" in state:
        outputs.append(conv(state, f"{neck}.fpn_convs.{used}.conv", maps[-1], 2))
        outputs.append(conv(state, f"{neck}.fpn_convs.{used + 1}.conv", outputs[-1], 2))
    else:
        outputs.append(outputs[-1][..., ::2, ::2])
    if f"{neck}.downsample_convs.0.conv.weight" not in state:
        return outputs
    own = {"downsample_convs": "down", "pafpn_convs": "out"}
    parameters = {
        f"{own[part]}.{i}.{end}": state[f"{neck}.{part}.{i}.conv.{end}"]
        for part in own
        for i in range(used - 1)
        for end in ("weight", "bias")
    }
    return path_aggregation(outputs, parameters, used)


@torch.no_grad()
def balanced(state: State, maps: list[Tensor]) -> list[Tensor]:
    """The levels after BFP, if the neck has it, at the refine level of the configurations: P4."""
    refine = {key.removeprefix("neck.1."): value for key, value in state.items() if key.startswith("neck.1.refine.")}
    if not refine:
        return maps
    level = 1 if "bbox_head.retina_cls.weight" in state else 2
    is_conv = "refine.conv.weight" in refine
    bfp = BalancedFeaturePyramid(maps[0].shape[1], refine_level=level, refine="conv" if is_conv else "non_local").to(
        maps[0]
    )
    if not is_conv:
        refine = {key.replace("conv_out", "out").replace(".conv.", "."): value for key, value in refine.items()}
    bfp.load_state_dict(refine)
    return explicit_pyramid(bfp, maps)


def features(state: State, batch: Tensor) -> list[Tensor]:
    """What the heads see, finest level first."""
    return balanced(state, pyramid(state, backbone(state, batch)))
