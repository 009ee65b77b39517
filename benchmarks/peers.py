"""Compares this program with others, each by its own recipe for small images, on equal data, threads and minutes.

python benchmarks/peers.py --dataset mnist --data_dir data --minutes 10
pip install diffusers denoising-diffusion-pytorch smalldiffusion

They run one after the other, each in a fresh process on the CPU.  The minutes count from the start of the process to
the end of its training, imports included; for ours, samples and saves are included too.  Ours is `train.py` with its
defaults, also for the batch size (--ours gives it other options); the functions below state the recipes of the others
and their sources.  None flips images, and all take their batches from memory.  Then each samples --num_images, or as
many as fit into --sampling_minutes (column n), and `evaluate` scores them.  Few images score worse than many, so the
table also shows the score of n real images.  Prints a Markdown table; writes images.npz, grid.png and the scores of
each into a folder under --output_dir, and grids.png there with the first images of each side by side.
"""

import argparse
import copy
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from time_to_quality import (
    ROOT,
    budgets,
    child_environment,
    count,
    headings,
    line,
    run,
    score,
    training_speed,
)
from torch import Tensor, nn

from tiny_diffusion.data.batches import Batches
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.data.pixels import to_uint8
from tiny_diffusion.data.sources import open_dataset
from tiny_diffusion.errors import DivergenceError, FileError, OptionError
from tiny_diffusion.visuals.images import grid, save_png

STEPS = 20  # evaluations of the network per image, for the samplers that leave the choice
MAX_BATCH = 64
IMAGES, RESULT = "images.npz", "result.json"  # the files of a worker
HEADINGS = (
    "who", "parameters", "batch", "steps", "images/s", "n", "relative FD", "of n real images", "confidence", "entropy",
    "precision", "recall", "seconds to sample 64",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A trained model.

    images_per_second: of the training steps alone.  sample_images: (first, count) -> (count, C, H, W) in [-1, 1], where
    first is the number of images sampled before.
    """

    parameters: int
    batch_size: int
    steps: int
    images_per_second: float
    sample_images: Callable[[int, int], Tensor]


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", choices=[name for name in DATASETS if name != "folder"])
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--minutes", type=minutes, default=10.0, help="of training, for each [10]")
    parser.add_argument("--sampling_minutes", type=minutes, default=5.0, help="maximum of sampling, for each [5]")
    parser.add_argument("--peers", type=known, default=list(PEERS), help=f"some of {','.join(PEERS)} [all]")
    parser.add_argument("--ours", default="", help="options of train.py for ours [none: the defaults]")
    parser.add_argument("--batch_size", type=count, default=32, help="of the others [32]")
    parser.add_argument("--ddim_steps", type=count, default=STEPS, help=f"of denoising-diffusion-pytorch [{STEPS}]")
    parser.add_argument("--num_images", type=count, default=1000, help="maximum of images sampled by each [1000]")
    parser.add_argument("--features", help="of evaluate [the default for the data set]")
    parser.add_argument("--threads", type=count, help="OMP_NUM_THREADS of every process [all cores]")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/peers"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the peer that this process trains and samples
    asked = parser.parse_args()
    if asked.worker:
        return work(asked, started)
    environment = child_environment(asked.threads)
    sampled = []
    print(headings(HEADINGS), flush=True)
    for name in asked.peers:
        folder, row = asked.output_dir / name, {"who": name}
        done = run([Path(__file__).resolve(), *sys.argv[1:], "--worker", name], environment)
        if done.error is None:
            sampled.append(np.load(folder / IMAGES)["arr_0"])
            row |= json.loads((folder / RESULT).read_text("utf-8"))
            source = ["--images", folder / IMAGES, "--dataset", asked.dataset, "--data_dir", asked.data_dir]
            row |= score(source, row["n"], folder / "evaluation", asked.features, environment)
            row["of n real images"] = row.pop("floor", {}).get("relative FD", "")
        else:
            row["failed"] = done.error
        print(line(HEADINGS, row), flush=True)
    if sampled:
        save_png(asked.output_dir / "grids.png", side_by_side(sampled))


def side_by_side(sets: list[np.ndarray], each: int = 16) -> np.ndarray:
    """A grid of the first images of each set (N, H, W, C) uint8, from left to right: (H', W', 3)."""
    grids = [grid(images[:each], columns=4, scale=2) for images in sets]
    height, gap = max(len(one) for one in grids), 6
    padded = [np.pad(one, ((0, height - len(one)), (0, gap), (0, 0)), constant_values=255) for one in grids]
    return np.concatenate(padded, axis=1)[:, :-gap]


def work(asked: argparse.Namespace, started: float) -> None:
    """Trains one peer, samples from it and writes the images and the result."""
    peer = PEERS[asked.worker]
    folder = asked.output_dir / asked.worker
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    try:
        trained = peer.train(asked, started)
        images, seconds = sample_within(trained.sample_images, asked.num_images, 60 * asked.sampling_minutes)
    except ModuleNotFoundError as error:
        sys.exit(f"not installed ({error.name} is missing): pip install {peer.package}")
    except (OptionError, FileError, DivergenceError) as error:
        sys.exit(str(error))
    pictures = images.numpy().transpose(0, 2, 3, 1)
    np.savez_compressed(folder / IMAGES, pictures)
    save_png(folder / "grid.png", grid(pictures[:64]))
    about = {
        "parameters": trained.parameters,
        "batch": trained.batch_size,
        "steps": trained.steps,
        "images/s": round(trained.images_per_second, 1),
        "n": len(pictures),
        "seconds to sample 64": round(64 * seconds / len(pictures), 1),
    }
    (folder / RESULT).write_text(json.dumps(about), encoding="utf-8")


def sample_within(sample_images: Callable[[int, int], Tensor], max_count: int, limit: float) -> tuple[Tensor, float]:
    """As many images as fit into `limit` seconds, at least 2, (N, C, H, W) uint8, and the seconds that they took."""
    begun = time.monotonic()
    sample_images(0, 2)  # warms up, and estimates the seconds per image
    each, parts, sampled, spent = (time.monotonic() - begun) / 2, [], 0, 0.0
    while sampled < max_count:
        fitting = int((limit - (time.monotonic() - begun)) / each)
        together = min(MAX_BATCH, max_count - sampled, fitting if sampled else max(2, fitting))
        if together < 1:
            break
        at = time.monotonic()
        parts.append(to_uint8(sample_images(sampled, together)))
        sampled, spent = sampled + together, spent + time.monotonic() - at
        each = spent / sampled
    return torch.cat(parts), spent


class Budget:
    """Counts the training steps until the minutes are over.  started: time.monotonic() of the process's start."""

    def __init__(self, started: float, minutes: float, batch_size: int):
        self.started, self.seconds, self.batch_size = started, 60 * minutes, batch_size
        self.steps, self.first_step = 0, 0.0

    def progress(self) -> float:
        """The share of the minutes that has passed."""
        return (time.monotonic() - self.started) / self.seconds

    def take_step(self) -> bool:
        """Called before each step: whether there is time for it.  If so, it is counted."""
        self.first_step = self.first_step or time.monotonic()
        if self.progress() >= 1 and self.steps > 0:
            return False
        self.steps += 1
        return True

    def trained(self, model: nn.Module, sample_images: Callable[[int, int], Tensor]) -> Trained:
        spent = time.monotonic() - self.first_step
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return Trained(parameters, self.batch_size, self.steps, self.batch_size * self.steps / spent, sample_images)


class Square:
    """Pads images with black to a square whose side is a multiple of a number, for networks that need it."""

    def __init__(self, height: int, width: int, multiple: int):
        self.height, self.width = height, width
        self.side = math.ceil(max(height, width) / multiple) * multiple
        self.top, self.left = (self.side - height) // 2, (self.side - width) // 2

    def around(self, images: Tensor) -> Tensor:
        right, bottom = self.side - self.width - self.left, self.side - self.height - self.top
        return F.pad(images, (self.left, right, self.top, bottom), value=-1.0)

    def inside(self, images: Tensor) -> Tensor:
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]


