"""benchmark: how fast this machine trains and draws, and where the time of a training step goes."""

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
Measure speed: training, drawing, the data path, start-up, and where the time of a training step goes.  Images are made
up, of the size and number of --dataset's, so nothing is downloaded.  A minute or so; each part runs for --seconds.

  python -m tiny_diffusion benchmark
  python -m tiny_diffusion benchmark --dataset cifar10 --base_channels 64 --batch_size 128 --json speed.json
"""

TAKEN = ("preset", "dataset", "image_size", "prediction", "schedule", "batch_size", "accumulate", "optimizer", "hflip",
         "precision", "compile", "device", "seed")  # fmt: skip
# The options of train that change how fast it is.
SpeedOptions = dataclasses.make_dataclass(
    "SpeedOptions",
    [
        (field.name, field.type, again(Config, field.name, group=field.metadata["spec"].group))
        for field in dataclasses.fields(Config)
        if field.name in TAKEN or field.metadata["spec"].group == "network"
    ],
    frozen=True,
)


@dataclass(frozen=True)
class BenchmarkOptions:
    """How `benchmark` measures; what it measures are options of train."""

    seconds: float = option(Number(0.1, 3600), 8.0, "how long each part is measured", group="run")
    num_images: int = option(Int(1, 65_536), 64, "images drawn together", group="run")
    json: str | None = option(Text(), None, "also write every number to this file", group="run")


def run(argv: list[str], program: str, started: float) -> int:
    given = parse(argv, program, DESCRIPTION, SpeedOptions, BenchmarkOptions)
    options = BenchmarkOptions(**{name: given.pop(name) for name in specs(BenchmarkOptions) if name in given})
    if given.get("dataset") == "folder":
        raise OptionError(
            "--dataset folder: the images here are made up, so name a set of known size, such as flowers102 with "
            "--image_size; benchmarks/data_path.py measures how fast a folder is read."
        )
    config = resolve({**given, "epochs": 1})
    if options.json is not None:
        check_writable("json", Path(options.json))

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of a missing GPU as an error
    import torch

    from tiny_diffusion.benchmarking.measure import data_speed, make_trainer, sampling_speed, start_up, training_speed
    from tiny_diffusion.benchmarking.profile import profile_step
    from tiny_diffusion.benchmarking.rates import matrix_rate
    from tiny_diffusion.diffusion.sampling import default_sampling, request_from
    from tiny_diffusion.runs.images import check_device
    from tiny_diffusion.runtime.world import choose_device

    device = choose_device(config.device)
    check_device(config, device)
    yardstick = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    found = {
        "machine": {
            "processor": _processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "config": config.to_dict(),
    }
    trainer = make_trainer(config, device)
    found["training"] = training_speed(trainer, options.seconds)
    found["matrix_product_gflops"] = matrix_rate(device, yardstick, options.seconds / 4)
    sampler = DATASETS[config.dataset].sampler
    defaults = default_sampling(sampler, config.timesteps)
    request = request_from(defaults, config.timesteps, range(options.num_images), seed=config.seed)
    found["sampling"] = sampling_speed(trainer, request, options.seconds)
    found["data"] = data_speed(trainer, options.seconds / 4)
    profiled = profile_step(trainer, steps=math.ceil(options.seconds / (4 * found["training"]["step_seconds"])))
    found["step"] = dataclasses.asdict(profiled)
    found["start_up"] = start_up()
    print("\n".join(_report(found)))
    if options.json is not None:
        write_json(options.json, found)
        print(f"numbers: {options.json}", file=sys.stderr)
    return 0


def _report(found: dict) -> list[str]:
    machine, config, training, drawing = (found[part] for part in ("machine", "config", "training", "sampling"))
    step, data, start = found["step"], found["data"], found["start_up"]
    share = training["gflops"] / found["matrix_product_gflops"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {config['precision']}: "
        f"{found['matrix_product_gflops']:,.0f} GFLOP/s in a product of large matrices",
        "",
        f"training   {training['images_per_second']:,.0f} images/s of {config['dataset']}, batches of "
        f"{training['batch_size']}, {training['gflop_per_image_forward']:.3f} GFLOP a forward pass: "
        f"{training['gflops']:,.0f} GFLOP/s, {share:.0%} of the matrix product's",
        f"memory     {training['peak_memory_mb']:,.0f} MB at most, the images included",
        f"drawing    {drawing['images']} images in {drawing['seconds']:.2f} s by {drawing['sampler']}, "
        f"{drawing['evaluations']} evaluations each: {drawing['images_per_second']:,.1f} images/s, "
        f"{drawing['gflops']:,.0f} GFLOP/s",
        f"data       {data['images_per_second']:,.0f} images/s, "
        f"{data['images_per_second'] / training['images_per_second']:,.0f} times what training takes",
        f"start-up   --help {start['help_seconds']:.2f} s, first training step on digits "
        f"{start['first_step_seconds']:.2f} s, of which import torch {start['import_torch_seconds']:.2f} s",
        "",
        f"a step of {step['seconds'] * 1e3:.0f} ms ({step['watched'] * 1e3:.0f} ms under the profiler, which is "
        f"taken off): {1 - step['products']:.0%} is not convolution, attention or matrix products",
        *(f"  {row:<20}{part:6.1%}" for row, part in step["shares"].items()),
        "",
        "convolutions of one shape, together: share of the step, GFLOP/s forward and backward",
        *(
            f"  {layer['count']:2} x {layer['shape']:<40}{layer['share']:6.1%}{layer['forward_gflops']:7,.0f}"
            f"{layer['backward_gflops']:7,.0f}"
            for layer in step["layers"]
        ),
    ]
    return lines


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
