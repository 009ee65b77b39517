"""The folder of a run: where files lie, what a resume keeps of them, and which checkpoint it goes on from."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from run_helpers import RUN

from tiny_diffusion.config.training import resolve
from tiny_diffusion.errors import FileError
from tiny_diffusion.files import write_text
from tiny_diffusion.runs.checkpoint import save_checkpoint
from tiny_diffusion.runs.folder import RunFolder

ABOUT = {
    "config": resolve({"dataset": "digits", "base_channels": 8}).to_dict(),
    "elapsed_seconds": 1.5,
    "loss_history": [],
    "heldout_history": [],
    "best_score": None,
    "class_names": list("0123456789"),
    "image_size": [8, 8],
    "channels": 1,
    "background": None,
    "sampling": {"sampler": "ddim", "steps": 20, "grid": "trailing", "guidance": 1.0, "clip": True},
    "stretch": [0, 0.0],
    "versions": {},
}


def save(path, step, finished=False):
    save_checkpoint(path, {**ABOUT, "step": step, "finished": finished}, {"model/weight": torch.ones(2)})


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def reopened(folder, from_step=0):
    folder.close()
    again = RunFolder(folder.path)
    again.open(from_step)
    return again


def logged(folder):
    """The log's lines, by a reader that knows no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    folder.flush()
    return [json.loads(line, parse_constant=refuse) for line in folder.log_path.read_text("utf-8").splitlines()]


# Where files lie


def test_files_lie_where_the_contract_says(tmp_path):
    folder = RunFolder(str(tmp_path))
    assert folder.final == tmp_path / "model_final.pt"
    assert folder.log_path == tmp_path / "log.jsonl"
    assert folder.loss_plot == tmp_path / "training_loss.png"
    assert folder.latest == tmp_path / "checkpoints" / "latest.pt"
    for epoch, text in ((1, "001"), (20, "020"), (999, "999"), (1000, "1000")):
        assert folder.epoch_checkpoint(epoch) == tmp_path / "checkpoints" / f"model_epoch_{text}.pt"
        assert folder.sample_picture(epoch) == tmp_path / "samples" / f"epoch_{text}.png"


def test_nothing_is_made_before_the_folder_is_opened(folder):
    assert not folder.holds_a_run() and folder.newest() is None
    folder.clear()
    folder.flush()
    folder.close()
    assert not folder.path.exists()
    folder.open()
    assert folder.checkpoints.is_dir() and (folder.path / "samples").is_dir() and folder.log_path.read_text() == ""


def test_the_file_of_a_lock_is_no_run_and_is_not_cleared(folder):
    touch(folder, ".lock")
    assert not folder.holds_a_run()
    folder.clear()
    assert files_of(folder.path) == {".lock"}


WRITTEN = ["model_final.pt", "log.jsonl", "checkpoints/latest.pt", "checkpoints/model_epoch_005.pt"]
PICTURES = ["samples/epoch_001.png", "samples/epoch_1000.png", "training_loss.png", "latest.png"]
NOT_OURS = [
    "notes.txt", "generated_samples.png", "intermediate/step_0000.png", "checkpoints/mine.pt", "samples/mine.png",
    "other.pt", "checkpoints/model_epoch_005.pt.bak",
]  # fmt: skip


def touch(folder, *names):
    for name in names:
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_text("x")


@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_with_a_log_or_a_checkpoint_holds_a_run(name, folder):
    touch(folder, name)
    assert folder.holds_a_run()


def test_a_folder_with_other_files_holds_no_run(folder):
    touch(folder, *NOT_OURS)
    assert not folder.holds_a_run()


def test_clearing_deletes_what_a_run_writes_and_nothing_else(folder):
    touch(folder, *WRITTEN, *PICTURES, *NOT_OURS)
    folder.clear()
    assert files_of(folder.path) == set(NOT_OURS)
    assert not folder.holds_a_run()


def test_opening_sweeps_up_what_interrupted_saves_left(folder):
    touch(
        folder,
        ".model_final.pt.12-a.part",
        "checkpoints/.latest.pt.7-a.part",
        "checkpoints/.model_epoch_005.pt.7-a.part",
    )
    touch(folder, ".training_loss.png.12-a.part", "samples/.epoch_005.png.7-a.part", ".log.jsonl.12-a.part")
    others = "checkpoints/.mine", "mine.part", ".generated_samples.png.9-a.part", "samples/.mine.png.9-a.part"
    touch(folder, *others)
    folder.open()
    assert files_of(folder.path) == {"log.jsonl", *others}


