"""What a balanced feature pyramid refines its average with."""

import torch.nn.functional as F
from torch import Tensor, nn


class NonLocal(nn.Module):
    r"""Embedded-Gaussian non-local block: :math:`x + W_o \, \text{softmax}(\theta(x)^\top \phi(x)) \, g(x)`.

    The logits are not scaled, as in the paper's code. The softmax runs over all H x W positions; their
    :math:`(HW)^2` matrix is never held where :func:`torch.nn.functional.scaled_dot_product_attention` has a fused
    kernel: on the CPU and, but for float64, on CUDA.

    Args:
        channels (int): channels of the map, and of the embeddings.
        init (str): ``"zero"``: the embeddings start normal with standard deviation 0.01 and the output convolution
            at 0, so that the block is the identity; ``"xavier"``: all start from Xavier's uniform distribution.

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
        # Contiguous in the channels: with a transposed view the attention silently holds the full matrix.
        query, key, value = (
            conv(x).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()  # [N, 1, HW, C]
            for conv in (self.theta, self.phi, self.g)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


class ConvRefine(nn.Module):
    """ReLU of a 3 x 3 convolution, without a residual."""

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
