"""The parts of a U-Net: time embedding, residual block, self-attention, down- and up-sampling.

A part knows neither its position in the network nor that the network denoises.  Each computes the same as its
counterpart in diffusers' UNet2DModel and names its parameters alike, so weights can be copied unchanged in both
directions; tests/test_unet.py compares the two.  Every memory format works.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_diffusion.models.attention import attend
from tiny_diffusion.models.norm import GroupNorm


class TimeEmbedding(nn.Module):
    """Real-valued times (B,), about 0 to 1000, -> vectors (B, width): sinusoids, then Linear-SiLU-Linear.

    cosines_first, freq_shift: the two ways to write the sinusoids, as UNetDetails has them.
    """

    def __init__(self, sinusoid_width: int, width: int, cosines_first: bool = True, freq_shift: float = 0.0):
        super().__init__()
        self.cosines_first, self.freq_shift = cosines_first, freq_shift
        self.linear_1 = nn.Linear(sinusoid_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        # The angles are float32 in every network: in bfloat16, times 998 and 999 are the same number.
        half = self.linear_1.in_features // 2
        exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=time.device)
        angle = time.float()[:, None] * torch.exp(exponent / (half - self.freq_shift))
        waves = (angle.cos(), angle.sin()) if self.cosines_first else (angle.sin(), angle.cos())
        sinusoids = torch.cat(waves, dim=1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the embedding scales and shifts the output of the second norm."""

    def __init__(
        self, in_width: int, width: int, *, embedding_width: int, groups: int, dropout: float, activation: str = "silu"
    ):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm1 = GroupNorm(groups, in_width)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_width, 2 * width)
        self.norm2 = GroupNorm(groups, width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = start_at_zero(nn.Conv2d(width, width, 3, padding=1))
        self.conv_shortcut = nn.Conv2d(in_width, width, 1) if in_width != width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, in_width, H, W).   embedding: (B, embedding_width), already activated.   Returns (B, width, H, W)."""
        scale, shift = self.time_emb_proj(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(self.activation(self.norm1(x))))
        h = torch.addcmul(shift, h, 1 + scale)  # h * (1 + scale) + shift, in one pass over memory
        return self.conv_shortcut(x) + self.conv2(self.dropout(self.activation(h)))


class Attention(nn.Module):
    """Self-attention between all pixels, softmax(q k^T / sqrt(head_width)) v for each head, added to its input."""

    def __init__(self, width: int, *, head_width: int, groups: int):
        super().__init__()
        self.head_width = head_width
        self.group_norm = GroupNorm(groups, width) if groups else nn.Identity()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([start_at_zero(nn.Linear(width, width))])  # a list, as in diffusers' key to_out.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = each_pixel(self.group_norm(x), self.to_q, self.to_k, self.to_v).chunk(3, dim=1)
        return x + each_pixel(attend(q, k, v, self.head_width), self.to_out[0])


class Downsample(nn.Module):
    """Halves height and width, rounded up: 28 -> 14 -> 7 -> 4.

    padding: 1 on every side, or 0 for one row and one column of zeros at the end only.
    """

    def __init__(self, width: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width, or one less where the skip that it meets has an odd side.

    size: (height, width) of that skip.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def each_pixel(x: Tensor, *linears: nn.Linear) -> Tensor:
    """Linear maps of each pixel's channels, (B, C, H, W) -> (B, D, H, W), with their outputs concatenated in D.

    They run as one 1x1 convolution, which a CPU computes twice as fast as the equal matrix products.
    """
    weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    return F.conv2d(x, weight[:, :, None, None], bias)


def start_at_zero(layer: nn.Module) -> nn.Module:
    """The same layer with zero weight and bias, so that at the start of training it adds nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "mish": F.mish}
