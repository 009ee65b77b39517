"""The parts of each level of a U-Net: its residual blocks and attention, and how it is halved and doubled.

A level has what UNetDetails and the attention levels say; models/unet.py joins the levels.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from tiny_diffusion.config import network_shape
from tiny_diffusion.config.unet_details import UNetDetails
from tiny_diffusion.models.layers import Attention, Downsample, ResidualBlock, Upsample
from tiny_diffusion.models.variants import ResidualVariant


class Block(nn.Module):
    """The parts of one level, in lists named as in diffusers; UNet.forward runs them.

    A block on the way down also has `downsamplers`, and one on the way up `upsamplers`: lists of one module or none.
    """

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)


class LevelParts:
    """Makes the parts of every level, whose weights are drawn from torch's global generator.

    widths: of the levels, the finest first.   groups: of every norm.   sizes: embedding_width, dropout and activation
    of every residual block.   Raises OptionError for sizes that do not fit.
    """

    def __init__(
        self, widths: Sequence[int], attention_levels: Sequence[int], attention_heads: int, details: UNetDetails,
        *, groups: int, **sizes,
    ):  # fmt: skip
        network_shape.check_attention_levels(attention_levels, len(widths))
        network_shape.check_details(details, widths)
        self.widths, self.details, self.groups = widths, details, groups
        self.down_levels, self.up_levels = attention_levels, details.up_levels(attention_levels)
        self.middle_attends = details.attends_in_the_middle(attention_levels)
        attending = {*self.down_levels, *self.up_levels, *([len(widths) - 1] if self.middle_attends else [])}
        self.head_widths = network_shape.head_widths(widths, attending, attention_heads, details)
        scale = details.resnet_time_scale_shift == "scale_shift"
        self.variant = partial(ResidualVariant, groups=groups, scale=scale, **sizes)
        self.residual = partial(ResidualBlock, groups=groups, **sizes) if scale else self.variant

    def on_the_way_down(self, level: int, in_widths: Sequence[int]) -> Block:
        """A block with a residual block for each of these input widths."""
        return self._block(level, in_widths, level in self.down_levels)

    def on_the_way_up(self, level: int, in_widths: Sequence[int]) -> Block:
        return self._block(level, in_widths, level in self.up_levels)

    def _block(self, level: int, in_widths: Sequence[int], attends: bool) -> Block:
        resnets = [self.residual(in_width, self.widths[level]) for in_width in in_widths]
        return Block(resnets, [self._attention(level, attends, self.groups) for _ in resnets])

    def middle(self) -> Block:
        """The block below the coarsest level: a residual block, attention, and another residual block."""
        width, groups = self.widths[-1], self.details.attn_norm_num_groups
        resnets = [self.residual(width, width) for _ in range(2)]
        attention = self._attention(-1, self.middle_attends, self.groups if groups is None else groups)
        return Block(resnets, [attention])

    def _attention(self, level: int, attends: bool, groups: int) -> nn.Module:
        if not attends:
            return nn.Identity()
        return Attention(self.widths[level], head_width=self.head_widths[level], groups=groups)

    def downsample(self, level: int) -> nn.Module:
        width = self.widths[level]
        if level in self.details.resnet_down_levels:
            return self.variant(width, width, resize="down")
        return Downsample(width, self.details.downsample_padding)

    def upsample(self, level: int) -> nn.Module:
        width, variant = self.widths[level], level in self.details.resnet_up_levels
        return self.variant(width, width, resize="up") if variant else Upsample(width)
