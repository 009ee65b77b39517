"""Several processes: they compute what one computes, stop together, and say things once.

Most are forks of the warm process that are told what torchrun would tell them; a few are started by torchrun itself.
"""

import contextlib
import json
import math
import os
import re
import signal
import threading
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
from cli_helpers import TINY, contents
from process_helpers import (
    ended,
    environment,
    free_port,
    run_together,
    start_torchrun,
    started_together,
    together,
    torchrun,
)

from tiny_diffusion.config.training import resolve
from tiny_diffusion.data.batches import Batches
from tiny_diffusion.data.sources import open_dataset
from tiny_diffusion.diffusion.request import Request
from tiny_diffusion.errors import OptionError
from tiny_diffusion.models.build import make_model, to_device
from tiny_diffusion.randomness import seed_torch
from tiny_diffusion.runs.checkpoint import load_checkpoint
from tiny_diffusion.runtime.torchrun_store import attempt_name
from tiny_diffusion.runtime.world import SINGLE_PROCESS, World, check_batch_size, make_world
from tiny_diffusion.training.run_length import RunLength
from tiny_diffusion.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

CPU = torch.device("cpu")
RUN = ["train", *TINY, "--device", "cpu", "--batch_size", "64", "--seed", "1"]
RUN += ["--attention_levels", "none"]
ADAM = ["--optimizer", "adam"]


def log_of(folder):
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def losses_of(folder):
    return [line["loss"] for line in log_of(folder)]


def worlds(size):
    return [World(CPU, rank, size) for rank in range(size)]


