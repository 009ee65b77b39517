"""Group norm (Wu & He, 2018), as torch computes it, also under autocast: inside in float32, whatever its input is."""

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """On a CPU a bfloat16 input is made contiguous: torch's kernel for channels_last is slow in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous() if (x.device.type, x.dtype) == ("cpu", torch.bfloat16) else x)