@pytest.mark.parametrize("place", ["file", "file/run", "file/a/run"])
def test_a_folder_that_cannot_be_made_is_refused_by_name(place, tmp_path):
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / place)
    assert not folder.holds_a_run() and folder.newest() is None
    with pytest.raises(FileError, match="cannot be written") as refused:
        folder.open()
    assert f"--output_dir {tmp_path / place}" in str(refused.value) and "\n" not in str(refused.value)


def test_a_log_that_is_a_folder_is_refused_by_name(folder):
    folder.log_path.mkdir(parents=True)
    with pytest.raises(FileError, match="cannot be written"):
        folder.open(3)


# The log


def write_steps(folder, first, last):
    for step in range(first, last + 1):
        folder.log(step=step, epoch=step / 10, loss=1 / step, grad_norm=0.5, lr=1e-3)


def test_a_line_of_the_log_is_what_was_logged(folder):
    folder.open()
    folder.log(step=1, loss=0.1 + 0.2, lr=1e-300, text="ü")
    assert logged(folder) == [{"step": 1, "loss": 0.1 + 0.2, "lr": 1e-300, "text": "ü"}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_the_log_and_nan_in_the_losses(value, folder):
    folder.open()
    folder.log(step=1, loss=value, grad_norm=value)
    folder.log(step=2, loss=0.5, grad_norm=1.0)
    assert logged(folder)[0] == {"step": 1, "loss": None, "grad_norm": None}
    for each in (folder, reopened(folder, 2)):
        steps, losses = each.losses()
        assert steps == [1, 2] and math.isnan(losses[0]) and losses[1] == 0.5


def test_closing_writes_the_last_line_out(folder):
    folder.open()
    write_steps(folder, 1, 3)
    folder.close()
    assert [json.loads(line)["step"] for line in folder.log_path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("from_step", [0, 1, 6, 9, 10, 50])
def test_opening_cuts_the_log_back_to_the_step_that_the_run_goes_on_from(from_step, folder):
    folder.open()
    write_steps(folder, 1, 10)
    before = logged(folder)
    again = reopened(folder, from_step)
    assert logged(again) == before[:from_step]
    assert again.losses() == ([line["step"] for line in before[:from_step]], [1 / s for s in range(1, 11)][:from_step])
    write_steps(again, from_step + 1, 60)
    assert [line["step"] for line in logged(again)] == [*range(1, min(from_step, 10) + 1), *range(from_step + 1, 61)]


BROKEN_ENDS = ['{"step": 4, "lo', '{"step"', "{", "\0\0\0", "\udcff", '{"step": "4"}', "[4]", "4", "null", "", "{}"]


@pytest.mark.parametrize("end", BROKEN_ENDS)
def test_a_line_that_a_kill_left_half_written_is_dropped(end, folder):
    folder.open()
    write_steps(folder, 1, 3)
    before = logged(folder)
    folder.close()
    with open(folder.log_path, "ab") as file:
        file.write(end.encode("utf-8", "surrogateescape"))
    again = reopened(folder, 5)
    write_steps(again, 4, 4)
    assert logged(again)[:3] == before
    assert [line["step"] for line in logged(again)] == [1, 2, 3, 4]


def test_an_interrupted_cut_leaves_the_whole_log(folder, monkeypatch):
    folder.open()
    write_steps(folder, 1, 10)
    folder.close()
    before = folder.log_path.read_bytes()

    def fail(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(FileError, match="No space"):
        RunFolder(folder.path).open(5)
    assert folder.log_path.read_bytes() == before


# The newest checkpoint


def test_an_empty_folder_has_no_newest_checkpoint(folder):
    folder.open()
    assert folder.newest() is None


@pytest.mark.parametrize("order", ["as written", "backwards", "all at once"])
def test_the_newest_checkpoint_is_the_one_that_went_furthest_whatever_the_clock_says(order, folder):
    """Copying a folder gives its files new times, in any order."""
    for epoch in range(1, 13):
        save(folder.epoch_checkpoint(epoch), 10 * epoch)
    save(folder.latest, 115)
    for age, path in enumerate(sorted(folder.checkpoints.iterdir())):
        when = 1e9 + {"as written": age, "backwards": -age, "all at once": 0}[order]
        os.utime(path, (when, when))
    path, checkpoint = folder.newest()
    assert (path, checkpoint.about["step"]) == (folder.epoch_checkpoint(12), 120)
    save(folder.latest, 125)
    os.utime(folder.latest, (1, 1))
    assert folder.newest()[0] == folder.latest
    save(folder.final, 130)
    os.utime(folder.final, (1, 1))
    assert folder.newest()[0] == folder.final


def test_of_two_that_went_equally_far_the_final_one_is_the_newest(folder):
    save(folder.final, 20, finished=True)
    save(folder.epoch_checkpoint(2), 20)
    save(folder.latest, 20)
    path, checkpoint = folder.newest()
    assert path == folder.final and checkpoint.about["finished"]


def test_epoch_1000_is_newer_than_epoch_999(folder):
    for epoch in (9, 998, 999, 1000, 1001):
        save(folder.epoch_checkpoint(epoch), epoch)
    assert folder.newest()[1].about["step"] == 1001


@pytest.mark.parametrize("damaged", range(1, 8))
def test_damaged_checkpoints_are_passed_over_however_many(damaged, folder):
    for epoch in range(1, 9):
        save(folder.epoch_checkpoint(epoch), epoch)
    save(folder.latest, 100)
    damage(folder.latest)
    for epoch in range(8, 8 - damaged, -1):
        damage(folder.epoch_checkpoint(epoch))
    assert folder.newest()[0] == folder.epoch_checkpoint(8 - damaged)


def test_damaged_checkpoints_alone_are_an_error_that_names_one(folder):
    for path in (folder.latest, folder.epoch_checkpoint(1)):
        save(path, 1)
        damage(path)
    with pytest.raises(FileError, match=r"latest\.pt"):
        folder.newest()


# Pruning


@pytest.mark.parametrize("keep", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("epochs", [[5, 10, 15, 20, 25], [997, 998, 999, 1000, 1001]])
def test_pruning_keeps_the_last_epochs(epochs, keep, folder):
    touch(folder, *WRITTEN[:3], *NOT_OURS)
    others = files_of(folder.path)
    for epoch in epochs:
        save(folder.epoch_checkpoint(epoch), epoch)
    folder.prune(keep, folder.epoch_checkpoint(epochs[-1]))
    left = {f"checkpoints/{folder.epoch_checkpoint(epoch).name}" for epoch in epochs[-keep:]}
    assert files_of(folder.path) == others | left


def test_without_a_number_nothing_is_pruned(folder):
    touch(folder, *WRITTEN)
    folder.prune(None, folder.epoch_checkpoint(5))
    assert files_of(folder.path) == set(WRITTEN)


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_pruning_never_deletes_the_last_good_one_for_later_ones_that_are_damaged(keep, folder):
    """A run goes back to the newest readable checkpoint, and saves; beyond it still lie those that it passed over."""
    for epoch in range(1, 7):
        save(folder.epoch_checkpoint(epoch), epoch)
    damage(folder.epoch_checkpoint(5))
    damage(folder.epoch_checkpoint(6))
    save(folder.epoch_checkpoint(4), 4)
    folder.prune(keep, folder.epoch_checkpoint(4))
    assert folder.newest()[0] == folder.epoch_checkpoint(4)
    kept = {path.name for path in folder.checkpoints.iterdir()}
    assert kept == {folder.epoch_checkpoint(epoch).name for epoch in range(max(1, 5 - keep), 7)}


def remove_nested(depth):
    """pytest's own clearing calls itself for each folder."""
    for _ in range(depth):
        os.chdir("a")
    shutil.rmtree(".", ignore_errors=True)
    for _ in range(depth):
        os.chdir("..")
        os.rmdir("a")


def test_a_folder_of_any_depth_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    deep = Path("/".join(["a"] * 1700))
    write_text(deep / "text", "here")
    assert (deep / "text").read_text() == "here"
    remove_nested(1700)


@pytest.mark.slow
def test_a_run_is_written_to_a_folder_of_any_depth_that_a_path_can_have(cli, tmp_path):
    deep = "/".join(["a"] * 1900)
    cli.works(*RUN, "--max_steps", 1, "--output_dir", deep)
    assert "this run has reached" in cli.works("train", "--resume", "--max_steps", 1, "--output_dir", deep).err
    assert os.path.isfile(f"{deep}/model_final.pt")
    cli.refuses(1, [*RUN, "--output_dir", "/".join(["a"] * 2100)], "--output_dir a/a", "too long")
    remove_nested(1900)