# Shares


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 12, 100])
def test_shares_are_neighbours_that_cover_all_rows_and_differ_by_one_at_most(count, size):
    shares = [list(range(count))[world.local_slice(count)] for world in worlds(size)]
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kept", ["in memory", "on disk"])
def test_the_rows_of_the_processes_are_the_batch_of_one(kept, size, tmp_path):
    """Order, flips and random crops belong to the step, not to the process."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    options = {"data_dir": str(tmp_path), "size": (8, 8), "random_crop": True}
    data = open_dataset("folder", **options, cache_bytes=1e9 if kept == "in memory" else 0)
    one = Batches(data, 8, seed=5, hflip=True)
    several = [Batches(data, 8, seed=5, hflip=True, world=world) for world in worlds(size)]
    for step in range(4):
        parts = [batches.at(step) for batches in several]
        for got, wanted in zip(zip(*parts, strict=True), one.at(step), strict=True):
            assert torch.equal(torch.cat(got), wanted)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 10, 17])
def test_every_image_of_a_request_is_drawn_by_one_process_and_no_more_at_once_than_asked(count, size):
    request = Request(range(count), "abm", 20, "angle", batch_size=4)
    drawn = []
    for batch in request.batches(World(CPU, 0, size)):
        for world in worlds(size):
            share = batch.local(world)
            assert 1 <= len(share.indices) <= 4
            drawn += list(share.indices)[: len(range(len(batch.indices))[world.local_slice(len(batch.indices))])]
    assert drawn == list(range(count))


# What is refused


@pytest.mark.parametrize(
    "batch_size, accumulate, processes", [(128, 1, 3), (10, 1, 4), (3, 1, 8), (12, 3, 8), (16, 8, 4), (7, 7, 2)]
)
def test_a_world_that_does_not_divide_the_batch_is_refused_with_numbers_that_do(batch_size, accumulate, processes):
    with pytest.raises(OptionError, match=f"--batch_size {batch_size} .* {processes} processes") as refused:
        check_batch_size(batch_size, accumulate, processes)
    sizes, starts = re.search(r"Use (.*), or start (.*) process", str(refused.value)).groups()
    for size in map(int, sizes.split(" or ")):
        check_batch_size(size, accumulate, processes)
        assert size > 0 and abs(size - batch_size) < processes * accumulate
    for fewer in map(int, starts.split(" or ")):
        check_batch_size(batch_size, accumulate, fewer)
        assert 1 <= fewer < processes


@pytest.mark.parametrize("batch_size, accumulate, processes", [(10, 4, 1), (7, 7, 1), (100, 10, 4), (9, 3, 3)])
def test_parts_of_a_batch_need_not_be_equal_as_long_as_each_has_an_image(batch_size, accumulate, processes):
    check_batch_size(batch_size, accumulate, processes)


WHOLE = environment(0, 2, 12345)


@pytest.mark.parametrize(
    "told",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "two"},
        {**WHOLE, "RANK": "2"},
        {**WHOLE, "RANK": "-1"},
        {**WHOLE, "RANK": "x"},
        {**WHOLE, "WORLD_SIZE": "0"},
        {**WHOLE, "MASTER_ADDR": ""},
        {**WHOLE, "MASTER_PORT": "none"},
        {name: value for name, value in WHOLE.items() if name != "LOCAL_RANK"},
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(told):
    with pytest.raises(OptionError, match=f"WORLD_SIZE is '{told['WORLD_SIZE']}'.* torchrun"):
        make_world("cpu", told)


def test_several_processes_cannot_share_an_mps_device():
    with pytest.raises(OptionError, match="--device mps .* without torchrun"):
        make_world("mps", WHOLE)


def test_one_process_under_torchrun_is_a_world_of_its_own():
    assert make_world("cpu", environment(0, 1, 12345)) == World(CPU) == SINGLE_PROCESS


@pytest.mark.parametrize("command", [["info"], ["visualize", "--what", "schedules"], ["classifier"]])
def test_what_processes_do_not_share_the_first_does_alone(command, cli, monkeypatch, tmp_path):
    for name, value in environment(1, 2, 12345).items():
        monkeypatch.setenv(name, value)
    ended = cli(*command)
    assert ended == (0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_first_measures_speed_alone_and_waits_for_no_other(cli, monkeypatch):
    """So do the processes that it starts, which find nothing of the others in their environment."""
    for name, value in environment(0, 2, 12345).items():
        monkeypatch.setenv(name, value)
    found = []

    def start_up_times():
        found.append(os.environ.get("WORLD_SIZE"))
        return dict.fromkeys(("help_seconds", "import_torch_seconds", "first_step_seconds"), 1.0)

    monkeypatch.setattr("tiny_diffusion.benchmarking.speed.start_up_times", start_up_times)
    words = ["--dataset", "digits", "--base_channels", 8, "--batch_size", 6, "--seconds", 0.1, "--num_images", 2]
    ended = cli("benchmark", *words, "--device", "cpu")
    assert ended.code == 0 and "first training step" in ended.out and found == [None], ended


def test_only_the_first_process_prints(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "--batch_size" in cli("train", "--help").out
    monkeypatch.setenv("RANK", "1")
    assert cli("train", "--help") == (0, "", "")


# Messages between processes


def messages(world):
    """What each method gives in a world of three, where processes hold different things."""
    first, second = torch.full((2, 3, 4, 4), float(world.rank)), torch.tensor(10.0**world.rank)
    first = first.contiguous(memory_format=torch.channels_last)
    first[0, 1, 2, 3] += 5 * world.rank
    world.all_reduce_mean_([first, second])
    rows = {count: torch.arange(count * 2.0).view(count, 2) for count in range(8)}
    gathered = {}
    for count, whole in rows.items():
        share = whole[world.local_slice(count)]
        gathered[count] = world.gather(share if len(share) else torch.full((1, 2), -1.0), count)
    with world.main_process_first():
        entered = time.monotonic()
        if world.is_main:
            time.sleep(0.2)
        left = time.monotonic()
    return {
        "average": (first, second),
        "gathered": gathered,
        "largest": world.maximum(world.rank, -world.rank, 2.0**40 + world.rank / 8),
        "agrees": [world.all_equal("the same"), world.all_equal(world.rank), world.all_equal(world.rank == 2)],
        "times": (entered, left),
    }


@pytest.mark.slow
def test_messages_arrive_whole_at_every_process(warm, tmp_path):
    found = together(warm, messages, 3, folder=tmp_path)
    wanted = torch.ones(2, 3, 4, 4)
    wanted[0, 1, 2, 3] = 6
    for one in found:
        torch.testing.assert_close(one["average"], (wanted, torch.tensor(37.0)))
        for count, rows in one["gathered"].items():
            assert torch.equal(rows, torch.arange(count * 2.0).view(count, 2))
        assert one["largest"] == [2, 0, 2.0**40 + 2 / 8]
        assert one["agrees"] == [True, False, False]
    for other in found[1:]:
        assert other["times"][0] >= found[0]["times"][1]


def test_the_processes_of_an_attempt_meet_whatever_earlier_ones_have_left():
    """The store outlives them: here the first attempt loses one before it arrives, and the others are ended."""
    store, met, lock = torch.distributed.HashStore(), {}, threading.Lock()

    def arrive(attempt, rank):
        with contextlib.suppress(RuntimeError):  # the first attempt's waits are given up
            name = attempt_name(store, rank, 3)
            with lock:
                met[attempt, rank] = name

    store.set_timeout(timedelta(seconds=0.5))
    arrive("first", 1)
    store.set_timeout(timedelta(seconds=60))
    for attempt in ("second", "third"):
        threads = [threading.Thread(target=arrive, args=(attempt, rank), daemon=True) for rank in (2, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    names = [{met[attempt, rank] for rank in range(3)} for attempt in ("second", "third")]
    assert len(met) == 6 and [len(name) for name in names] == [1, 1] and names[0] != names[1]


# The same steps


def gradients(world, options):
    """Of step 3 in float64, with the loss, of a network whose weights are random in every layer."""
    config = resolve({"dataset": "digits", "base_channels": 8, "batch_size": 16, "grad_clip": 1e9, **options})
    seed_torch(config.seed, "weights")
    model = to_device(make_model(config, 1, 10), CPU).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batches = Batches(open_dataset("digits"), 16, config.seed, hflip=config.hflip, world=world)
    right = batches.at
    batches.at = lambda step: tuple(part.double() if part.is_floating_point() else part for part in right(step))
    trainer = Trainer(model, config, batches, RunLength(steps=10), lambda: 0.0, num_classes=10)
    trainer.step = 3
    report = next(trainer.run())
    return {name: parameter.grad for name, parameter in model.named_parameters()}, report.loss, report.grad_norm


@pytest.mark.slow
def test_processes_have_the_gradient_of_one(warm, tmp_path):
    options = {"class_cond": True, "label_dropout": 0.4, "hflip": True, "accumulate": 2}
    wanted, loss, norm = gradients(SINGLE_PROCESS, {**options, "accumulate": 1})
    for got, its_loss, its_norm in together(warm, gradients, 4, options, folder=tmp_path):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close((its_loss, its_norm), (loss, norm), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_the_first_losses_of_processes_are_those_of_one(warm, tmp_path):
    faults = (["no_plots"],)
    code, said = warm.run(*RUN, "--max_steps", 5, "--output_dir", tmp_path / "one", faults=faults)
    several = run_together(warm, *RUN, "--max_steps", 5, "--output_dir", tmp_path / "two", faults=faults)
    assert code == 0 and several.codes == [0, 0], (said, several)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-6)
    assert several.said[1] == "" and "model_final.pt" in several.said[0]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


@pytest.fixture(scope="module")
def one(warm, tmp_path_factory):
    """A run of thirty steps in one process, of which the last are of the second epoch."""
    folder = tmp_path_factory.mktemp("one") / "run"
    code, said = warm.run(*RUN, "--max_steps", 30, "--output_dir", folder, faults=(["no_plots"],))
    assert code == 0, said
    return folder


@pytest.mark.slow
def test_the_losses_of_thirty_steps_stay_together(one, warm, tmp_path):
    several = run_together(
        warm, *RUN, "--max_steps", 30, "--output_dir", tmp_path / "run", size=4, faults=(["no_plots"],)
    )
    assert several.codes == [0] * 4, several
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(one), rel=1e-3)
    assert [line["lr"] for line in log_of(tmp_path / "run")] == [line["lr"] for line in log_of(one)]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(one, warm, tmp_path):
    folder, faults = tmp_path / "run", (["no_plots"],)
    begun = run_together(warm, *RUN, "--max_steps", 11, "--output_dir", folder, faults=faults)
    alone = warm.run("train", "--resume", "--max_steps", 20, "--output_dir", folder, faults=faults)
    again = run_together(warm, "train", "--resume", "--max_steps", 30, "--output_dir", folder, faults=faults)
    assert begun.codes == again.codes == [0, 0] and alone[0] == 0, (begun, alone, again)
    assert [line["step"] for line in log_of(folder)] == list(range(1, 31))
    assert losses_of(folder) == pytest.approx(losses_of(one), rel=1e-3)


def dropout_seeds(world):
    """What torch's own generator, which dropout draws from, was seeded with at the first steps."""
    config = resolve({"dataset": "digits", "base_channels": 8, "batch_size": 16, "dropout": 0.5})
    model = to_device(make_model(config, 1, 10), CPU)
    trainer = Trainer(
        model,
        config,
        Batches(open_dataset("digits"), 16, 0, world=world),
        RunLength(steps=3),
        lambda: 0.0,
        num_classes=10,
    )
    return [torch.initial_seed() for _ in trainer.run()]


