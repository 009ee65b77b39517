"""How fast a configuration trains and draws here, with images made up: their values do not change the work."""

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
from tiny_diffusion.diffusion.sampling import Request, sample
from tiny_diffusion.models.build import make_diffusion, make_model, to_device
from tiny_diffusion.randomness import seed_torch
from tiny_diffusion.training.run_length import RunLength
from tiny_diffusion.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent  # where `python -m tiny_diffusion` is found
MAX_IMAGES = 60_000  # made up


def make_trainer(config: Config, device: torch.device) -> Trainer:
    """A trainer of the configuration on as many made-up images as its set has, without an end."""
    dataset = DATASETS[config.dataset]
    count = min(dataset.images(config.splits) or MAX_IMAGES, MAX_IMAGES)
    random = np.random.default_rng(config.seed)
    images = random.integers(0, 256, (count, dataset.channels, *config.size), dtype=np.uint8)
    labels = random.integers(0, max(1, len(dataset.classes)), count)
    data = ImageSet(torch.from_numpy(images), torch.from_numpy(labels), tuple(dataset.classes))
    seed_torch(config.seed, "weights")
    model = to_device(make_model(config, dataset.channels, len(dataset.classes)), device)
    batches = Batches(data, config.batch_size, config.seed, device=device, hflip=config.hflip)
    return Trainer(model, config, batches, RunLength(steps=10**9), time.monotonic, len(dataset.classes))


def training_speed(trainer: Trainer, seconds: float) -> dict[str, float]:
    """Steps as a run makes them.  gflops: of convolutions and matrix products, effective, 10^9 a second."""
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
    """10^9 operations of a forward pass of one image."""
    clean, label = (whole[:1] for whole in trainer.batches.at(0))
    time_input = torch.zeros(1, device=trainer.device)
    return forward_gflop(trainer.model, clean, time_input, label if trainer.config.class_cond else None)


def sampling_speed(trainer: Trainer, request: Request, seconds: float) -> dict[str, float]:
    """Drawing with the averaged weights, as `sample` does."""
    diffusion, shape = make_diffusion(trainer.config), trainer.batches.data.images.shape[1:]
    classes = tuple(range(trainer.num_classes)) if trainer.config.class_cond else ()
    request = replace(request, classes=classes)
    draw = lambda: sample(trainer.ema.model, diffusion, request, tuple(shape))  # noqa: E731
    taken = float(np.median(seconds_of(draw, trainer.device, seconds, least=2)))
    evaluations = request.evaluations()
    return {
        "images": len(request.indices),
        "sampler": request.sampler,
        "evaluations": evaluations,
        "seconds": taken,
        "images_per_second": len(request.indices) / taken,
        "gflops": network_gflop(trainer) * evaluations * len(request.indices) / taken,
    }


def data_speed(trainer: Trainer, seconds: float) -> dict[str, float]:
    """Batches alone, gathered and scaled, without a network."""
    steps = iter(range(10**9))
    taken = seconds_of(lambda: trainer.batches.at(next(steps)), trainer.device, seconds)
    return {"images_per_second": trainer.config.batch_size / float(np.median(taken))}


def start_up() -> dict[str, float]:
    """Seconds, each the best of three fresh processes: --help; importing torch; from the command to the first training
    step on digits."""
    return {
        "help_seconds": _best_of_three(["-m", "tiny_diffusion", "--help"]),
        "import_torch_seconds": _best_of_three(["-c", "import torch"]),
        "first_step_seconds": min(_first_step() for _ in range(3)),
    }


def _best_of_three(words: list[str]) -> float:
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return min(taken)


def _first_step() -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        words = ["train", "--dataset", "digits", "--max_steps", "1", "--output_dir", folder, "--num_samples", "1"]
        process = subprocess.Popen(
            [sys.executable, "-m", "tiny_diffusion", *words],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        log = Path(folder) / "log.jsonl"
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.005)
        taken = time.perf_counter() - started
        return taken if process.wait() == 0 else math.nan


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that this process has held, 10^6 bytes: of the GPU where it computes on one.  NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ModuleNotFoundError:  # Windows tells otherwise
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