def ours(asked: argparse.Namespace, started: float) -> Trained:
    """train.py with the options of --ours, and the sampler of its checkpoint."""
    from tiny_diffusion.diffusion.sampling import sample
    from tiny_diffusion.models.build import make_diffusion, to_device
    from tiny_diffusion.runs.checkpoint import load_checkpoint, load_model
    from tiny_diffusion.runs.folder import RunFolder

    folder = RunFolder(asked.output_dir / asked.worker / "run")
    done = run(
        [ROOT / "train.py", *shlex.split(asked.ours), "--dataset", asked.dataset, "--data_dir", asked.data_dir,
         "--minutes", f"{asked.minutes:g}", "--device", "cpu", "--output_dir", folder.path, "--overwrite"],
        child_environment(asked.threads),
    )  # fmt: skip
    if done.error is not None:
        raise FileError(done.error)
    checkpoint = load_checkpoint(folder.final)
    config = checkpoint.config
    model, diffusion = to_device(load_model(checkpoint), torch.device("cpu")), make_diffusion(config)

    def sample_images(first: int, count: int) -> Tensor:
        request = checkpoint.request(range(first, first + count), batch_size=count)
        return sample(model, diffusion, request, checkpoint.shape)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Trained(parameters, config.batch_size, *training_speed(folder.log_path), sample_images)


