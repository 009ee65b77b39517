"""One run a folder: a second one is refused while the first lives, and not a moment longer."""

import errno
import os
import shutil
import signal
import socket

import pytest
from cli_helpers import TINY, contents

from tiny_diffusion.errors import OptionError
from tiny_diffusion.runs import lock as run_lock
from tiny_diffusion.runs.lock import locked

RUN = ["train", *TINY, "--device", "cpu", "--num_samples", 1]
LONG = [*RUN, "--epochs", 1000]
HOLDING = (("no_plots",), ("slow_step", 2, 600))  # until it is killed, in its second step


@pytest.fixture(scope="module")
def busy(warm, tmp_path_factory):
    """(folder, process) of a run that has begun and does not end."""
    folder = tmp_path_factory.mktemp("busy") / "run"
    running = warm.start(*LONG, "--output_dir", folder, faults=HOLDING)
    try:
        running.until_it_says("slow")
        yield folder, running
    finally:
        warm.kill(running)


# Two runs


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(busy, cli):
    """A new run, --overwrite, --resume and --extend."""
    folder, running = busy
    before = contents(folder)
    message = f"--output_dir {folder} is being written by another run (process {running.pid}). "
    for words in (RUN, [*RUN, "--overwrite"], ["train", "--resume"], ["train", "--extend", "--epochs", 9]):
        cli.refuses(2, [*words, "--output_dir", folder], message, "name another folder")
        assert contents(folder) == before


def test_a_run_that_names_its_checkpoint_alone_is_refused_too(busy, cli, trained, monkeypatch):
    """The folder that it would go on in is known from the checkpoint, and by whatever name it is called."""
    folder, running = busy
    shutil.copy(trained / "model_final.pt", folder / "model_final.pt")
    cli.refuses(2, ["train", "--resume", folder / "model_final.pt", "--output_dir", f"{folder}/../run"], "another run")
    monkeypatch.chdir(folder)
    cli.refuses(2, ["train", "--resume", "model_final.pt", "--output_dir", "."], "--output_dir . is being written")


def test_a_dry_run_and_drawing_go_on_beside_a_run(busy, cli, trained):
    folder, running = busy
    shutil.copy(trained / "model_final.pt", folder / "checkpoints" / "model_epoch_001.pt")
    cli.works(*RUN, "--dry_run", "--output_dir", folder)
    cli.works("train", "--resume", "--dry_run", "--output_dir", folder)
    draw = ["sample", "--checkpoint", folder / "checkpoints/model_epoch_001.pt", "--num_images", 1, "--steps", 1]
    cli.works(*draw, "--output", folder / "drawn.png")
    cli.works("info", "--checkpoint", folder / "checkpoints/model_epoch_001.pt")


def test_a_killed_run_holds_its_folder_no_longer(cli, warm, tmp_path):
    folder = tmp_path / "run"
    running = warm.start(*LONG, "--output_dir", folder, faults=HOLDING)
    running.until_it_says("slow")
    assert warm.kill(running) == -signal.SIGKILL
    assert (folder / run_lock.NAME).exists()
    cli.works(*RUN, "--max_steps", 1, "--overwrite", "--output_dir", folder)
    assert not (folder / run_lock.NAME).exists()


def test_of_many_that_start_at_once_one_trains(warm, tmp_path):
    """The others are refused: by the lock, or because a run is there already once that one has ended."""
    started = [
        warm.start(*RUN, "--max_steps", 5, "--output_dir", tmp_path / "run", faults=(("no_plots",),)) for _ in range(4)
    ]
    codes = [warm.wait(running) for running in started]
    assert sorted(codes) == [0, 2, 2, 2], [running.said() for running in started]
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(log) == 5 and not (tmp_path / "run" / run_lock.NAME).exists()


def test_runs_in_different_folders_do_not_mind_each_other(busy, cli, tmp_path):
    cli.works(*RUN, "--max_steps", 1, "--output_dir", tmp_path / "other")
    cli.works(*RUN, "--max_steps", 1, "--output_dir", busy[0] / "inner")


# What is left behind


REFUSED = {
    "nothing to resume": (2, ["train", "--resume"]),
    "nothing to extend": (2, ["train", "--extend", "--epochs", 3]),
    "no such data": (1, ["train", "--dataset", "folder", "--data_dir", "gone"]),
    "no such precision here": (2, [*RUN, "--precision", "fp16"]),
    "no such weights": (1, [*RUN, "--init_from", "gone.pt"]),
}


