"""Runs that are killed, at any moment: what was saved is whole, and going on from it ends where the others end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from run_helpers import OFTEN, RUN, assert_ended_as, files_in, log_of
from warm_process import ONE_THREAD

from tiny_diffusion.runs.checkpoint import load_checkpoint
from tiny_diffusion.runs.folder import RunFolder
from tiny_diffusion.runs.lock import NAME

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", "8"))  # at random times; the k-th is of seed k


def assert_little_is_lost(folder):
    """Every checkpoint is whole, and the newest is at most one logged step behind.  Returns whether there is one."""
    for path in folder.rglob("[!.]*.pt"):
        load_checkpoint(path)
    newest, logged = RunFolder(folder).newest(), len(log_of(folder))
    assert (newest[1].about["step"] if newest else 0) >= logged - 1
    return newest is not None


def ends_as(whole, folder, warm):
    """Goes on to the end, or begins again where nothing had been saved."""
    way = "--resume" if assert_little_is_lost(folder) else "--overwrite"
    code, said = warm.run(*RUN, way, "--output_dir", folder, faults=OFTEN)
    assert code == 0, said
    assert_ended_as(folder, whole)
    got, wanted = (load_checkpoint(each / "model_final.pt").about for each in (folder, whole))
    assert got["heldout_history"] == wanted["heldout_history"]


def kill_after(lines, seconds, running, folder, warm):
    """So long after the log has so many lines: time by itself would mean little on a busy machine.  Its exit code."""
    log = folder / "log.jsonl"
    try:
        for _ in range(30_000):
            logged = log.read_bytes().count(b"\n") if log.exists() else 0
            if logged >= lines or any(end in running.said() for end in ("finished after", "error")):
                break
            time.sleep(0.002)
        time.sleep(seconds)
    finally:
        code = warm.kill(running)
    return code


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_that_is_killed_at_any_time_goes_on_to_the_same_end(number, whole, warm, tmp_path):
    """On a slow disk most of the time is spent in saves, so that most of those kills fall into one."""
    random = np.random.default_rng(number)
    disk = (("slow_disk", 0.01),) if number % 2 else ()
    running = warm.start(*RUN, "--output_dir", tmp_path / "run", faults=(*OFTEN, *disk))
    kill_after(random.integers(0, 10), random.uniform(0, 0.1), running, tmp_path / "run", warm)
    ends_as(whole, tmp_path / "run", warm)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_the_same(whole, warm, tmp_path):
    """It gets a little further each time."""
    random, folder, faults = np.random.default_rng(1), tmp_path / "run", (*OFTEN, ("slow_disk", 0.005))
    kills = 0
    for lines in (1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 99):
        way = "--resume" if assert_little_is_lost(folder) else "--overwrite"
        running = warm.start(*RUN, way, "--output_dir", folder, faults=faults)
        kills += kill_after(lines, random.uniform(0, 0.03), running, folder, warm) == -signal.SIGKILL
    assert kills >= 5
    assert_ended_as(folder, whole)


MOMENTS = 100  # in the life of such a run; a run that is not killed, because it had fewer, fails the test


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, MOMENTS, 11))  # a step of the run has about ten, and each has its turn
def test_a_run_that_is_killed_at_any_step_of_a_save_goes_on_to_the_same_end(moment, whole, warm, tmp_path):
    """Half-written, written and not on the disk, on the disk and not renamed, renamed, before and after a deletion."""
    folder = tmp_path / "run"
    code, said = warm.run(*RUN, "--output_dir", folder, faults=(*OFTEN, ("killed_at", moment)))
    assert code == -signal.SIGKILL, said[-300:]
    ends_as(whole, folder, warm)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, 12, 3))
def test_a_run_that_is_killed_while_it_deletes_an_earlier_one_deletes_it_the_next_time(moment, warm, tmp_path):
    folder = tmp_path / "run"
    short = [*RUN, "--max_steps", 4, "--output_dir", folder]
    assert warm.run(*short, faults=OFTEN)[0] == 0
    (folder / "notes.txt").write_text("mine")
    code, said = warm.run(*short, "--overwrite", faults=(*OFTEN, ("killed_at", moment)))
    assert code == -signal.SIGKILL, said[-300:]
    assert (folder / "notes.txt").read_text() == "mine"
    assert warm.run(*short, "--overwrite", faults=OFTEN)[0] == 0
    assert load_checkpoint(folder / "model_final.pt").about["step"] == 4 and len(log_of(folder)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["checkpoints/model_epoch_001.pt", "model_final.pt"])
def test_a_command_as_typed_that_is_killed_goes_on_to_the_same_end(sign, warm, tmp_path):
    """A process of its own, with plots, killed as soon as a certain file is there."""
    command = [sys.executable, ROOT / "train.py", *map(str, RUN[1:]), "--output_dir"]
    options = {"env": {**os.environ, **ONE_THREAD}, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, tmp_path / "run"], **options)
    try:
        for _ in range(12_000):
            if (tmp_path / "run" / sign).exists() or process.poll() is not None:
                break
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "run" / sign).exists()
    code, said = warm.run(*RUN, "--output_dir", tmp_path / "run", "--resume")
    assert code == 0, said
    code, said = warm.run(*RUN, "--output_dir", tmp_path / "whole")
    assert code == 0, said
    if sign == "model_final.pt":  # killed after its end, before it had tidied up
        assert {NAME, "checkpoints/latest.pt"} >= files_in(tmp_path / "run") - files_in(tmp_path / "whole")
    else:
        assert_ended_as(tmp_path / "run", tmp_path / "whole")
