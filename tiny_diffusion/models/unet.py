"""The U-Net: (noisy image, time, label) -> an image of the same shape.

It knows neither the schedule nor what its output stands for.  Block for block it is diffusers' UNet2DModel with
scale-shift residual blocks, and its state_dict has the same keys, so an export renames nothing.  It differs in two
things: `patch_size` is applied outside that network, and an odd level is up-sampled to the size of its skip, where
diffusers raises an error.  Which sizes fit together is stated in config/network_shape.py.  To add a part, write it in
layers.py and place it here.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tiny_diffusion.config import network_shape
from tiny_diffusion.config.unet_details import UNetDetails
from tiny_diffusion.models.layers import ACTIVATIONS, TimeEmbedding, start_at_zero
from tiny_diffusion.models.levels import LevelParts
from tiny_diffusion.models.norm import GroupNorm


class UNet(nn.Module):
    """A U-Net with one level per entry of `channel_mult`, each half the size of the one before it.

    channels           channels of the image
    base_channels      even; a level has base_channels times its entry of channel_mult channels
    layers_per_block   residual blocks of a level on the way down; on the way up there is one more
    time_emb_dim       width of the embedding of time and class; None: 4 * base_channels
    attention_levels   levels with self-attention, 0 being the finest; if there are any, the middle has it too
    attention_heads    heads of the coarsest level; heads are equally wide everywhere, so narrower levels have fewer
    patch_size         p: the network sees patches of p x p pixels as channels, (p*p*C, H/p, W/p)
    activation         of the residual blocks, a key of layers.ACTIVATIONS; elsewhere it is SiLU, as in diffusers
    num_classes        0: no labels.  Otherwise label `num_classes`, one past the last, is guidance's null class
    checkpoint_activations  in training, keep a residual block's inputs only and run it again in the backward pass
    details            how networks made elsewhere differ from ours

    Weights are drawn from torch's global generator.  Raises OptionError (a ValueError) for sizes that do not fit.
    """

    def __init__(
        self,
        channels: int,
        *,
        base_channels: int = 32,
        channel_mult: Sequence[int] = (1, 2),
        layers_per_block: int = 1,
        time_emb_dim: int | None = None,
        attention_levels: Sequence[int] = (1,),
        attention_heads: int = 2,
        patch_size: int = 1,
        activation: str = "silu",
        dropout: float = 0.0,
        num_classes: int = 0,
        checkpoint_activations: bool = False,
        details: UNetDetails = UNetDetails(),  # noqa: B008 (it is frozen)
    ):
        super().__init__()
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.activation = ACTIVATIONS[activation]
        self.checkpoint_activations = checkpoint_activations

        widths = network_shape.level_widths(base_channels, channel_mult)
        embedding_width = time_emb_dim or 4 * base_channels
        parts = LevelParts(
            widths, attention_levels, attention_heads, details,
            groups=details.norm_num_groups or network_shape.norm_groups(base_channels),
            embedding_width=embedding_width, dropout=dropout, activation=activation,
        )  # fmt: skip

        # Weights are drawn in the order of these lines, so a seed's network depends on it.
        self.conv_in = nn.Conv2d(channels * patch_size**2, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], embedding_width, details.flip_sin_to_cos, details.freq_shift)
        self.class_embedding = nn.Embedding(num_classes + 1, embedding_width) if num_classes else None
        self.down_blocks = down_blocks(parts, layers_per_block)
        self.mid_block = parts.middle()
        self.up_blocks = up_blocks(parts, layers_per_block)
        self.conv_norm_out = GroupNorm(parts.groups, widths[0])
        self.conv_out = start_at_zero(nn.Conv2d(widths[0], channels * patch_size**2, 3, padding=1))
        for module in self.modules():
            if isinstance(module, GroupNorm):
                module.eps = details.norm_eps

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """The network's output, of the shape of x.

        x: (B, C, H, W).   time: (B,) real, about 0 to 1000.   label: (B,) int64 in [0, num_classes]; None: null class.
        Raises ValueError if patch_size does not divide H and W, or if a label is given to a network without classes.
        """
        network_shape.check_tiling(x.shape[2:], self.patch_size)
        run = self.runner()
        embedding = self.embed(time, label, x.dtype)
        skips = self.way_down(x, embedding, run)
        h = run(self.mid_block.resnets[0], self.mid_block.attentions[0], embedding, skips[-1])
        h = run(self.mid_block.resnets[1], None, embedding, h)
        for block in self.up_blocks:
            for resnet, attention in zip(block.resnets, block.attentions, strict=True):
                h = run(resnet, attention, embedding, h, skips.pop())
            for upsample in block.upsamplers:
                h = upsample(h, embedding, size=skips[-1].shape[2:])
        return F.pixel_shuffle(self.conv_out(F.silu(self.conv_norm_out(h))), self.patch_size)

    def way_down(self, x: Tensor, embedding: Tensor, run: Callable[..., Tensor]) -> list[Tensor]:
        """The outputs of conv_in and then, level by level, of each residual block and of the downsampler."""
        outputs = [self.conv_in(F.pixel_unshuffle(x, self.patch_size))]
        for block in self.down_blocks:
            for resnet, attention in zip(block.resnets, block.attentions, strict=True):
                outputs.append(run(resnet, attention, embedding, outputs[-1]))
            for downsample in block.downsamplers:
                outputs.append(downsample(outputs[-1], embedding))
        return outputs

    def runner(self) -> Callable[..., Tensor]:
        """`run_residual`, through torch's checkpoint in training if activations are not to be kept."""
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            return partial(checkpoint, run_residual, use_reentrant=False)
        return run_residual

    def embed(self, time: Tensor, label: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Time and label as one vector (B, time_emb_dim), activated once here and not in every residual block."""
        embedding = self.time_embedding(time, dtype)
        if self.class_embedding is not None:
            null = torch.full_like(time, self.num_classes, dtype=torch.int64)
            embedding = embedding + self.class_embedding(null if label is None else label)
        elif label is not None:
            raise ValueError("label given to a UNet without classes. Leave it out, or set num_classes.")
        return self.activation(embedding)


def down_blocks(parts: LevelParts, layers_per_block: int) -> nn.ModuleList:
    """The way down, the finest level first, with a downsampler after each level but the coarsest."""
    blocks, widths = nn.ModuleList(), parts.widths
    for level, width in enumerate(widths):
        width_above = widths[max(level - 1, 0)]
        block = parts.on_the_way_down(level, [width_above] + [width] * (layers_per_block - 1))
        block.downsamplers = nn.ModuleList([parts.downsample(level)] if level < len(widths) - 1 else [])
        blocks.append(block)
    return blocks


def up_blocks(parts: LevelParts, layers_per_block: int) -> nn.ModuleList:
    """The way up, the coarsest level first, with an upsampler after each level but the finest.

    Each residual block also reads one output of the way down, its skip: the last one that is left.
    """
    # What the way down leaves: the output of conv_in, of every residual block, and of every downsampler.
    blocks, widths = nn.ModuleList(), parts.widths
    skip_widths = [widths[0], *(width for width in widths for _ in range(layers_per_block + 1))][:-1]
    for level in reversed(range(len(widths))):
        width, width_below = widths[level], widths[min(level + 1, len(widths) - 1)]
        in_widths = [width_below] + [width] * layers_per_block
        block = parts.on_the_way_up(level, [in_width + skip_widths.pop() for in_width in in_widths])
        block.upsamplers = nn.ModuleList([parts.upsample(level)] if level > 0 else [])
        blocks.append(block)
    return blocks


def run_residual(
    resnet: nn.Module, attention: nn.Module | None, embedding: Tensor, h: Tensor, skip: Tensor | None = None
) -> Tensor:
    """A residual block and its attention.  The skip is joined to h here, so that torch's checkpoint keeps it once.

    h: (B, C, H, W).   skip: (B, D, H, W), or None on the way down.   Returns the block's width in channels.
    """
    h = resnet(h if skip is None else torch.cat([h, skip], dim=1), embedding)
    return h if attention is None else attention(h)
