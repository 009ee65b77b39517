"""Training steps on two cores: both on each operation, and each on a half of the batch, in turns.

Prints images/s of whole steps, and how many times as fast halves are: the median and the quartiles over rounds.

    python benchmarks/halves.py --rounds 20
    python benchmarks/halves.py --beside 1      # beside a busy program
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from tiny_diffusion.config.training import resolve
from tiny_diffusion.data.batches import Batches
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.image_set import ImageSet
from tiny_diffusion.models.build import make_model, to_device
from tiny_diffusion.runtime.cpu import tune_cpu
from tiny_diffusion.training.halves import CORES
from tiny_diffusion.training.run_length import RunLength
from tiny_diffusion.training.trainer import Trainer

RUNS = {
    "digits": {"dataset": "digits"},
    "mnist": {"dataset": "mnist"},
    "mnist, batches of 32": {"dataset": "mnist", "batch_size": 32},
    "cifar10": {"dataset": "cifar10"},
    "flowers102": {"dataset": "flowers102"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind")
    parser.add_argument("--beside", type=int, default=0, help="busy programs that run meanwhile")
    asked = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(asked.beside)]
    try:
        measure(asked.rounds)
    finally:
        for program in busy:
            program.kill()


def measure(rounds: int) -> None:
    """Prints the table."""
    tune_cpu()
    torch.set_num_threads(CORES)
    print("| defaults of | images/s, both cores on each operation | each core on a half | times as fast (quartiles) |")
    print("| --- | --- | --- | --- |")
    for name, options in RUNS.items():
        seconds = compare(options, rounds)
        ratios = [whole / halved for whole, halved in zip(*seconds.values(), strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        batch = resolve(options).batch_size
        whole, halved = (batch / statistics.median(of_kind) for of_kind in seconds.values())
        print(f"| {name} | {whole:.0f} | {halved:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


def compare(options: dict[str, object], rounds: int) -> dict[bool, list[float]]:
    """Seconds of each step, by whether it was halved."""
    config = resolve({**options, "precision": "fp32"})
    channels = DATASETS[config.dataset].channels
    pixels = np.random.default_rng(0).integers(0, 256, (512, channels, *config.size), dtype=np.uint8)
    images = ImageSet(torch.from_numpy(pixels), torch.arange(512) % 10, tuple("0123456789"))
    model = to_device(make_model(config, channels, 10), torch.device("cpu"))
    batches = Batches(images, config.batch_size, config.seed)
    trainer = Trainer(model, config, batches, RunLength(steps=10**6), lambda: 0.0, num_classes=10)
    steps, seconds = trainer.run(), {False: [], True: []}
    for number in range(-2, rounds):  # the first ones warm up
        for way in list(seconds)[:: 1 if number % 2 else -1]:
            trainer.halves.gain = lambda shape, way=way: way
            started = time.perf_counter()
            next(steps)
            if number >= 0:
                seconds[way].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