def test_every_step_and_every_process_drops_out_others(warm, tmp_path):
    first, second = together(warm, dropout_seeds, 2, folder=tmp_path)
    assert len({*first, *second}) == 6
    assert first == dropout_seeds(SINGLE_PROCESS)


# What befalls one process


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_splits_its_batches_alone(one, warm, tmp_path):
    faults = (["no_plots"], ["on_rank", 1, "memory_runs_out", 2])
    several = run_together(
        warm, *RUN, "--auto_batch", "--max_steps", 5, "--output_dir", tmp_path / "run", faults=faults
    )
    assert several.codes == [0, 0], several
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(one)[:5], rel=1e-6)


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(warm, tmp_path):
    faults = (["no_plots"], ["on_rank", 1, "not_finite_at", 2])
    several = run_together(warm, *RUN, "--max_steps", 6, "--output_dir", tmp_path / "run", faults=faults)
    assert several.codes == [0, 0], several
    losses = losses_of(tmp_path / "run")
    assert losses[2] is None and all(math.isfinite(loss) for loss in losses[:2] + losses[3:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals", [[(1, signal.SIGTERM)], [(0, signal.SIGTERM)], [(0, signal.SIGINT)] * 2 + [(1, signal.SIGINT)]]
)
def test_a_stop_that_one_is_asked_for_stops_all_after_the_same_step(signals, warm, tmp_path):
    """A Ctrl-C reaches each process twice: by the terminal and by torchrun."""
    folder = tmp_path / "run"
    running = started_together(warm, *RUN, "--epochs", 500, "--output_dir", folder, faults=(["no_plots"],))
    wait_for(lambda: (folder / "log.jsonl").exists() and len(log_of(folder)) > 3)
    for rank, number in signals:
        os.kill(running[rank].pid, number)
    stopped = ended(warm, running)
    assert stopped.codes == [128 + signals[0][1]] * 2, stopped
    assert f"stopped by {signals[0][1].name}" in stopped.said[0] and stopped.said[1] == ""
    step = load_checkpoint(folder / "checkpoints" / "latest.pt").about["step"]
    assert log_of(folder)[-1]["step"] == step
    further = run_together(
        warm, "train", "--resume", "--max_steps", step + 2, "--output_dir", folder, faults=(["no_plots"],)
    )
    assert further.codes == [0, 0], further
    assert [line["step"] for line in log_of(folder)] == list(range(1, step + 3))


def wait_for(happened, seconds=120):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dies, stays", [(0, 1), (1, 0)])
def test_a_process_that_dies_ends_the_others(dies, stays, warm, tmp_path):
    folder = tmp_path / "run"
    running = started_together(warm, *RUN, "--epochs", 500, "--output_dir", folder, faults=(["no_plots"],))
    wait_for(lambda: (folder / "log.jsonl").exists() and len(log_of(folder)) > 3)
    os.kill(running[dies].pid, signal.SIGKILL)
    done = ended(warm, running)
    assert done.codes[dies] == -signal.SIGKILL and done.codes[stays] == 1
    last = done.said[stays].splitlines()[-1]
    assert "error: another process of this run has ended" in last and "Traceback" not in done.said[stays]


@pytest.mark.slow
def test_time_is_the_first_processs(warm, tmp_path):
    """The clock of the other, a minute ahead, changes neither the rates nor the end."""
    faults = (["no_plots"], ["on_rank", 1, "clock_ahead", 60])
    several = run_together(warm, *RUN, "--minutes", "0.15", "--output_dir", tmp_path / "run", faults=faults)
    assert several.codes == [0, 0], several
    assert "finished" in several.said[0]
    about = load_checkpoint(tmp_path / "run" / "model_final.pt").about
    assert about["finished"] and 3 < about["elapsed_seconds"] < 60
    assert log_of(tmp_path / "run")[0]["lr"] > 0


@pytest.mark.slow
def test_processes_that_see_different_folders_are_refused(warm, tmp_path):
    """As on machines that share no disk: only the first finds the checkpoint."""
    code, said = warm.run(*RUN, "--max_steps", 2, "--output_dir", tmp_path / "run", faults=(["no_plots"],))
    assert code == 0, said
    port = free_port()
    first = warm.start(
        *["train", "--resume", "--output_dir", tmp_path / "run"], faults=(("one_of_several", environment(0, 2, port)),)
    )
    second = warm.start(
        *[*RUN, "--output_dir", tmp_path / "other"], faults=(("one_of_several", environment(1, 2, port)),)
    )
    done = ended(warm, [first, second])
    assert done.codes == [2, 2], done
    assert "the ranks of this run have different" in done.said[0]


# Drawing and measuring


def assert_same_pictures(first, second):
    """To within one grey level."""
    assert first.shape == second.shape and abs(first.astype(int) - second.astype(int)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("size, number", [(2, 7), (3, 2)])
def test_processes_draw_the_images_of_one(size, number, loud, warm, tmp_path):
    def draw(name, run):
        return run(
            "sample", "--checkpoint", loud, "--num_images", number, "--batch_size", 2, "--output", tmp_path / name
        )

    assert draw("one.npz", warm.run)[0] == 0
    several = draw("several.npz", lambda *argv: run_together(warm, *argv, size=size))
    assert several.codes == [0] * size, several
    assert_same_pictures(*(np.load(tmp_path / name)["arr_0"] for name in ("one.npz", "several.npz")))


@pytest.mark.slow
def test_processes_show_the_denoising_that_one_shows(loud, warm, tmp_path):
    from PIL import Image

    def draw(name, run):
        return run(
            *["sample", "--checkpoint", loud, "--num_images", 5, "--batch_size", 3, "--steps", 4],
            *["--show_intermediate", "--output", tmp_path / name / "images.png"],
        )

    assert draw("one", warm.run)[0] == 0
    assert draw("several", lambda *argv: run_together(warm, *argv)).codes == [0, 0]
    frames = sorted((tmp_path / "one" / "intermediate").iterdir())
    assert len(frames) == 6
    for frame in [tmp_path / "one" / "images.png", *frames]:
        again = tmp_path / "several" / frame.relative_to(tmp_path / "one")
        assert_same_pictures(*(np.asarray(Image.open(path)) for path in (frame, again)))


@pytest.mark.slow
def test_processes_measure_what_one_measures(loud, warm, tmp_path):
    def measure(name, run):
        return run(
            *["evaluate", "--checkpoint", loud, "--num_images", 101, "--steps", "3,4", "--batch_size", 16],
            *["--output", tmp_path / name],
        )

    assert measure("one", warm.run)[0] == 0
    several = measure("several", lambda *argv: run_together(warm, *argv))
    assert several.codes == [0, 0] and several.said[1] == "", several
    first, second = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "several"))
    for one_way, other in zip(first["results"], second["results"], strict=True):
        assert other["metrics"] == pytest.approx(one_way["metrics"], rel=1e-2, abs=1e-3)


