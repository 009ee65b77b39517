"""--log: the records that TensorBoard and Weights & Biases hold of a run equal its log, also after it was resumed."""

import json
import shutil
import struct
import sys

import numpy as np
import pytest
from run_helpers import SMALL

from tiny_diffusion.config.option import specs
from tiny_diffusion.config.training import Config
from tiny_diffusion.runs.checkpoint import load_checkpoint
from tiny_diffusion.runs.trackers import TRACKERS, Trackers

RUN = ["train", *SMALL, "--attention_levels", "none", "--device", "cpu", "--batch_size", 500, "--epochs", 3]  # 9 steps
SCORED = ["--eval_interval", 1, "--eval_images", 100]
CURVES = {"loss": "loss", "gradient_norm": "grad_norm", "learning_rate": "lr", "images_per_second": "images_per_second"}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def resumed(cli, tmp_path, tracker):
    """A run with a tracker, whose second session ended without a checkpoint at step 6, as a kill does; its folder."""
    folder = tmp_path / "run"
    start = [*RUN, *SCORED, "--output_dir", folder]
    cli.works(*start, "--log", tracker, "--max_steps", 4)
    shutil.copy(folder / "model_final.pt", folder / "checkpoints" / "kept.pt")
    cli.works(*start, "--resume", "--max_steps", 6)
    cli.works(*start, "--resume", folder / "checkpoints" / "kept.pt")
    assert [line["step"] for line in log_of(folder)] == list(range(1, 10))
    return folder


def test_the_option_names_the_trackers():
    assert specs(Config)["log"].type.choices == tuple(TRACKERS)


@pytest.mark.slow
def test_tensorboard_holds_each_step_of_a_resumed_run_once(cli, tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="it is an extra")
    from PIL import Image

    folder = resumed(cli, tmp_path, "tensorboard")
    record = loader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    record.Reload()
    lines = log_of(folder)
    for tag, name in CURVES.items():
        points = record.Scalars(tag)
        assert [point.step for point in points] == list(range(1, 10))
        np.testing.assert_allclose([p.value for p in points], [line[name] for line in lines], rtol=1e-5, atol=0.06)
    heldout = [(point.step, point.value) for point in record.Scalars("heldout_loss")]
    np.testing.assert_allclose(heldout, load_checkpoint(folder / "model_final.pt").about["heldout_history"], rtol=1e-5)
    tags = record.Tags()["scalars"]
    (distance,) = (tag for tag in tags if tag.startswith("relative_frechet_distance"))
    scores = [(line["step"], line[name]) for line in lines for name in line if name.startswith("relative_frechet")]
    np.testing.assert_allclose([(point.step, point.value) for point in record.Scalars(distance)], scores, rtol=1e-5)
    assert len(scores) == 3
    noise = [tag for tag in tags if tag.startswith("loss_by_noise/")]
    assert len(noise) == 8
    for tag in noise:
        steps = [point.step for point in record.Scalars(tag)]
        assert steps == sorted(set(steps)) and steps[-1] == 9
    pictures = record.Images("samples")
    assert [picture.step for picture in pictures] == sorted({picture.step for picture in pictures})
    import io

    shown = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)).convert("RGB"))
    saved = np.asarray(Image.open(folder / "samples" / "epoch_003.png").convert("RGB"))
    assert np.array_equal(shown, saved)
    text = record.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    config = json.loads(text.removeprefix("```json\n").removesuffix("\n```"))
    assert Config.from_dict(config).log == ("tensorboard",) and config["epochs"] == 3


def records_of(path):
    """The records of a file of Weights & Biases, in LevelDB's log format: blocks of 32 KiB, headers of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


@pytest.mark.slow
def test_wandb_holds_each_step_of_a_resumed_run_once(cli, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="it is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    folder = resumed(cli, tmp_path, "wandb")
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    records = [record for file in files for record in records_of(file)]
    assert len(files) == 3 and len({record.run.run_id for record in records if record.HasField("run")}) == 1
    lines, curves = log_of(folder), {}
    for record in records:
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        step = record.history.step.num or items.get("_step")
        for name, value in items.items():
            curves.setdefault(name, []).append((step, value))
    assert [step for step, _ in curves["loss"]] == list(range(1, 10))
    assert [value for _, value in curves["loss"]] == pytest.approx([line["loss"] for line in lines])
    for name in (*CURVES, "heldout_loss", "samples._type", *(n for n in curves if n.startswith("loss_by_noise"))):
        steps = [step for step, _ in curves[name]]
        assert steps == sorted(set(steps)) and steps[-1] == 9
    config = {item.key: item.value_json for record in records for item in record.run.config.update}
    assert json.loads(config["epochs"]) == 3


class Recorder:
    where = "memory"
    points, pictures, closed = (), (), 0

    def __init__(self, *_):
        self.points, self.pictures = [], []

    def numbers(self, step, values):
        self.points.append((step, values))

    def picture(self, step, name, path):
        self.pictures.append((step, name, path))

    def close(self):
        self.closed += 1


class Failing(Recorder):
    def numbers(self, step, values):
        raise OSError("No space left on device")


def test_both_get_the_same_and_one_that_fails_ends_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(TRACKERS, "tensorboard", Recorder)
    monkeypatch.setitem(TRACKERS, "wandb", Failing)
    both = Trackers(("tensorboard", "wandb"), tmp_path, {})
    recorder = both.open["tensorboard"]
    both.numbers(1, {"loss": 0.5, "gradient_norm": float("nan")})
    both.numbers(1, {"loss": 0.5, "heldout_loss": 1.0})  # the loss has a point at this step
    both.picture(1, "samples", tmp_path)
    both.picture(1, "samples", tmp_path)
    assert recorder.points == [(1, {"loss": 0.5}), (1, {"heldout_loss": 1.0})]
    assert len(recorder.pictures) == 1 and list(both.open) == ["tensorboard"]
    ended = "--log wandb: the record ends at step 1: No space left on device"
    assert ended in "".join(capsys.readouterr())
    both.close()
    both.close()
    assert recorder.closed == 1


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_named_before_anything_is_written(name, cli, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    cli.refuses(1, [*RUN, "--log", name, "--output_dir", "new"], f"--log {name} needs {name}. Run: pip install {name}")
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())


def test_an_unknown_tracker_is_refused(cli):
    cli.refuses(2, [*RUN, "--log", "tensorbord"], "--log", "'tensorbord' is not one of tensorboard, wandb", "Did you")


@pytest.mark.slow
def test_a_run_that_is_started_again_begins_a_new_record(cli, tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="it is an extra")
    start = [*RUN, "--output_dir", "run", "--log", "tensorboard", "--max_steps"]
    cli.works(*start, 2)
    cli.works(*start, 1, "--overwrite")
    record = loader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    record.Reload()
    assert [point.step for point in record.Scalars("loss")] == [1]
