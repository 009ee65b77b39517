"""What ends a run before its end: signals, a full disk, a folder that cannot be written, weights that overflow.

Each time: the exit code of the contract, one line, and the last good checkpoint as it was.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_helpers import change_tensors, contents
from run_helpers import OFTEN, RUN, SMALL, assert_ended_as, files_in
from warm_process import ONE_THREAD

from tiny_diffusion.runs import session
from tiny_diffusion.runs.checkpoint import load_checkpoint
from tiny_diffusion.runs.folder import RunFolder

ROOT = Path(__file__).parent.parent
LATEST = Path("checkpoints") / "latest.pt"


@pytest.fixture(scope="module")
def begun(warm, tmp_path_factory):
    """A run that was stopped at step 4 of 9, in its second epoch."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    code, said = warm.run(*RUN, "--max_steps", 4, "--output_dir", folder, faults=OFTEN)
    assert code == 0, said
    return folder


@pytest.fixture
def run(begun, tmp_path):
    """A copy of it, to go on with."""
    return Path(shutil.copytree(begun, tmp_path / "run"))


def last_line(said):
    assert "Traceback" not in said and "Warning" not in said, said
    return said.splitlines()[-1]


def goes_on_to_the_end(folder, whole, warm):
    code, said = warm.run(*RUN, "--resume", "--output_dir", folder, faults=OFTEN)
    assert code == 0, said
    assert_ended_as(folder, whole)


def press_until_it_ends(running):
    """Ctrl-C again and again: two that come too close are one."""
    for _ in range(600):
        if "interrupted" in running.said():
            return
        running.kill(signal.SIGINT)
        time.sleep(0.1)
    raise AssertionError(f"it goes on: {running.said()}")


# Signals.  tests/test_resume.py has those to a command as typed


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_is_granted_after_the_step_and_the_save(number, code, run, whole, warm):
    running = warm.start(*RUN, "--resume", "--output_dir", run, faults=(("no_plots",), ("step_until_signal", 6)))
    running.until_it_says("slow")
    running.kill(number)
    assert warm.wait(running) == code
    assert f"stopped by {number.name} at step 6; saved {run / LATEST}" in last_line(running.said())
    assert load_checkpoint(run / LATEST).about["step"] == 6
    goes_on_to_the_end(run, whole, warm)


def test_a_second_ctrl_c_ends_the_run_at_once(run, whole, warm):
    """In the middle of a step that would take ten minutes."""
    before = (run / "model_final.pt").read_bytes()
    running = warm.start(*RUN, "--resume", "--output_dir", run, faults=(("no_plots",), ("slow_step", 6, 600)))
    running.until_it_says("slow")
    press_until_it_ends(running)
    assert warm.wait(running) == 130
    assert last_line(running.said()) == "tiny_diffusion train: error: interrupted"
    assert (run / "model_final.pt").read_bytes() == before and not (run / LATEST).exists()
    goes_on_to_the_end(run, whole, warm)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_save_of_the_first_and_leaves_nothing_of_it(run, whole, warm):
    faults = (("no_plots",), ("step_until_signal", 6), ("slow_disk", 600))
    running = warm.start(*RUN, "--resume", "--output_dir", run, faults=faults)
    running.until_it_says("slow")
    running.kill(signal.SIGINT)
    running.until_it_says("disk")
    press_until_it_ends(running)
    assert warm.wait(running) == 130
    assert last_line(running.said()) == "tiny_diffusion train: error: interrupted"
    assert not (run / LATEST).exists() and not [name for name in files_in(run) if name.endswith(".part")]
    goes_on_to_the_end(run, whole, warm)


# Disks


def assert_refused_and_whole(code, said, run, good):
    line = last_line(said)
    assert code == 1 and ": error: " in line and str(run) in line and len(line) < 400, said
    assert (run / "model_final.pt").read_bytes() == good or load_checkpoint(run / "model_final.pt")
    for path in run.rglob("[!.]*.pt"):
        load_checkpoint(path)
    assert not [name for name in files_in(run) if name.endswith((".part", ".tmp", ".lock"))]
    return line


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, 48, 7))
def test_a_disk_that_fills_up_at_any_moment_costs_no_checkpoint(moment, run, whole, warm):
    """In the log, in the first half of a save, in flushing it, in renaming it, in a picture."""
    good = (run / "model_final.pt").read_bytes()
    faults = (*OFTEN, ("full_disk_from", moment))
    code, said = warm.run(*RUN, "--resume", "--output_dir", run, faults=faults)
    if code == 0:  # nothing but pictures was left to write
        assert "is not drawn: " in said and load_checkpoint(run / "model_final.pt").about["finished"]
        return
    assert "No space left on device" in assert_refused_and_whole(code, said, run, good)
    goes_on_to_the_end(run, whole, warm)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2000, 10_000, 50_000])  # less, and what the process says cannot be kept either
def test_files_that_may_not_grow_cost_no_checkpoint(size, run, whole, warm):
    """The system refuses to write beyond a size: the log first, the pictures, or the checkpoint, which is largest."""
    assert (run / "model_final.pt").stat().st_size > 50_000
    good = (run / "model_final.pt").read_bytes()
    code, said = warm.run(*RUN, "--resume", "--output_dir", run, faults=(*OFTEN, ("file_size_limit", size)))
    assert "File too large" in assert_refused_and_whole(code, said, run, good)
    goes_on_to_the_end(run, whole, warm)