def diffusers(asked: argparse.Namespace, started: float) -> Trained:
    """The network of the Hugging Face diffusion course for MNIST (unit 1) and its learning rate for 32x32 pixels (4e-4,
    not the 1e-4 of the script), in the loop of examples/unconditional_image_generation: linear betas, epsilon, AdamW,
    500 steps of warm-up, then cosine decay, clipping at 1, EMA.  Sampled with DPM-Solver++ 2M."""
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    batches, square, channels = open_images(asked, multiple=4)
    model = UNet2DModel(
        sample_size=square.side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    schedule = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    budget = Budget(started, asked.minutes, asked.batch_size)
    model.train()
    while budget.take_step():
        clean = square.around(batches.at(budget.steps - 1)[0])
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),))
        loss = F.mse_loss(model(schedule.add_noise(clean, noise, t), t).sample, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # Their schedule ends with the last step; here it ends with the minutes.
        rate = min(1.0, budget.steps / 500) * 0.5 * (1 + math.cos(math.pi * min(1.0, budget.progress())))
        optimizer.param_groups[0]["lr"] = 4e-4 * rate
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()

    @torch.no_grad()
    def sample_images(first: int, count: int) -> Tensor:
        solver = DPMSolverMultistepScheduler.from_config(schedule.config)
        solver.set_timesteps(STEPS)
        x = torch.randn(count, channels, square.side, square.side)
        for t in solver.timesteps:
            x = solver.step(model(x, t).sample, t, x).prev_sample
        return square.inside(x)

    return budget.trained(model, sample_images)


def denoising_diffusion_pytorch(asked: argparse.Namespace, started: float) -> Trained:
    """The README's Unet(dim=64, dim_mults=(1, 2, 4, 8)) and rate 8e-5, in the loop of its Trainer: v on its sigmoid
    schedule, Adam, clipping at 1, EMA of 0.995 every tenth step.  One batch a step, where the README accumulates two;
    --ddim_steps of DDIM, where it takes 250."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    batches, square, channels = open_images(asked, multiple=8)
    network = Unet(dim=64, dim_mults=(1, 2, 4, 8), channels=channels)
    model = GaussianDiffusion(network, image_size=square.side, timesteps=1000, sampling_timesteps=asked.ddim_steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-5, betas=(0.9, 0.99))
    ema = EMA(model, beta=0.995, update_every=10)
    budget = Budget(started, asked.minutes, asked.batch_size)
    model.train()
    while budget.take_step():
        clean = square.around(batches.at(budget.steps - 1)[0])
        loss = model((clean + 1) / 2)  # it takes and returns images in [0, 1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    ema.ema_model.eval()
    return budget.trained(network, lambda first, count: square.inside(ema.ema_model.sample(count) * 2 - 1))


def smalldiffusion(asked: argparse.Namespace, started: float) -> Trained:
    """Its examples/fashion_mnist_unet.py: Unet, log-linear sigmas, epsilon, AdamW 7e-4, EMA of 0.999 with the warm-up
    of torch_ema, its sampler with gam 1.6.  --batch_size instead of its 1024, of which few fit into minutes."""
    from accelerate import Accelerator
    from smalldiffusion import Scaled, ScheduleLogLinear, Unet, samples, training_loop

    batches, square, channels = open_images(asked, multiple=4)
    model = Scaled(Unet)(
        square.side, channels, channels, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(square.side // 2,)
    )
    averaged = copy.deepcopy(model)
    schedule, accelerator = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800), Accelerator(cpu=True)
    budget = Budget(started, asked.minutes, asked.batch_size)
    steps = itertools.takewhile(lambda step: budget.take_step(), itertools.count())
    loader = (square.around(batches.at(step)[0]) for step in steps)
    for _ in training_loop(loader, model, schedule, accelerator, epochs=1, lr=7e-4):
        # The loop yields before the step of the optimiser, as in the example.
        decay = min(0.999, (1 + budget.steps) / (10 + budget.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)

    def sample_images(first: int, count: int) -> Tensor:
        states = samples(averaged, schedule.sample_sigmas(STEPS), gam=1.6, batchsize=count, accelerator=accelerator)
        return square.inside(list(states)[-1])

    return budget.trained(model, sample_images)


def open_images(asked: argparse.Namespace, multiple: int) -> tuple[Batches, Square, int]:
    """The training images of train.py as batches, the square that they are padded to, and their channels."""
    data = open_dataset(asked.dataset, data_dir=asked.data_dir)
    return Batches(data, asked.batch_size, 0), Square(*data.images.shape[-2:], multiple), data.channels


def minutes(text: str) -> float:
    """An option's minutes."""
    if len(values := budgets(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is several budgets; all peers get the same one. Give one number.")
    return values[0]


def known(text: str) -> list[str]:
    """An option's peers, by their names in PEERS."""
    names = text.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PEERS)}")
    return names


@dataclass(frozen=True)
class Peer:
    """train: (options, time.monotonic() of the process's start) -> Trained.  package: the arguments of pip install."""

    train: Callable[[argparse.Namespace, float], Trained]
    package: str


PEERS = {
    "ours": Peer(ours, "-r requirements.txt"),
    "diffusers": Peer(diffusers, "diffusers"),
    "denoising-diffusion-pytorch": Peer(denoising_diffusion_pytorch, "denoising-diffusion-pytorch"),
    "smalldiffusion": Peer(smalldiffusion, "smalldiffusion"),
}

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
