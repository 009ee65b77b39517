"""Residual blocks that only networks made elsewhere have: see config/unet_details.py.

They are the other blocks of diffusers' UNet2DModel.  Networks of this program use ResidualBlock of layers.py.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tiny_diffusion.models.layers import ResidualBlock


class ResidualVariant(ResidualBlock):
    """A residual block whose embedding may only shift, and which may halve or double height and width.

    scale: whether the embedding scales after the second norm, as in ResidualBlock; otherwise it is added before it.
    resize: "down", "up" or None.   The size of an "up" is that of the skip that it meets.
    """

    def __init__(
        self, in_width: int, width: int, *, embedding_width: int, groups: int, dropout: float,
        activation: str, scale: bool, resize: str | None = None,
    ):  # fmt: skip
        sizes = {"embedding_width": embedding_width, "groups": groups, "dropout": dropout, "activation": activation}
        super().__init__(in_width, width, **sizes)
        self.scale, self.resize = scale, resize
        if not scale:
            self.time_emb_proj = nn.Linear(embedding_width, width)

    def forward(self, x: Tensor, embedding: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """x: (B, in_width, H, W).   embedding: already activated.   Returns (B, width, H, W) in the new size."""
        h = self.activation(self.norm1(x))
        if self.resize == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resize == "up":
            x, h = (F.interpolate(each, size=size, mode="nearest") for each in (x, h))
        h, embedding = self.conv1(h), self.time_emb_proj(embedding)[:, :, None, None]
        if self.scale:
            scale, shift = embedding.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + embedding)
        return self.conv_shortcut(x) + self.conv2(self.dropout(self.activation(h)))
