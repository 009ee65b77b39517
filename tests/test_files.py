"""What killed writers leave is cleared by the next command that writes there; earlier results stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_diffusion.files import _computer, check_writable, clear_partials, keep_earlier, partial_path

KILLED = """
import os, signal, sys
from pathlib import Path
from tiny_diffusion.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
ROOT = Path(__file__).parent.parent
not_on_windows = pytest.mark.skipif(os.name == "nt", reason="there nothing tells whether a process is alive")


def left_by_a_killed_writer(path):
    """The temporary file of a process that was killed while it wrote the path."""
    before = {*path.parent.glob(".*")} if path.parent.exists() else set()
    subprocess.run([sys.executable, "-c", KILLED, path], env={**os.environ, "PYTHONPATH": str(ROOT)})
    (left,) = {*path.parent.glob(".*")} - before
    return left


@not_on_windows
def test_files_of_killed_writers_are_cleared_and_no_others(tmp_path):
    dead = left_by_a_killed_writer(tmp_path / "a b\n.png")
    living = partial_path(tmp_path / "x.png")  # of this process
    elsewhere = dead.with_name(dead.name.replace(_computer(), "0000" if _computer() != "0000" else "1111"))
    kept = [living, elsewhere, tmp_path / ".x.png.part", tmp_path / ".x.png.12-a.part", tmp_path / "x.part"]
    for path in kept:
        path.touch()
    clear_partials(tmp_path)
    assert {*tmp_path.iterdir()} == {*kept}


@not_on_windows
@pytest.mark.parametrize("folder", [False, True])
def test_the_check_before_the_work_clears_up(folder, tmp_path):
    left = left_by_a_killed_writer(tmp_path / "out" / "x.png")
    check_writable("output", tmp_path / "out" if folder else tmp_path / "out" / "other.png", folder)
    assert not left.exists() and [*(tmp_path / "out").iterdir()] == []


@not_on_windows
@pytest.mark.slow
def test_sample_and_evaluate_and_classifier_clear_up(cli, trained, tmp_path):
    model = ["--checkpoint", trained / "model_final.pt", "--num_images", 2, "--steps", 1]
    commands = [
        ("out/x.png", ["sample", *model, "--output", "out/y.png"]),
        ("intermediate/step_0001.png", ["sample", *model, "--output", "out/", "--show_intermediate"]),
        ("out/evaluation.json", ["evaluate", *model, "--features", "pixels", "--output", "out"]),
        ("out/c.safetensors", ["classifier", "--dataset", "digits", "--epochs", 1, "--output", "out/c.safetensors"]),
    ]
    for path, command in commands:
        left = left_by_a_killed_writer(tmp_path / path)
        cli.works(*command)
        assert not left.exists() and not [*tmp_path.rglob("*.part")]


def test_an_earlier_file_keeps_its_contents_under_another_name(tmp_path):
    path = tmp_path / "a.b.json"
    assert keep_earlier(path) is None
    for number in range(1, 4):
        path.write_text(str(number))
        assert keep_earlier(path) == tmp_path / f"a.b-{number}.json" and not path.exists()
    assert [(tmp_path / f"a.b-{number}.json").read_text() for number in range(1, 4)] == ["1", "2", "3"]
