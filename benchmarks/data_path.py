"""How fast a folder of images is read, and how fast the default network trains on it.

    python benchmarks/data_path.py --data_dir photos

Prints the seconds to scan and decode the whole folder, the images/s of decoding while reading, by number of threads,
and the images/s of training the default network.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from tiny_diffusion.config.training import resolve
from tiny_diffusion.data.batches import Batches
from tiny_diffusion.data.files.cache import Cache
from tiny_diffusion.models.build import make_model, to_device
from tiny_diffusion.runs.images import open_images
from tiny_diffusion.training.run_length import RunLength
from tiny_diffusion.training.step_time import estimate_step_seconds
from tiny_diffusion.training.trainer import Trainer


def seconds(work) -> float:
    """The seconds that one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    options = {"dataset": "folder", "data_dir": asked.data_dir, "image_size": asked.image_size}
    config = resolve(options)
    with tempfile.TemporaryDirectory() as folder:
        first = seconds(lambda: open_images(config, cache=Cache(Path(folder))))
        again = seconds(lambda: open_images(config, cache=Cache(Path(folder))))
    data = open_images(config)
    print(f"{len(data):,} images: opened and decoded in {first:.1f} s, opened again in {again:.2f} s")
    memory = Batches(data, config.batch_size, 0)
    spent = seconds(lambda: [memory.at(step) for step in range(asked.steps)])
    print(f"batches from memory: {asked.steps * config.batch_size / spent:,.0f} images/s")
    for workers in sorted({0, 1, 2, os.cpu_count()}):
        lazy = Batches(open_images(resolve({**options, "cache_mb": 0, "workers": workers})), config.batch_size, 0)
        spent = seconds(lambda lazy=lazy: [lazy.at(step) for step in range(asked.steps)])
        print(f"decoded as they are read, {workers} threads: {asked.steps * config.batch_size / spent:,.0f} images/s")
    for name, batches in (("from memory", memory), ("decoded as they are read", lazy)):
        model = to_device(make_model(config, data.channels, 0), torch.device("cpu"))
        trainer = Trainer(model, config, batches, RunLength(steps=asked.steps), lambda: 0.0)
        estimate_step_seconds(trainer)
        spent = seconds(lambda trainer=trainer: list(trainer.run()))
        print(f"the network trains, {name}: {asked.steps * config.batch_size / spent:,.0f} images/s")


if __name__ == "__main__":
    main()
