"""benchmark: how fast this machine trains and samples, and where the time of a training step goes."""

import dataclasses
import math
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.config.option import Int, Number, Text, again, option, specs
from tiny_diffusion.config.training import Config, resolve
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.errors import OptionError
from tiny_diffusion.files import check_writable, write_json

DESCRIPTION = """
Measure speed: training, sampling, the data path, start-up, and where the time of a training step goes.  The images are
random, with the size and number of those of --dataset, so nothing is downloaded.  Each part runs for --seconds; all of
them take about a minute.

  python -m tiny_diffusion benchmark
  python -m tiny_diffusion benchmark --dataset cifar10 --base_channels 64 --batch_size 128 --json speed.json
"""

OF_TRAIN = (
    "preset", "dataset", "image_size", "prediction", "schedule", "batch_size", "accumulate", "optimizer", "hflip",
    "precision", "compile", "device", "seed",
)  # fmt: skip
# The options of train that change its speed: those above, and the network's.
SpeedOptions = dataclasses.make_dataclass(
    "SpeedOptions",
    [
        (field.name, field.type, again(Config, field.name, group=field.metadata["spec"].group))
        for field in dataclasses.fields(Config)
        if field.name in OF_TRAIN or field.metadata["spec"].group == "network"
    ],
    frozen=True,
)


@dataclass(frozen=True)
class BenchmarkOptions:
    """How `benchmark` measures; the options of train say what it measures."""

    seconds: float = option(Number(0.1, 3600), 8.0, "how long each part is measured", group="run")
    num_images: int = option(Int(1, 65_536), 64, "images sampled together", group="run")
    json: str | None = option(Text(), None, "also write every number to this file", group="run")


OPTIONS = (SpeedOptions, BenchmarkOptions)


def run(argv: list[str], program: str, started: float) -> int:
    """Prints the measurements.  Returns the exit code."""
    given = parse(argv, program, DESCRIPTION, *OPTIONS)
    options = BenchmarkOptions(**{name: given.pop(name) for name in specs(BenchmarkOptions) if name in given})
    if given.get("dataset") == "folder":
        raise OptionError(
            "--dataset folder: benchmark uses random images, so name a set whose size is known, such as flowers102 "
            "with --image_size; benchmarks/data_path.py measures how fast a folder is read."
        )
    config = resolve({**given, "epochs": 1})
    if options.json is not None:
        check_writable("json", Path(options.json))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports a missing GPU as an error
    found = _measure_all(config, options)
    print("\n".join(_report(found)))
    if options.json is not None:
        write_json(options.json, found)
        print(f"numbers: {options.json}", file=sys.stderr)
    return 0


def _measure_all(config: Config, options: BenchmarkOptions) -> dict:
    """All measurements, as plain JSON values."""
    import torch

    from tiny_diffusion.benchmarking import speed
    from tiny_diffusion.benchmarking.profile import profile_step
    from tiny_diffusion.benchmarking.rates import matrix_rate
    from tiny_diffusion.diffusion.request import default_sampling, request_from
    from tiny_diffusion.runs.images import check_device
    from tiny_diffusion.runtime.world import choose_device

    device, seconds = choose_device(config.device), options.seconds
    check_device(config, device)
    trainer = speed.make_trainer(config, device)
    config = trainer.config  # whose precision is decided
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    defaults = default_sampling(DATASETS[config.dataset].sampler, config.timesteps)
    request = request_from(defaults, config.timesteps, range(options.num_images), seed=config.seed)
    training = speed.training_speed(trainer, seconds)
    return {
        "machine": _machine(device),
        "config": config.to_dict(),
        "training": training,
        "matrix_product_gflops": matrix_rate(device, dtype, seconds / 4),
        "sampling": speed.sampling_speed(trainer, request, seconds),
        "data": speed.data_speed(trainer, seconds / 4),
        "step": dataclasses.asdict(profile_step(trainer, math.ceil(seconds / (4 * training["step_seconds"])))),
        "start_up": speed.start_up_times(),
    }


def _machine(device) -> dict[str, object]:
    import torch

    from tiny_diffusion.runtime.machine import processor_of

    return {
        "processor": processor_of(device),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _report(found: dict) -> list[str]:
    """The numbers as lines of text."""
    machine, config, training, sampling = (found[part] for part in ("machine", "config", "training", "sampling"))
    step, data, start = found["step"], found["data"], found["start_up"]
    share = training["gflops"] / found["matrix_product_gflops"]
    return [
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {config['precision']}: "
        f"{found['matrix_product_gflops']:,.0f} GFLOP/s in a product of large matrices",
        "",
        f"training   {training['images_per_second']:,.0f} images/s of {config['dataset']}, batches of "
        f"{training['batch_size']}, {training['gflop_per_image_forward']:.3f} GFLOP a forward pass: "
        f"{training['gflops']:,.0f} GFLOP/s, {share:.0%} of the matrix product's",
        f"memory     {training['peak_memory_mb']:,.0f} MB at the peak, the images included",
        f"sampling   {sampling['images']} images in {sampling['seconds']:.2f} s by {sampling['sampler']}, "
        f"{sampling['evaluations']} evaluations each: {sampling['images_per_second']:,.1f} images/s, "
        f"{sampling['gflops']:,.0f} GFLOP/s",
        f"data       {data['images_per_second']:,.0f} images/s, "
        f"{data['images_per_second'] / training['images_per_second']:,.0f} times what training takes",
        f"start-up   --help {start['help_seconds']:.2f} s, first training step on digits "
        f"{start['first_step_seconds']:.2f} s, of which import torch {start['import_torch_seconds']:.2f} s",
        "",
        f"a step of {step['seconds'] * 1e3:.0f} ms ({step['profiled_seconds'] * 1e3:.0f} ms under the profiler, whose "
        f"overhead is subtracted): {1 - step['products']:.0%} is not convolution, attention or matrix products",
        *(f"  {row:<20}{part:6.1%}" for row, part in step["shares"].items()),
        "",
        "convolutions by shape: share of the step, GFLOP/s forward and backward",
        *(
            f"  {layer['count']:2} x {layer['shape']:<40}{layer['share']:6.1%}{layer['forward_gflops']:7,.0f}"
            f"{layer['backward_gflops']:7,.0f}"
            for layer in step["layers"]
        ),
    ]
