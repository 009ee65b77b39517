"""How fast this machine trains and samples with a configuration.  The images are random, which changes no speed."""

import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tiny_diffusion.benchmarking.rates import forward_gflop, seconds_of
from tiny_diffusion.config.training import Config
from tiny_diffusion.data.batches import Batches
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.diffusion.request import Request
from tiny_diffusion.diffusion.sampling import sample
from tiny_diffusion.models.build import make_diffusion, make_model, to_device
from tiny_diffusion.randomness import seed_torch
from tiny_diffusion.runtime.world import SINGLE_PROCESS
from tiny_diffusion.training.precision import decide_precision
from tiny_diffusion.training.run_length import RunLength
from tiny_diffusion.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent  # where `python -m tiny_diffusion` is found
MAX_IMAGES = 60_000  # of the random images that take the place of a data set
STARTS = 3  # of each fresh process, of which the fastest counts


def make_trainer(config: Config, device: torch.device) -> Trainer:
    """A trainer that never ends, on as many random images as the data set has, but at most MAX_IMAGES."""
    dataset = DATASETS[config.dataset]
    count = min(dataset.images(config.splits) or MAX_IMAGES, MAX_IMAGES)
    random = np.random.default_rng(config.seed)
    images = random.integers(0, 256, (count, dataset.channels, *config.size), dtype=np.uint8)
    labels = random.integers(0, max(1, len(dataset.classes)), count)
    data = ImageSet(torch.from_numpy(images), torch.from_numpy(labels), tuple(dataset.classes))
    seed_torch(config.seed, "weights")
    model = to_device(make_model(config, dataset.channels, len(dataset.classes)), device)
    config, _ = decide_precision(config, model, dataset.channels, SINGLE_PROCESS)
    batches = Batches(data, config.batch_size, config.seed, device=device, hflip=config.hflip)
    return Trainer(model, config, batches, RunLength(steps=10**9), time.monotonic, len(dataset.classes))


def training_speed(trainer: Trainer, seconds: float) -> dict[str, float]:
    """The speed of training steps as a run makes them, measured for about `seconds`.

    gflops: 10^9 operations per second, counting convolutions and matrix products, forward and backward.
    """
    run, config = trainer.run(), trainer.config
    steps = seconds_of(lambda: next(run), trainer.device, seconds)
    gflop = network_gflop(trainer)
    images_per_second = config.batch_size / float(np.median(steps))
    return {
        "batch_size": config.batch_size,
        "images_per_second": images_per_second,
        "step_seconds": float(np.median(steps)),
        "steps": len(steps),
        "gflop_per_image_forward": gflop,
        "gflops": 3 * gflop * images_per_second,
        "peak_memory_mb": peak_memory_mb(trainer.device),
    }


def network_gflop(trainer: Trainer) -> float:
    """10^9 floating-point operations of a forward pass of one image."""
    clean, label = (whole[:1] for whole in trainer.batches.at(0))
    time_input = torch.zeros(1, device=trainer.device)
    return forward_gflop(trainer.model, clean, time_input, label if trainer.config.class_cond else None)


def sampling_speed(trainer: Trainer, request: Request, seconds: float) -> dict[str, float]:
    """The speed of sampling with the averaged weights, as `sample` does, measured for about `seconds`."""
    diffusion, shape = make_diffusion(trainer.config), trainer.batches.data.images.shape[1:]
    classes = tuple(range(trainer.num_classes)) if trainer.config.class_cond else ()
    request = replace(request, classes=classes)
    calls = seconds_of(lambda: sample(trainer.ema.model, diffusion, request, tuple(shape)), trainer.device, seconds, 2)
    taken, evaluations = float(np.median(calls)), request.evaluations()
    return {
        "images": len(request.indices),
        "sampler": request.sampler,
        "evaluations": evaluations,
        "seconds": taken,
        "images_per_second": len(request.indices) / taken,
        "gflops": network_gflop(trainer) * evaluations * len(request.indices) / taken,
    }


def data_speed(trainer: Trainer, seconds: float) -> dict[str, float]:
    """The speed of gathering and scaling batches, without a network, measured for about `seconds`."""
    steps = iter(range(10**9))
    taken = seconds_of(lambda: trainer.batches.at(next(steps)), trainer.device, seconds)
    return {"images_per_second": trainer.config.batch_size / float(np.median(taken))}


def start_up_times() -> dict[str, float]:
    """Seconds in a fresh process, the best of STARTS: --help, `import torch`, and from `train` to its first step."""
    return {
        "help_seconds": _fastest(["-m", "tiny_diffusion", "--help"]),
        "import_torch_seconds": _fastest(["-c", "import torch"]),
        "first_step_seconds": min(_first_step() for _ in range(STARTS)),
    }


def _fastest(arguments: list[str]) -> float:
    """Seconds that Python takes with these arguments."""
    taken = []
    for _ in range(STARTS):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return min(taken)


def _first_step() -> float:
    """Seconds until the log of a new run holds its first line; NaN if the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train = ["train", "--dataset", "digits", "--max_steps", "1", "--output_dir", folder, "--num_samples", "1"]
        process = subprocess.Popen(
            [sys.executable, "-m", "tiny_diffusion", *train],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        log = Path(folder) / "log.jsonl"
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.005)
        taken = time.perf_counter() - started
        return taken if process.wait() == 0 else math.nan


def peak_memory_mb(device: torch.device) -> float:
    """The largest memory that this process has held, in 10^6 bytes: of the GPU if it uses one.  NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
