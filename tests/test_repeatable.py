"""What is drawn depends on the checkpoint, the seed and the index, and on nothing else: commands as they are typed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import contents
from warm_process import ONE_THREAD

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_same_command_in_another_process_writes_the_same_bytes(loud, tmp_path):
    drawn = []
    for place in ("one", "other"):
        command = [sys.executable, ROOT / "sample.py", "--checkpoint", loud, "--num_images", "9", "--show_intermediate"]
        # A text's hash, and so the order of a set of texts, differs from process to process.
        env = {**os.environ, **ONE_THREAD, "PYTHONHASHSEED": str(len(drawn) + 1)}
        subprocess.run([*command, "--output", tmp_path / place / "x.png"], check=True, capture_output=True, env=env)
        drawn.append(contents(tmp_path / place))
    assert drawn[0] == drawn[1] and len(drawn[0]) > 10


def test_image_seven_is_the_same_alone_and_among_64_within_a_grey_level(cli, loud):
    draw = ["sample", "--checkpoint", loud, "--seed", 5]
    cli.works(*draw, "--num_images", 64, "--output", "all.npz")
    cli.works(*draw, "--indices", 7, "--output", "one.npz")
    together, alone = (np.load(name)["arr_0"].astype(int) for name in ("all.npz", "one.npz"))
    assert together.shape[0] == 64 and alone.shape[0] == 1
    assert np.abs(alone[0] - together[7]).max() <= 1
    assert np.abs(alone[0] - together[8]).max() > 50
