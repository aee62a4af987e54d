"""Blocks that refine the average of a balanced feature pyramid."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NonLocal(nn.Module):
    r"""Embedded-Gaussian non-local block: :math:`x + W_o \, \text{softmax}(\theta(x)^\top \phi(x)) \, g(x)`.

    The logits are not scaled, as in the paper's code. The softmax runs over all H x W positions, in float32 or wider
    and after its maximum was taken off, so that no logit overflows. Their :math:`(HW)^2` matrix is never held where
    :func:`torch.nn.functional.scaled_dot_product_attention` has a fused kernel:

    - on the CPU for every type and number of channels (flash attention);
    - on CUDA for float16 and bfloat16, up to 256 channels, on Ampere and later (flash or cuDNN attention), otherwise
      and for float32 where the channels are a multiple of 8 (memory-efficient attention).

    For what remains, such as float64 on CUDA, it is held. Fused kernels have one derivative, in backward mode; for
    others, choose ``SDPBackend.MATH`` by :func:`torch.nn.attention.sdpa_kernel`.

    Args:
        channels (int): channels of the map, and of the embeddings.
        init (str): ``"zero"``: the embeddings start normal with standard deviation 0.01 and the output convolution
            at 0, so that the block is the identity; ``"xavier"``: all start from Xavier's uniform distribution.

    Shape:
        A map :math:`(N, C, H, W)`; the output has the same shape.

    Reference:
        Xiaolong Wang, Ross Girshick, Abhinav Gupta, Kaiming He: Non-local Neural Networks.
        https://arxiv.org/abs/1711.07971
    """

    def __init__(self, channels: int, *, init: str = "zero") -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, channels, 1)
        self.phi = nn.Conv2d(channels, channels, 1)
        self.g = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        for conv in (self.theta, self.phi, self.g, self.out):
            if init == "xavier":
                nn.init.xavier_uniform_(conv.weight)
            else:
                nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.get_parameter("bias"))
        if init == "zero":
            nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        # With the channels last, the flattened maps are contiguous as the attention needs them: from other layouts it
        # silently holds the full matrix.
        channels_last = x.contiguous(memory_format=torch.channels_last)
        query, key, value = (
            conv(channels_last).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()  # [N, 1, HW, C]
            for conv in (self.theta, self.phi, self.g)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.out(mixed.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


class ConvRefine(nn.Module):
    r"""ReLU of a 3 x 3 convolution, without a residual: :math:`\max(0, W * x + b)`.

    Args:
        channels (int): channels of the map.
        init (str): ``"xavier"``: Xavier's uniform distribution; ``"zero"``: Kaiming's normal distribution, since a
            block without a residual that started at zero would stay there.

    Shape:
        A map :math:`(N, C, H, W)`; the output has the same shape.
    """

    def __init__(self, channels: int, *, init: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        if init == "xavier":
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()
