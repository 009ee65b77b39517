"""The ends of epochs: what they write, and how much of a run they may take."""

import json
import time

import pytest
from cli_helpers import contents
from run_helpers import RUN, log_of

from tiny_diffusion.evaluation import online
from tiny_diffusion.runs import epoch_end
from tiny_diffusion.runs.checkpoint import load_checkpoint
from tiny_diffusion.runs.epoch_end import FREE_SECONDS, MAX_SHARE, is_affordable
from tiny_diffusion.runs.writer import RunWriter


@pytest.mark.parametrize("training", [0.001, 0.1, 10.0])
@pytest.mark.parametrize("cost", [0.1, 3.0])
def test_ends_of_epochs_take_a_minute_or_half_of_the_run(training, cost):
    """training, cost: seconds of an epoch and of its end.  Where the ends are cheap, none is left out."""
    spent = elapsed = 0.0
    done = 0
    for _ in range(3000):
        elapsed += training
        if is_affordable(spent, elapsed):
            spent, elapsed, done = spent + cost, elapsed + cost, done + 1
        assert spent <= max(FREE_SECONDS, MAX_SHARE * elapsed) + cost
    assert done == 3000 or cost > training


def test_a_run_of_short_epochs_leaves_out_pictures_and_still_ends_with_one(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_end, "FREE_SECONDS", 0.0)
    monkeypatch.setattr(epoch_end, "MAX_SHARE", 0.0)
    cli.works(*RUN, "--epochs", 4, "--output_dir", "run")
    assert {"samples/epoch_001.png", "samples/epoch_004.png", "model_final.pt"} <= set(contents(tmp_path / "run"))
    assert "samples/epoch_002.png" not in contents(tmp_path / "run")


@pytest.mark.parametrize("batch_size, epochs, last", [(299, 1, 1), (600, 1, 2), (600, 5, 6), (100, 3, 3)])
def test_the_last_picture_is_named_by_the_last_epoch_that_ended(batch_size, epochs, last, cli, tmp_path):
    """Of 299 images a step of 600 ends two epochs; 9 steps of 100 end with the third, and an image more."""
    cli.works(*RUN, "--batch_size", batch_size, "--epochs", epochs, "--output_dir", "run")
    pictures = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert pictures[-1] == f"epoch_{last:03d}.png"
    assert int(log_of(tmp_path / "run")[-1]["epoch"]) == last


def test_a_resumed_run_keeps_its_best_checkpoint_from_a_worse_one(cli, tmp_path, monkeypatch):
    """Scores of 1, then 3 | 2: the two after the resume is better than the epoch before, and not the best."""
    scores = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(online, "OnlineEvaluation", lambda *args: lambda *request: {"distance": next(scores)})
    cli.works(*RUN, "--eval_interval", 1, "--keep_best", "--output_dir", "run", "--max_steps", 6)
    cli.works("train", "--output_dir", "run", "--resume", "--max_steps", 9)
    assert next(scores, None) is None
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt").about
    assert best["step"] == 3 and best["best_score"] == {"name": "distance", "value": 1.0, "step": 3}
    assert load_checkpoint(tmp_path / "run" / "model_final.pt").about["best_score"] == best["best_score"]


def test_the_log_says_of_each_step_what_its_report_says(cli, tmp_path, monkeypatch):
    reports, write_report = [], RunWriter.write_report

    def remember(self, report, *rest):
        reports.append({"step": report.step, "loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr})
        return write_report(self, report, *rest)

    monkeypatch.setattr(RunWriter, "write_report", remember)
    cli.works(*RUN, "--output_dir", "run")
    wanted = [{name: float(value) for name, value in report.items()} for report in reports]
    assert len(wanted) == 9 and all(report["loss"] != report["grad_norm"] for report in wanted)
    assert [{name: line[name] for name in wanted[0]} for line in log_of(tmp_path / "run")] == wanted
    curve = load_checkpoint(tmp_path / "run" / "model_final.pt").about["loss_history"]
    assert curve == [[report["step"], report["loss"]] for report in wanted]


@pytest.mark.slow
def test_the_speed_in_the_log_is_that_of_training_alone(cli, tmp_path, monkeypatch):
    """Each end of an epoch takes a second here, before and after its line is written."""

    def slow(method):
        return lambda *arguments: time.sleep(0.5) or method(*arguments)

    for name in ("evaluate_samples", "run"):
        monkeypatch.setattr(epoch_end.EpochEnd, name, slow(getattr(epoch_end.EpochEnd, name)))
    cli.works(*RUN, "--output_dir", "run")
    lines = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and min(line["images_per_second"] for line in lines) > 100 / 0.5
