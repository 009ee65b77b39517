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


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last_and_shows_pictures(tmp_path, monkeypatch):
    """In a kernel of its own, with one epoch of training."""
    nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbclient and ipykernel: requirements-dev.txt")
    nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbclient and ipykernel: requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="the notebook needs nbclient and ipykernel: requirements-dev.txt")
    monkeypatch.setenv("TOUR_EPOCHS", "1")
    monkeypatch.setenv("TOUR_IMAGES", "20")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    assert "relative_frechet_distance" in "".join(output.get("text", "") for output in outputs)
