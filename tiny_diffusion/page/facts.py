"""What the page says of a run: what was trained on what, its options, and its curves."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tiny_diffusion.config.option import Spec, specs
from tiny_diffusion.config.training import Config, resolve
from tiny_diffusion.errors import OptionError, printable
from tiny_diffusion.models.build import make_meta_model
from tiny_diffusion.runs.checkpoint import Checkpoint
from tiny_diffusion.runs.folder import RunFolder, read_log
from tiny_diffusion.runs.messages import duration

CURVE_POINTS = 300
OF_THIS_MACHINE = ("output_dir", "data_dir", "device", "workers")  # which mean nothing where the page is read


def facts_of(checkpoint: Checkpoint, log: Sequence[dict], parameters: int, multiplications: int) -> list[list[str]]:
    """[name, value] pairs: data, network, training, machine.   multiplications: of one evaluation for one image."""
    about, config = checkpoint.about, checkpoint.config
    size = " x ".join(map(str, config.size))
    count = about.get("images", {}).get("count")
    colours = {1: "grey", 3: "colour"}.get(about["channels"], f"{about['channels']} channels")
    facts = {
        "data": f"{config.dataset}{f', {count:,} images' if count else ''} of {size} pixels, {colours}",
        "classes": f"{len(checkpoint.class_names)}{'' if config.class_cond else ', not learnt'}",
        "network": f"U-Net of {parameters:,} parameters",
        "arithmetic": f"{multiplications / 1e6:,.1f} million multiplications an evaluation",
        "process": f"{config.schedule} schedule of {config.timesteps} timesteps, {config.prediction}-prediction",
        "training": f"{about['step']:,} steps of {config.batch_size} images",
        "duration": duration(about["elapsed_seconds"]),
        "speed": _speed(log),
        "machine": about["versions"].get("machine"),
        "PyTorch": about["versions"].get("torch"),
        "sampling": checkpoint.request(()).describe(),
    }
    if student := checkpoint.student:
        facts["distilled"] = f"to {student.steps} evaluations"
    if not checkpoint.class_names:
        del facts["classes"]
    return [[name, printable(str(value), 300)] for name, value in facts.items() if value]


def _speed(log: Sequence[dict]) -> str | None:
    speeds = [line["images_per_second"] for line in log if line.get("images_per_second")]
    return f"{np.median(speeds):,.0f} images per second" if speeds else None


def options_of(config: Config) -> tuple[list[list[str]], list[list[str]]]:
    """[name, value, default] of the options that differ from the defaults of their data set; [name, value] of all."""
    usual, changed, all_options = _defaults(config), [], []
    for name, spec in specs(type(config)).items():
        if name in OF_THIS_MACHINE:
            continue
        value, default = (_text(spec, getattr(options, name)) for options in (config, usual))
        all_options.append([f"--{name}", value])
        if name != "dataset" and not config.agrees(name, getattr(usual, name)):
            changed.append([f"--{name}", value, default])
    return changed, all_options


def _defaults(config: Config) -> Config:
    """What the options would be if only the data set had been given."""
    given = {"dataset": config.dataset}
    if config.data_dir is not None and config.dataset == "folder":
        given["data_dir"] = config.data_dir
    try:
        usual = resolve(given)
    except OptionError:
        usual = Config()
    return dataclasses.replace(usual, class_cond=config.class_cond) if usual.class_cond is None else usual


def _text(spec: Spec, value: object) -> str:
    """A value as the page shows it."""
    if isinstance(value, tuple):
        return spec.type.show(value)
    if value is None or isinstance(value, bool):
        return {None: "unset", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def curves_of(checkpoint: Checkpoint, log: Sequence[dict]) -> list[dict[str, object]]:
    """The arguments of charts.js for the losses, and for each score that was measured during the run."""
    pairs = [(line["step"], line.get("loss")) for line in log] or checkpoint.about["loss_history"]
    pairs = [(step, loss) for step, loss in pairs if loss is not None and math.isfinite(loss)]
    curves = []
    if pairs:
        series = [{"name": "training loss", "points": binned(pairs)}]
        if heldout := checkpoint.about["heldout_history"]:
            series.append({"name": "held-out loss", "points": heldout, "dots": True})
        curves.append(_curve("Loss", series))
    scores: dict[str, list] = {}
    for line in log:
        for name, value in line.items():
            if "[" in name and value is not None:
                scores.setdefault(name, []).append([line["step"], value])
    return curves + [
        _curve(name, [{"name": "samples", "points": points, "dots": True}]) for name, points in scores.items()
    ]


def _curve(title: str, series: list[dict]) -> dict[str, object]:
    values = [y for line in series for _, y in line["points"]]
    logarithmic = min(values) > 0 and max(values) > 3 * min(values)
    return {
        "title": title,
        "label": f"{title} over the steps",
        "x": "step",
        "series": series,
        "logarithmic": logarithmic,
    }


def binned(pairs: Sequence[Sequence[float]]) -> list[list[float]]:
    """At most CURVE_POINTS points: the mean step and loss of as many equal parts."""
    if len(pairs) <= CURVE_POINTS:
        return [[float(step), float(loss)] for step, loss in pairs]
    ends = np.linspace(0, len(pairs), CURVE_POINTS + 1).astype(int)
    return [
        np.mean(np.asarray(pairs[start:end], dtype=np.float64), axis=0).round(6).tolist()
        for start, end in itertools.pairwise(ends)
    ]


def log_of(folder: Path) -> list[dict]:
    """The whole lines of a run's log."""
    return read_log(RunFolder(folder).log_path)[1]


def multiplications_of(config: Config, shape: tuple[int, int, int], num_classes: int) -> int:
    """Of one evaluation for one image, in convolutions and matrix products.   shape: (C, H, W) of the images."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = make_meta_model(config, shape[0], num_classes)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape), torch.zeros(1))
    return counter.get_total_flops() // 2