@pytest.mark.slow
def test_measuring_and_pictures_while_training_do_not_stop_processes(warm, tmp_path):
    options = ["--sample_interval", 1, "--save_interval", 1, "--eval_interval", 1, "--eval_images", 101, "--keep_best"]
    several = run_together(
        warm, *RUN, *options, "--num_samples", 3, "--max_steps", 50, "--output_dir", tmp_path / "run", size=2
    )
    assert several.codes == [0, 0], several
    measured = [name for line in log_of(tmp_path / "run") for name in line if "[" in name]
    assert len(measured) == 2 and "n=101" in measured[0]
    assert {path.name for path in (tmp_path / "run" / "samples").iterdir()} == {
        f"epoch_00{epoch}.png" for epoch in (1, 2, 3)
    }
    assert (tmp_path / "run" / "checkpoints" / "best.pt").exists()


# torchrun


SCRIPT = ["train.py", *RUN[1:], "--precision", "fp32"]


def said_by(process, code):
    """What a torchrun printed, its own words included, once it has ended."""
    try:
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, out
    return out


def said_by_fork(warm, process, code):
    assert warm.wait(process) == code, process.said()
    return process.said()


@pytest.mark.slow
def test_torchrun_trains_and_draws(one, tmp_path):
    said = said_by(torchrun(*SCRIPT, "--max_steps", 5, "--output_dir", tmp_path / "run"), 0)
    assert said.count("model_final.pt\n") == 2  # the model, and how to draw from it
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(one)[:5], rel=1e-6)
    drawn = torchrun("sample.py", "--checkpoint", tmp_path / "run" / "model_final.pt", "--num_images", 3)
    assert said_by(drawn, 0).count("3 images:") == 1


