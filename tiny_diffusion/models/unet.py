"""The U-Net: (noisy image, time, label) -> an image of the same shape.

It knows neither the schedule nor what its output stands for.  Block for block it is diffusers' UNet2DModel with
scale-shift residual blocks, and its state_dict has the same keys, so that exporting it renames nothing.  Two things go
beyond: `patch_size` is applied outside that network, and an odd level is up-sampled to the size of its skip, where
diffusers stops with an error.  To add a part, write it in layers.py and place it here.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tiny_diffusion.models.layers import Attention, Downsample, ResidualBlock, TimeEmbedding, Upsample, start_at_zero


class UNet(nn.Module):
    """A U-Net with one level per entry of `channel_mult`, each half the size of the one before it.

    channels           of the image
    base_channels      times its entry of channel_mult is a level's width; even
    layers_per_block   residual blocks of a level on the way down; one more on the way up
    time_emb_dim       width of the time and class embedding; None: 4 * base_channels
    attention_levels   those with self-attention, 0 being the full size; if there are any, the middle has it too
    attention_heads    at the lowest level; heads are equally wide at all levels, so narrower levels have fewer
    patch_size         p: the network sees (p*p*C, H/p, W/p)
    num_classes        0: no labels.  Otherwise label `num_classes`, one past the last, is guidance's null class
    checkpoint_activations  in training each residual block keeps its inputs only, and is run again for its gradients

    Weights are drawn from torch's global generator.  Raises ValueError for sizes that do not fit together.
    """

    MAX_NORM_GROUPS = 8

    def __init__(
        self,
        channels: int,
        *,
        base_channels: int = 32,
        channel_mult: Sequence[int] = (1, 2),
        layers_per_block: int = 1,
        time_emb_dim: int | None = None,
        attention_levels: Sequence[int] = (1,),
        attention_heads: int = 4,
        patch_size: int = 1,
        dropout: float = 0.0,
        num_classes: int = 0,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.checkpoint_activations = checkpoint_activations

        widths = [base_channels * multiplier for multiplier in channel_mult]
        lowest = len(widths) - 1
        if base_channels % 2:
            raise ValueError(f"base_channels {base_channels} is odd, but time needs as many sines as cosines.")
        if not set(attention_levels) <= set(range(len(widths))):
            raise ValueError(f"attention_levels {attention_levels} must lie in 0 to {lowest}: see channel_mult.")
        if attention_levels:
            attended = sorted({*attention_levels, lowest})
            head_width = head_width_for([widths[level] for level in attended], attention_heads)
        embedding_width = time_emb_dim or 4 * base_channels
        # What divides base_channels divides every width, concatenated ones too: one number for the whole network.
        groups = max(g for g in range(1, self.MAX_NORM_GROUPS + 1) if base_channels % g == 0)
        residual = partial(ResidualBlock, embedding_width=embedding_width, groups=groups, dropout=dropout)

        def attention(width: int, wanted: bool) -> nn.Module:
            return Attention(width, head_width=head_width, groups=groups) if wanted else nn.Identity()

        self.conv_in = nn.Conv2d(channels * patch_size**2, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], embedding_width)
        self.class_embedding = nn.Embedding(num_classes + 1, embedding_width) if num_classes else None

        skip_widths = [widths[0]]  # of what the way down leaves for the way up; last in, first out
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            in_widths = [skip_widths[-1]] + [width] * (layers_per_block - 1)
            resnets = [residual(in_width, width) for in_width in in_widths]
            attentions = [attention(width, level in attention_levels) for _ in resnets]
            downsamplers = [Downsample(width)] if level < lowest else []
            self.down_blocks.append(Block(resnets=resnets, attentions=attentions, downsamplers=downsamplers))
            skip_widths += [width] * len(resnets + downsamplers)

        resnets = [residual(widths[lowest], widths[lowest]) for _ in range(2)]
        self.mid_block = Block(resnets=resnets, attentions=[attention(widths[lowest], bool(attention_levels))])

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            width, width_below = widths[level], widths[min(level + 1, lowest)]
            in_widths = [width_below] + [width] * layers_per_block
            resnets = [residual(in_width + skip_widths.pop(), width) for in_width in in_widths]
            attentions = [attention(width, level in attention_levels) for _ in resnets]
            upsamplers = [Upsample(width)] if level > 0 else []
            self.up_blocks.append(Block(resnets=resnets, attentions=attentions, upsamplers=upsamplers))

        self.conv_norm_out = nn.GroupNorm(groups, widths[0])
        self.conv_out = start_at_zero(nn.Conv2d(widths[0], channels * patch_size**2, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """The network's output, of the shape of x.

        x: (B, C, H, W).   time: (B,) real, about 0 to 1000.   label: (B,) int64 in [0, num_classes]; None: null class.
        Raises ValueError if patch_size does not divide H and W, or for a label where the network has no classes.
        """
        height, width = x.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide {height}x{width} pixels; 1 always does.")
        run = self.runner()
        embedding = self.embed(time, label, x.dtype)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        skips = [h]
        for block in self.down_blocks:
            for resnet, attention in zip(block.resnets, block.attentions, strict=True):
                h = run(resnet, attention, embedding, h)
                skips.append(h)
            for downsample in block.downsamplers:
                h = downsample(h)
                skips.append(h)
        h = run(self.mid_block.resnets[0], self.mid_block.attentions[0], embedding, h)
        h = run(self.mid_block.resnets[1], None, embedding, h)
        for block in self.up_blocks:
            for resnet, attention in zip(block.resnets, block.attentions, strict=True):
                h = run(resnet, attention, embedding, h, skips.pop())
            for upsample in block.upsamplers:
                h = upsample(h, size=skips[-1].shape[2:])
        return F.pixel_shuffle(self.conv_out(F.silu(self.conv_norm_out(h))), self.patch_size)

    def runner(self) -> Callable[..., Tensor]:
        """`run_residual`, by way of torch's checkpoint where activations are not to be kept for a backward pass."""
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            return partial(checkpoint, run_residual, use_reentrant=False)
        return run_residual

    def embed(self, time: Tensor, label: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Time and label as one vector (B, time_emb_dim), activated here once instead of in every residual block."""
        embedding = self.time_embedding(time, dtype)
        if self.class_embedding is not None:
            null = torch.full_like(time, self.num_classes, dtype=torch.int64)
            embedding = embedding + self.class_embedding(null if label is None else label)
        elif label is not None:
            raise ValueError("label given to a UNet without classes. Leave it out, or set num_classes.")
        return F.silu(embedding)


class Block(nn.Module):
    """The parts of one level as lists, named as in diffusers; UNet.forward says in which order they run."""

    def __init__(self, **parts: list[nn.Module]):
        super().__init__()
        for name, modules in parts.items():
            setattr(self, name, nn.ModuleList(modules))


def run_residual(
    resnet: nn.Module, attention: nn.Module | None, embedding: Tensor, h: Tensor, skip: Tensor | None = None
) -> Tensor:
    """A residual block and its attention.  The skip is joined to h in here, so that no checkpoint keeps it twice."""
    h = resnet(h if skip is None else torch.cat([h, skip], dim=1), embedding)
    return h if attention is None else attention(h)


def head_width_for(widths: list[int], heads: int) -> int:
    """Channels per head when the last of the widths has that many heads: it must divide all of them."""
    common = math.gcd(*widths)
    choices = [widths[-1] // width for width in range(common, 0, -1) if common % width == 0]
    if heads not in choices:
        raise ValueError(
            f"attention_heads {heads} does not split {widths[-1]} channels into equal heads that divide the widths "
            f"of all levels with attention, {widths}. Use one of {choices}."
        )
    return widths[-1] // heads
