"""Pixels: uint8 and floats in [-1, 1] are each other's inverse, and NaN never becomes a grey level."""

import pytest
import torch

from tiny_diffusion.data.pixels import to_float, to_pictures, to_uint8
from tiny_diffusion.errors import DivergenceError

EVERY_GREY = torch.arange(256, dtype=torch.uint8).reshape(2, 2, 8, 8)  # (N, C, H, W)


def test_the_ends_and_the_middle_of_the_range_become_0_128_and_255():
    x = torch.tensor([-2.0, -1, 0, 1, 2]).reshape(1, 1, 1, 5)
    assert to_uint8(x).flatten().tolist() == [0, 0, 128, 255, 255]


def test_infinity_is_clamped_like_any_other_value_outside():
    assert to_uint8(torch.tensor([-torch.inf, torch.inf]).reshape(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_every_grey_is_the_same_after_a_round_trip_through_floats():
    assert torch.equal(to_uint8(to_float(EVERY_GREY)), EVERY_GREY)
    assert to_float(EVERY_GREY).min() == -1 and to_float(EVERY_GREY).max() == 1


def test_the_scale_between_black_and_white_is_linear():
    greys = torch.arange(256, dtype=torch.uint8)
    values = to_float(greys)
    torch.testing.assert_close(values.double(), torch.linspace(-1, 1, 256, dtype=torch.float64), rtol=0, atol=1e-6)
    assert values.dtype == torch.float32 and torch.equal(greys, torch.arange(256, dtype=torch.uint8))


def test_pictures_are_the_same_greys_with_the_channels_last():
    assert (to_pictures(to_float(EVERY_GREY)) == EVERY_GREY.numpy().transpose(0, 2, 3, 1)).all()


def test_nan_is_refused_by_the_number_of_the_image():
    x = torch.zeros(4, 1, 2, 2)
    x[2, 0, 1, 1] = torch.nan
    with pytest.raises(DivergenceError, match="1 of 4 images contain NaN .the first is image 2"):
        to_uint8(x)