@pytest.mark.slow
def test_what_is_wrong_is_said_once(warm, tmp_path):
    said = said_by_fork(warm, start_torchrun(warm, *SCRIPT, "--batch_size", 63, "--output_dir", tmp_path / "run"), 1)
    assert said.count("train.py: error:") == 1 and "--batch_size 63 cannot be shared equally by 2 processes" in said
    assert "exitcode  : 2" in said and "in check_batch_size" not in said  # torchrun's own table; none of our traceback
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_stopped_torchrun_saves_and_goes_on(warm, tmp_path):
    folder = tmp_path / "run"
    process = start_torchrun(warm, *SCRIPT, "--epochs", 500, "--output_dir", folder)
    wait_for(lambda: (folder / "log.jsonl").exists() and len(log_of(folder)) > 3)
    process.kill(signal.SIGTERM)
    assert "stopped by SIGTERM" in said_by_fork(warm, process, 1)
    step = load_checkpoint(folder / "checkpoints" / "latest.pt").about["step"]
    assert log_of(folder)[-1]["step"] == step


RESTARTING = ("--standalone", "--nproc_per_node=2", "--max_restarts=1")


def kill_the_first(folder, after_step):
    """Kills the first process of a run, which holds the lock, once its log has come this far."""
    wait_for(lambda: (folder / "log.jsonl").exists() and len(log_of(folder)) > after_step)
    os.kill(int((folder / ".lock").read_text().split()[0]), signal.SIGKILL)


