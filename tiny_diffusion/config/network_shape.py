"""The shape of a network: which image sizes, patches, levels, widths and attention heads fit together.

The check of the options and UNet read the same rules.  Each raises OptionError, which names the option, its value, the
reason and a way out.  No torch here.  To add a rule: a function, called in `check_network`, and in UNet where UNet is
given the values too.
"""

import math
from collections.abc import Iterable, Sequence

from tiny_diffusion.config.unet_details import UNetDetails
from tiny_diffusion.errors import OptionError

MAX_PARAMETERS = 4e9  # beyond what one machine trains; refused before its memory is spent
MAX_NORM_GROUPS = 8
LEVEL_LISTS = ("up_attention_levels", "resnet_down_levels", "resnet_up_levels")  # of UNetDetails
MAX_PATCH_SIZE, MAX_HEADS = 16, 64  # the largest that an error suggests


def check_network(config, sides: tuple[int, int]) -> None:
    """Raises OptionError unless the network's options fit the images and one another.

    config: a training configuration.  sides: the smallest and the largest side of an image that --image_size takes.
    """
    widths = level_widths(config.base_channels, config.channel_mult)
    or_sizes = _or_sizes(config.size, config.patch_size, len(widths), sides)
    check_tiling(config.size, config.patch_size, or_sizes)
    check_coarsest_level(config.size, config.patch_size, config.channel_mult, or_sizes)
    check_attention_levels(config.attention_levels, len(widths))
    details = UNetDetails.of(config.unet_details)
    check_details(details, widths)
    up_levels = details.up_levels(config.attention_levels)
    middle = [len(widths) - 1] if details.attends_in_the_middle(config.attention_levels) else []
    head_widths(widths, {*config.attention_levels, *up_levels, *middle}, config.attention_heads, details)
    check_parameters(config.base_channels, config.channel_mult, config.layers_per_block)


def level_widths(base_channels: int, channel_mult: Sequence[int]) -> list[int]:
    """The channels of each level, the finest first.  There must be a level, and base_channels must be even."""
    if not channel_mult:
        raise OptionError("--channel_mult needs at least one value, for example 1,2.")
    if base_channels % 2:
        raise OptionError(
            f"--base_channels {base_channels} is odd, but the time embedding needs as many sines as cosines. "
            f"Use {base_channels + 1}."
        )
    return [base_channels * multiplier for multiplier in channel_mult]


def check_tiling(size: tuple[int, int], patch_size: int, or_sizes: str = "") -> None:
    """Raises OptionError unless patches of patch_size x patch_size pixels tile an image of this (height, width)."""
    if any(side % patch_size for side in size):
        fits = _patch_sizes(size)
        raise OptionError(
            f"--patch_size {patch_size} does not divide the {_by(size)} image. "
            f"Use {'one of ' if len(fits) > 1 else ''}{_listed(fits)}{or_sizes}."
        )


