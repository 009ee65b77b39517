"""Details of a network that its other options leave open: the choices of diffusers' UNet2DModel, in its own words.

Networks trained here leave them all as they are.  Models made elsewhere set some when they are loaded, and
`--unet_details` sets them by hand.  To add one: a field in UNetDetails, a row in TYPES, its use in models/unet.py and
its translation in config/unet2d.py.  No torch here.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiny_diffusion.config.option import Choice, Int, ListOf, Number, Text, Type
from tiny_diffusion.errors import not_one_of


@dataclass(frozen=True)
class UNetDetails:
    """Each field is what UNet2DModel means by that name; its default is what networks of this program have.

    norm_num_groups          None: as many as network_shape.norm_groups says
    attn_norm_num_groups     of the attention in the middle.  None: as everywhere else; 0: no norm there
    attention_head_dim       channels of a head.  None: as attention_heads says; 0: one head as wide as its level
    add_attention            whether the middle has attention.  None: if a level has it
    up_attention_levels      levels with attention on the way up.  None: those of attention_levels
    resnet_down_levels, resnet_up_levels   levels that a residual block halves or doubles, not a convolution
    downsample_padding       0 pads at the bottom and on the right only
    """

    norm_num_groups: int | None = None
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "scale_shift"
    attention_head_dim: int | None = None
    add_attention: bool | None = None
    up_attention_levels: tuple[int, ...] | None = None
    resnet_down_levels: tuple[int, ...] = ()
    resnet_up_levels: tuple[int, ...] = ()
    downsample_padding: int = 1
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0

    @classmethod
    def of(cls, texts: Iterable[str]) -> "UNetDetails":
        """The details of texts such as norm_eps=1e-6.  Raises ValueError saying what is wrong with one."""
        values = {}
        for text in texts:
            name, equals, value = text.partition("=")
            if name not in TYPES or not equals:
                raise ValueError(not_one_of(name, TYPES) if equals else f"{text!r} is not NAME=VALUE")
            if name in values:
                raise ValueError(f"{name} is given twice")
            try:
                values[name] = TYPES[name].read(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return cls(**values)

    def texts(self) -> tuple[str, ...]:
        """The inverse of `of`: those that are not the default."""
        return tuple(
            f"{field.name}={TYPES[field.name].show(value)}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        )

    def up_levels(self, attention_levels: Sequence[int]) -> tuple[int, ...]:
        """The levels with attention on the way up, of a network with these on the way down."""
        return tuple(attention_levels) if self.up_attention_levels is None else self.up_attention_levels

    def attends_in_the_middle(self, attention_levels: Sequence[int]) -> bool:
        return bool(attention_levels) if self.add_attention is None else self.add_attention


@dataclass(frozen=True)
class DetailList(ListOf):
    """Details as NAME=VALUE between commas; `none` for an empty list."""

    item: Type = Text("NAME=VALUE")
    longest: int = len(dataclasses.fields(UNetDetails))

    def check(self, value):
        if wrong := super().check(value):
            return wrong
        try:
            UNetDetails.of(value)
        except ValueError as error:
            return str(error)
        return None


class _Switch(Type):
    """true or false."""

    def parse(self, text):
        return {"true": True, "false": False}.get(text, text)

    def check(self, value):
        return None if isinstance(value, bool) else f"{value!r} is not true or false"

    def show(self, value):
        return str(value).lower()


class _Levels(Type):
    """Levels of the network, 0 being the finest, as 0+1; `none` for no level."""

    def parse(self, text):
        try:
            return () if text == "none" else tuple(sorted({int(level) for level in text.split("+")}))
        except ValueError:
            raise ValueError(f"{text!r} is not a list of levels such as 0+1, or none") from None

    def check(self, value):
        return next(filter(None, map(Int(0, 7).check, value)), None)

    def show(self, value):
        return "+".join(map(str, value)) or "none"


TYPES = {
    "norm_num_groups": Int(1, 4096),
    "attn_norm_num_groups": Int(0, 4096),
    "norm_eps": Number(0, 1, open_low=True),
    "resnet_time_scale_shift": Choice(("scale_shift", "default")),
    "attention_head_dim": Int(0, 8192),
    "add_attention": _Switch(),
    "up_attention_levels": _Levels(),
    "resnet_down_levels": _Levels(),
    "resnet_up_levels": _Levels(),
    "downsample_padding": Int(0, 1),
    "flip_sin_to_cos": _Switch(),
    "freq_shift": Number(-8, 8),
}