@pytest.mark.slow
def test_torchrun_that_starts_again_after_a_failure_goes_on_with_the_run(one, warm, tmp_path):
    folder = tmp_path / "run"
    begun = run_together(warm, *RUN, "--max_steps", 10, "--output_dir", folder, faults=(["no_plots"],))
    command = ["train.py", "--resume", "--max_steps", 100, "--output_dir", folder]
    process = torchrun(*command, options=RESTARTING)
    kill_the_first(folder, after_step=12)
    said = said_by(process, 0)
    assert begun.codes == [0, 0] and said.count("started again by torchrun: --resume from") == 1, (begun, said)
    assert [line["step"] for line in log_of(folder)] == list(range(1, 101))
    assert losses_of(folder)[:30] == pytest.approx(losses_of(one), rel=1e-3)


@pytest.mark.slow
def test_torchrun_starts_afresh_where_nothing_was_saved(one, warm, tmp_path):
    folder = tmp_path / "run"
    process = start_torchrun(warm, *SCRIPT, "--max_steps", 100, "--output_dir", folder, options=RESTARTING)
    kill_the_first(folder, after_step=2)
    said = said_by_fork(warm, process, 0)
    assert said.count("stopped at --max_steps 100") == 1
    assert [line["step"] for line in log_of(folder)] == list(range(1, 101))
    assert losses_of(folder)[:30] == pytest.approx(losses_of(one), rel=1e-3)


@pytest.mark.slow
def test_a_run_that_was_refused_is_refused_again_and_not_gone_on_with(warm, tmp_path):
    folder = tmp_path / "run"
    assert warm.run(*RUN, "--max_steps", 2, "--output_dir", folder, faults=(["no_plots"],))[0] == 0
    before = contents(folder)
    process = start_torchrun(warm, *SCRIPT, "--max_steps", 4, "--output_dir", folder, options=RESTARTING)
    said = said_by_fork(warm, process, 1)
    assert said.count("holds a run already") == 2 and contents(folder) == before


@pytest.mark.slow
def test_two_machines_compute_what_one_process_does(one, warm, tmp_path):
    """Two torchruns that find each other by a rendezvous on the loopback, with two processes each."""
    port = free_port()
    meeting = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=one")
    command = [*SCRIPT, "--max_steps", 5, "--output_dir", tmp_path / "run"]
    nodes = [start_torchrun(warm, *command, options=(*meeting, "--nproc_per_node=2")) for _ in range(2)]
    said = [said_by_fork(warm, node, 0) for node in nodes]
    assert "".join(said).count("model_final.pt\n") == 2
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(one)[:5], rel=1e-6)