def check_coarsest_level(
    size: tuple[int, int], patch_size: int, channel_mult: Sequence[int], or_sizes: str = ""
) -> None:
    """Raises OptionError if the coarsest level has a side of 1 pixel.  Each level halves the one above, rounded up."""
    patches = [side // patch_size for side in size]
    if min(patches) < 2:
        raise OptionError(
            f"--patch_size {patch_size} leaves 1 pixel of the {_by(size)} image. "
            f"Use at most {_patch_sizes(size)[-1]}{or_sizes}."
        )
    halvings = len(channel_mult) - 1
    max_levels = sum(math.ceil(min(patches) / 2**level) >= 2 for level in range(halvings + 1))
    if max_levels <= halvings:
        in_patches = f" (in {_by([patch_size] * 2)} patches: {_by(patches)})" if patch_size > 1 else ""
        raise OptionError(
            f"--channel_mult {_typed(channel_mult)} halves the {_by(size)} image{in_patches} "
            f"{'once' if halvings == 1 else f'{halvings} times'}, which leaves 1 pixel. Use at most {max_levels} "
            f"of them, for example {_typed(2**level for level in range(max_levels))}{or_sizes}."
        )


def check_attention_levels(attention_levels: Sequence[int], levels: int) -> None:
    """Raises OptionError unless the levels with attention are among 0 .. levels - 1."""
    if not all(0 <= level < levels for level in attention_levels):
        raise OptionError(
            f"--attention_levels {_typed(attention_levels)}: --channel_mult makes levels 0 to {levels - 1} only. "
            "Choose from those, or none."
        )


def head_width(widths: Sequence[int], attention_levels: Sequence[int], attention_heads: int) -> int:
    """Channels of a head, when the coarsest level has attention_heads of them.

    Heads are equally wide wherever there is attention: at attention_levels, and in the middle, at the coarsest width.
    """
    common = math.gcd(widths[-1], *(widths[level] for level in attention_levels))

    def fits(heads: int) -> bool:
        return widths[-1] % heads == 0 and common % (widths[-1] // heads) == 0

    if attention_heads < 1 or not fits(attention_heads):
        raise OptionError(
            f"--attention_heads {attention_heads} does not split the {widths[-1]} channels of the coarsest level into "
            f"heads that fit every level with attention. Use one of {_listed(filter(fits, range(1, MAX_HEADS + 1)))}."
        )
    return widths[-1] // attention_heads


def head_widths(
    widths: Sequence[int], attending: Iterable[int], attention_heads: int, details: UNetDetails
) -> list[int]:
    """Channels of a head at each level; only those of the levels that attend are of use.

    Raises OptionError if they do not divide the width of a level that attends.
    """
    attending = sorted(attending)
    if details.attention_head_dim is None:
        return [head_width(widths, attending, attention_heads) if attending else 0] * len(widths)
    for level in attending:
        if details.attention_head_dim and widths[level] % details.attention_head_dim:
            raise OptionError(
                f"--unet_details attention_head_dim={details.attention_head_dim} does not divide the {widths[level]} "
                f"channels of level {level}. Use a divisor, or 0 for one head."
            )
    return [details.attention_head_dim or width for width in widths]


def check_details(details: UNetDetails, widths: Sequence[int]) -> None:
    """Raises OptionError unless the details fit a network with levels of these widths."""
    named = [(name, level) for name in LEVEL_LISTS for level in getattr(details, name) or ()]
    for name, level in named:
        if level >= len(widths):
            raise OptionError(
                f"--unet_details {name}={level}: --channel_mult makes levels 0 to {len(widths) - 1} only."
            )
    for name, each in (("norm_num_groups", widths), ("attn_norm_num_groups", widths[-1:])):
        groups = getattr(details, name)
        if groups and any(width % groups for width in each):
            raise OptionError(
                f"--unet_details {name}={groups} does not divide {_typed(each)} channels. "
                f"Use a divisor of {math.gcd(*each)}."
            )
    if details.freq_shift >= widths[0] / 2:
        raise OptionError(f"--unet_details freq_shift={details.freq_shift:g} must be less than {widths[0] // 2}.")


def norm_groups(base_channels: int) -> int:
    """Groups of every norm.  A divisor of base_channels divides the width of each level, and the sum of any two."""
    return max(groups for groups in range(1, MAX_NORM_GROUPS + 1) if base_channels % groups == 0)


def check_parameters(base_channels: int, channel_mult: Sequence[int], layers_per_block: int) -> None:
    """Raises OptionError for more than MAX_PARAMETERS, estimated by the 3x3 convolutions.

    A residual block has two of them.  On the way up each level has one more block, whose input is joined to a skip.
    """
    widths = level_widths(base_channels, channel_mult)
    weights = sum(9 * width**2 * (2 * layers_per_block + 3 * (layers_per_block + 1)) for width in widths)
    weights += 36 * widths[-1] ** 2  # the middle
    if weights > MAX_PARAMETERS:
        raise OptionError(
            f"--base_channels {base_channels} with --channel_mult {_typed(channel_mult)} makes a network of "
            f"{weights / 1e9:,.0f} billion parameters; the maximum is {MAX_PARAMETERS / 1e9:.0f} billion. Lower them."
        )


def _or_sizes(size: tuple[int, int], patch_size: int, levels: int, sides: tuple[int, int]) -> str:
    """The nearest smaller and larger sizes that the network takes, if any: ", or --image_size 28 or 32x28"."""
    fewest = max(2 ** (levels - 1) + 1, math.ceil(sides[0] / patch_size))  # patches a side
    smaller = [max(fewest, side // patch_size) * patch_size for side in size]
    larger = [max(fewest, math.ceil(side / patch_size)) * patch_size for side in size]
    found = [smaller] if all(new <= old for new, old in zip(smaller, size, strict=True)) else []
    found += [larger] if max(larger) <= sides[1] else []
    texts = [f"{height}" if height == width else _by((height, width)) for height, width in found]
    return f", or --image_size {' or '.join(texts)}" if texts else ""


def _patch_sizes(size: tuple[int, int]) -> list[int]:
    """The patch sizes that tile the image with at least 2 patches a side; 1 always does."""
    sizes = range(2, MAX_PATCH_SIZE + 1)
    return [1, *(patch for patch in sizes if not any(side % patch or side // patch < 2 for side in size))]


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _listed(choices: Iterable[int]) -> str:
    return ", ".join(map(str, choices))


def _typed(values: Iterable[int]) -> str:
    """A list as the command line takes it."""
    return ",".join(map(str, values))