@pytest.mark.parametrize("code, argv", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("place", ["run", "some/where/run", "there"])
def test_a_run_that_is_refused_leaves_nothing_new(place, code, argv, cli, tmp_path):
    (tmp_path / "there").mkdir()
    assert cli(*argv, "--output_dir", place).code == code
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_run_that_is_interrupted_before_it_begins_leaves_nothing_new(cli, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("tiny_diffusion.runs.session.open_run_data", interrupt)
    assert cli(*RUN, "--output_dir", "some/run").code == 130
    assert not list(tmp_path.iterdir())


# The lock by itself


def test_a_folder_is_locked_within_the_block_and_free_after_it(tmp_path):
    with locked(tmp_path):
        assert (tmp_path / run_lock.NAME).read_text().split() == [str(os.getpid()), socket.gethostname()]
        with pytest.raises(OptionError, match=f"process {os.getpid()}"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_folder_is_free_after_an_error_in_the_block_too(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b"):
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "x", "-5 host", "99999999999999999999999 host", "\0\0", "ü" * 400, "12\nx 3"])
def test_what_stands_in_the_file_of_a_dead_process_does_not_matter(text, tmp_path):
    (tmp_path / run_lock.NAME).write_text(text, encoding="utf-8")
    with locked(tmp_path):
        with pytest.raises(OptionError, match=f"process {os.getpid()}"), locked(tmp_path):
            pass
        (tmp_path / run_lock.NAME).write_text(text, encoding="utf-8")  # a holder that could not sign it
        with pytest.raises(OptionError, match="another run[.] Wait") as refused, locked(tmp_path):
            pass
        assert "\n" not in str(refused.value)


def test_a_process_on_another_computer_is_named_with_it(tmp_path):
    with locked(tmp_path):
        (tmp_path / run_lock.NAME).write_text("12 elsewhere\n")
        with pytest.raises(OptionError, match=r"\(process 12 on elsewhere\)"), locked(tmp_path):
            pass


def test_a_file_that_was_taken_away_while_it_was_waited_for_is_made_again(tmp_path, monkeypatch):
    """Otherwise two would hold two files of one name."""
    lock, calls = run_lock.acquire, []

    def slow(number):
        calls.append(number)
        if len(calls) < 3:
            os.unlink(tmp_path / run_lock.NAME)  # by the process that held it until now
        lock(number)

    monkeypatch.setattr(run_lock, "acquire", slow)
    with locked(tmp_path):
        assert len(calls) == 3
        monkeypatch.setattr(run_lock, "acquire", lock)
        with pytest.raises(OptionError), locked(tmp_path):
            pass


def test_what_another_process_has_made_since_is_not_taken_away(tmp_path):
    path = tmp_path / run_lock.NAME
    with locked(tmp_path):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_where_there_are_no_locks_a_run_goes_on_and_says_so_once(cli, monkeypatch, capsys, tmp_path):
    fcntl = pytest.importorskip("fcntl")

    def none(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    for number in sorted(run_lock.UNSUPPORTED):
        with locked(tmp_path / "run"):
            assert capsys.readouterr().err.count("this file system has no locks") == 1, number
        assert not (tmp_path / "run" / run_lock.NAME).exists()
    ended = cli.works(*RUN, "--max_steps", 1, "--output_dir", "run")
    assert ended.err.count("this file system has no locks") == 1
    assert not (tmp_path / "run" / run_lock.NAME).exists()


def test_a_lock_that_cannot_be_had_for_a_stranger_reason_is_one_line(cli, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_lock, "open_lock_file", fail)
    cli.refuses(1, [*RUN, "--output_dir", "run"], "--output_dir run cannot be written: Input/output error", "Name")


def test_a_link_in_the_place_of_the_lock_is_not_followed(cli, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run" / run_lock.NAME).symlink_to(tmp_path / "mine.txt")
    cli.refuses(1, [*RUN, "--output_dir", "run"], "--output_dir run cannot be written")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_folder_that_can_have_no_name_is_refused_by_its_option(cli):
    name = "x" * 300
    cli.refuses(1, ["train", "--dataset", "digits", "--output_dir", f"{name}/run"], f"--output_dir {name}", "too long")
