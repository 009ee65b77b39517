"""The examples run as they stand, in a short form."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
def test_from_scratch_learns_and_writes_a_picture_of_64_digits(tmp_path, monkeypatch):
    """A network that predicts no noise at all has a loss of 1."""
    monkeypatch.setattr(sys, "argv", ["from_scratch.py", "--steps", "100", "--output", str(tmp_path / "digits.png")])
    names = runpy.run_path(str(EXAMPLES / "from_scratch.py"), run_name="__main__")
    assert names["loss"].item() < 0.6
    assert names["sample"].x.shape == (64, 1, 8, 8)
    picture = np.asarray(Image.open(tmp_path / "digits.png"))
    assert picture.shape[0] == picture.shape[1] and picture.std() > 20
