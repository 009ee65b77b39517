"""The configuration of diffusers' UNet2DModel, and the options of a network: each made from the other.

`unet2d_config` and `network_options_of` are inverses.  What only one side can express is refused with the reason.  No
torch here, and no diffusers: the format is a JSON file.
"""

import math
from collections.abc import Mapping, Sequence

from tiny_diffusion.config import network_shape
from tiny_diffusion.config.unet_details import UNetDetails
from tiny_diffusion.errors import OptionError, printable

MAX_HEADS = 64  # of --attention_heads
DEFAULTS = {  # of UNet2DModel, for the keys that an older file lacks
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
    "num_train_timesteps": None,
}  # fmt: skip
READ = {  # the values that are understood of the keys that are no option here
    "center_input_sample": [False], "time_embedding_type": ["positional"], "mid_block_type": ["UNetMidBlock2D"],
    "mid_block_scale_factor": [1], "class_embed_type": [None],
    "downsample_type": ["conv", "resnet"], "upsample_type": ["conv", "resnet"],
}  # fmt: skip
DOWN, ATTENTION_DOWN, RESNET_DOWN = "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"
UP, ATTENTION_UP, RESNET_UP = "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"


def unet2d_config(config, channels: int, embeddings: int = 0) -> dict[str, object]:
    """The UNet2DModel that has the weights and the outputs of a network, between its pixel unshuffle and shuffle.

    config: a training configuration.   channels: of the images.   embeddings: of classes, the null class included; 0
    for none.   Raises OptionError for a network that UNet2DModel cannot express.
    """
    details, widths = UNetDetails.of(config.unet_details), _widths(config)
    sides = [side // config.patch_size for side in config.size]
    _refuse_odd_levels(sides, len(widths))
    last, down = len(widths) - 1, config.attention_levels
    up, middle = details.up_levels(down), details.attends_in_the_middle(down)
    attending = {*down, *up, *([last] if middle else [])}
    head_widths = network_shape.head_widths(widths, attending, config.attention_heads, details)
    groups = details.norm_num_groups or network_shape.norm_groups(config.base_channels)
    middle_groups = groups if details.attn_norm_num_groups is None else details.attn_norm_num_groups
    if not middle_groups and details.resnet_time_scale_shift == "default" and middle:
        raise OptionError("--unet_details attn_norm_num_groups=0 exists in UNet2DModel with scale_shift only.")
    halved = range(last)  # the coarsest level is not halved, and the finest not doubled
    return DEFAULTS | {
        "sample_size": sides[0] if sides[0] == sides[1] else sides,
        "in_channels": channels * config.patch_size**2,
        "out_channels": channels * config.patch_size**2,
        "time_embedding_dim": config.time_emb_dim,
        "freq_shift": details.freq_shift,
        "flip_sin_to_cos": details.flip_sin_to_cos,
        "down_block_types": _block_types(widths, down, details.resnet_down_levels, DOWN, ATTENTION_DOWN, RESNET_DOWN),
        "up_block_types": _block_types(widths, up, details.resnet_up_levels, UP, ATTENTION_UP, RESNET_UP)[::-1],
        "block_out_channels": widths,
        "layers_per_block": config.layers_per_block,
        "downsample_padding": details.downsample_padding,
        "downsample_type": _resampling([level for level in down if level in halved], details.resnet_down_levels),
        "upsample_type": _resampling([level for level in up if level], details.resnet_up_levels),
        "dropout": config.dropout,
        "act_fn": config.activation,
        "attention_head_dim": None if details.attention_head_dim == 0 else head_widths[last] or None,
        "norm_num_groups": groups,
        "attn_norm_num_groups": middle_groups or None,
        "norm_eps": details.norm_eps,
        "resnet_time_scale_shift": details.resnet_time_scale_shift,
        "add_attention": middle,
        "num_class_embeds": embeddings or None,
    }  # fmt: skip


def network_options_of(given: Mapping[str, object]) -> tuple[dict[str, object], int, int]:
    """The options of the network of a UNet2DModel, its channels, and its class embeddings (0: none).

    given: its config.json.  Raises ValueError, TypeError or OverflowError saying what is not understood.
    """
    values = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    for name, known in READ.items():
        if values[name] not in known:
            raise ValueError(f"its {name} is {shown(values[name])}; {' or '.join(map(str, known))} can be read")
    channels, widths = values["in_channels"], list(values["block_out_channels"])
    if channels != values["out_channels"]:
        raise ValueError(
            f"it makes {shown(values['out_channels'])} channels of {shown(channels)}, not an image of an image"
        )
    if values["sample_size"] is None:
        raise ValueError('it has no sample_size. Add it to config.json, for example "sample_size": 32')
    if not all(type(width) is int and width > 0 for width in widths) or not widths:
        raise ValueError(f"its block_out_channels are {shown(widths)}")
    base = widths[0] if not any(width % widths[0] for width in widths) else math.gcd(*widths)
    down, down_resnets = _levels(
        values["down_block_types"], values["downsample_type"], (DOWN, ATTENTION_DOWN, RESNET_DOWN)
    )
    up, up_resnets = _levels(
        list(values["up_block_types"])[::-1], values["upsample_type"], (UP, ATTENTION_UP, RESNET_UP)
    )
    if not len(values["down_block_types"]) == len(values["up_block_types"]) == len(widths):
        raise ValueError("its block_out_channels, down_block_types and up_block_types differ in number")
    details = {
        "resnet_down_levels": tuple(level for level in down_resnets if level < len(widths) - 1),
        "resnet_up_levels": tuple(level for level in up_resnets if level > 0),
        **{name: values[name] for name in ("norm_eps", "resnet_time_scale_shift", "downsample_padding")},
        **{name: values[name] for name in ("flip_sin_to_cos", "freq_shift")},
        **_attention_details(values, widths, down, up),
        **(
            {}
            if values["norm_num_groups"] == network_shape.norm_groups(base)
            else {"norm_num_groups": values["norm_num_groups"]}
        ),
    }
    heads = details.pop("attention_heads", None)
    options = {
        "image_size": tuple(values["sample_size"])
        if isinstance(values["sample_size"], list)
        else values["sample_size"],
        "patch_size": 1,
        "base_channels": base,
        "channel_mult": tuple(width // base for width in widths),
        "layers_per_block": values["layers_per_block"],
        "time_emb_dim": 4 * widths[0] if values["time_embedding_dim"] is None else values["time_embedding_dim"],
        "attention_levels": tuple(down),
        **({} if heads is None else {"attention_heads": heads}),
        "unet_details": UNetDetails(**details).texts(),
        "dropout": values["dropout"],
        "activation": "silu" if values["act_fn"] == "swish" else values["act_fn"],
        "class_cond": values["num_class_embeds"] is not None,
    }
    return options, channels, values["num_class_embeds"] or 0


def _attention_details(values: Mapping, widths: Sequence[int], down: Sequence[int], up: Sequence[int]) -> dict:
    """The details about attention that the options cannot say, and attention_heads where they can."""
    details, middle, width = {}, bool(values["add_attention"]), values["attention_head_dim"]
    if set(up) != set(down):
        details["up_attention_levels"] = tuple(up)
    if middle != bool(down):
        details["add_attention"] = middle
    attending = {*down, *up, *([len(widths) - 1] if middle else [])}
    fits = width and all(widths[level] % width == 0 for level in (*attending, len(widths) - 1))
    if fits and down and widths[-1] // width <= MAX_HEADS:
        details["attention_heads"] = widths[-1] // width
    elif attending:
        details["attention_head_dim"] = width or 0
    groups = values["attn_norm_num_groups"]
    if groups is None:
        groups = values["norm_num_groups"] if values["resnet_time_scale_shift"] == "default" else 0
    if middle and groups != values["norm_num_groups"]:
        details["attn_norm_num_groups"] = groups
    return details


def _levels(types: Sequence[str], resampling: str, known: tuple[str, str, str]) -> tuple[list[int], list[int]]:
    """The levels with attention, and those that a residual block halves or doubles.   types: the finest level first."""
    types = [name.removeprefix("UNetRes") for name in types]
    if unknown := [name for name in types if name not in known]:
        raise ValueError(f"it has a block of type {shown(unknown[0])}; {', '.join(known)} can be read")
    attending = [level for level, name in enumerate(types) if name == known[1]]
    resnets = [level for level, name in enumerate(types) if name == known[2]]
    return attending, sorted([*resnets, *(attending if resampling == "resnet" else [])])


def _block_types(widths: Sequence[int], attending: Sequence[int], resnets: Sequence[int], *names: str) -> list[str]:
    """The type of each level, the finest first.   names: plain, with attention, resampled by a residual block."""
    return [
        names[1] if level in attending else names[2] if level in resnets else names[0] for level in range(len(widths))
    ]


def _resampling(attending: Sequence[int], resnets: Sequence[int]) -> str:
    """UNet2DModel has one downsample_type for all levels with attention, and one upsample_type."""
    kinds = {level in resnets for level in attending}
    if len(kinds) > 1:
        raise OptionError(
            "--unet_details: the levels with attention are resampled in two ways, and UNet2DModel has one for all."
        )
    return "resnet" if kinds == {True} else "conv"


def _refuse_odd_levels(sides: Sequence[int], levels: int) -> None:
    """UNet2DModel doubles a level, so each but the coarsest must have an even number of pixels."""
    for level in range(levels - 1):
        if odd := [side for side in sides if side >> level & 1]:
            raise OptionError(
                f"UNet2DModel cannot express this network: its level {level} is {odd[0] >> level} pixels wide, an odd "
                "number, and is halved. Train with fewer --channel_mult, or another --image_size or --patch_size."
            )


def _widths(config) -> list[int]:
    return network_shape.level_widths(config.base_channels, config.channel_mult)


def shown(value: object) -> str:
    """A value of a file in a message."""
    return printable(str(value), 60)