@pytest.mark.slow
@pytest.mark.parametrize("room", [20, 90])  # kilobytes
def test_a_file_system_that_is_really_full_costs_no_checkpoint(room, begun, whole, tmp_path, warm):
    """A small one in memory, in a name space of its own: nobody else sees it, and it goes with the process."""
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*alone, "mount -t tmpfs none /mnt"], capture_output=True).returncode
    ):
        pytest.skip("cannot mount here")
    small, run = tmp_path / "small", tmp_path / "run"
    small.mkdir()
    train = " ".join(["train.py", *map(str, RUN[1:]), "--resume", "--output_dir", "$1/run"])
    kilobytes = room + sum(4 + path.stat().st_size // 1024 for path in begun.rglob("*"))
    mount = f'mount -t tmpfs -o size={kilobytes}k none "$1" && cp -r "$2" "$1/run"'
    script = f'{mount} && "$0" {train}; echo $?; cp -r "$1/run" "$3"'
    done = subprocess.run(
        [*alone, script, sys.executable, small, begun, run],
        cwd=ROOT, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "1\n", done
    assert f"{small}/run" in last_line(done.stderr) and "No space left on device" in last_line(done.stderr)
    assert (run / "model_final.pt").read_bytes() == (begun / "model_final.pt").read_bytes()
    assert not [name for name in files_in(run) if name.endswith((".part", ".tmp", ".lock"))]
    (run / "training_loss.png").unlink(missing_ok=True)  # which the others do without
    goes_on_to_the_end(run, whole, warm)


def test_a_log_that_cannot_be_written_ends_the_run_and_its_lock(cli, run, monkeypatch):
    def full(self, **values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", full)
        ended = cli(*RUN, "--resume", "--output_dir", run)
    assert ended.code == 1 and f"--output_dir {run} cannot be written: No space left" in last_line(ended.err)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    cli.works(*RUN, "--resume", "--max_steps", 5, "--output_dir", run)


READ_ONLY = {
    "a new run in it": (["--output_dir", "{run}/new"], 1),
    "a run over it": (["--overwrite", "--output_dir", "{run}"], 1),
    "its run resumed": (["--resume", "--output_dir", "{run}"], 1),
    "its run resumed, with nothing to do": (["--resume", "--max_steps", 2, "--output_dir", "{run}"], 0),
    "its options": (["--resume", "--dry_run", "--output_dir", "{run}"], 0),
}


@pytest.mark.skipif(not (sys.platform == "linux" or hasattr(os, "geteuid") and os.geteuid()), reason="as root")
@pytest.mark.parametrize("words, code", READ_ONLY.values(), ids=READ_ONLY)
def test_a_folder_that_may_only_be_read_is_left_as_it_is(words, code, run, warm):
    before = contents(run)
    folders = [run, *(path for path in run.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    argv = [str(word).format(run=run) for word in ("--dataset", "digits", *words)]
    try:
        got, said = warm.run("train", *argv, faults=(("no_plots",), ("no_privileges",)))
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert got == code, said
    assert code == 0 or "Permission denied" in last_line(said) and str(run) in last_line(said)
    assert contents(run) == before


# Divergence


@pytest.mark.slow
def test_weights_that_overflow_end_the_run_after_twenty_steps_and_what_was_saved_stays(cli, tmp_path):
    """No rate that --lr takes does this to a network of group norms; weights of 1e30 do, finite as they are."""
    argv = ["train", *SMALL, "--splits", "test", "--batch_size", 13, "--save_interval", 1, "--device", "cpu"]
    argv += ["--output_dir", "run"]
    cli.works(*argv, "--max_steps", 24)  # an epoch is 23 steps
    run = tmp_path / "run"
    (run / "model_final.pt").rename(run / LATEST)
    change_tensors(run / LATEST, run / LATEST, lambda name, value: value * 1e30 if name.startswith("model/") else value)
    before = {path: path.read_bytes() for path in run.rglob("*.pt")}
    ended = cli("train", "--resume", "--output_dir", "run")
    line = last_line(ended.err)
    assert ended.code == 1 and f"not finite for {session.MAX_SKIPPED} steps in a row" in line and "--lr" in line
    assert {path: path.read_bytes() for path in run.rglob("*.pt")} == before
    cli.works("sample", "--checkpoint", run / "checkpoints/model_epoch_001.pt", "--num_images", 1, "--steps", 2)
    cli.works("train", "--resume", run / "checkpoints/model_epoch_001.pt", "--max_steps", 24)


# What only shows


def test_a_picture_that_cannot_be_drawn_never_ends_a_run(cli, tmp_path, monkeypatch):
    """As where neither a home nor a temporary folder can be written: matplotlib then raises when it is imported."""

    def fail(*arguments, **options):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tiny_diffusion.visuals.loss_curve.save_loss_curve", fail)
    monkeypatch.setattr("tiny_diffusion.visuals.class_grid.save_grid", fail)
    ended = cli.works(*RUN, "--output_dir", "run")
    assert "training_loss.png is not drawn" in ended.err and "epoch_002.png is not drawn" in ended.err
    assert load_checkpoint(tmp_path / "run" / "model_final.pt").about["finished"]


def test_a_time_budget_without_a_single_step_is_refused_and_saves_nothing(cli, tmp_path):
    words = ["train", *SMALL, "--device", "cpu", "--minutes", 1e-6, "--output_dir", "run"]
    cli.refuses(2, words, "no time for a single step")
    assert not (tmp_path / "run" / "model_final.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2> >(head -1 >/dev/null)"])
def test_a_run_goes_on_when_nobody_reads_its_messages(stderr, tmp_path):
    """Standard error that is closed, on a full disk, or a pipe whose reader has gone."""
    words = " ".join(map(str, ["train.py", *RUN[1:], "--output_dir", tmp_path / "run"]))
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" {words} {stderr}'], cwd=ROOT, env={**os.environ, **ONE_THREAD}
    )
    assert done.returncode == 0
    assert load_checkpoint(tmp_path / "run" / "model_final.pt").about["finished"]
