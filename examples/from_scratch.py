"""A diffusion model of 8x8 digits from scratch: a loop to train it, and a loop to sample from it.

    python examples/from_scratch.py                     # a minute or two on a CPU; writes digits.png
    python examples/from_scratch.py --steps 500 --output quick.png

train.py does the same with averaged weights, labels, checkpoints and faster samplers.
"""

import argparse

import numpy as np
import torch

from tiny_diffusion.data.pixels import to_float, to_pictures
from tiny_diffusion.data.sources import open_dataset
from tiny_diffusion.diffusion.grids import make_levels
from tiny_diffusion.diffusion.process import Diffusion
from tiny_diffusion.diffusion.samplers import ddim
from tiny_diffusion.diffusion.schedules import make_schedule
from tiny_diffusion.models.unet import UNet
from tiny_diffusion.visuals.images import grid, save_png

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=1500, help="training steps")
parser.add_argument("--output", default="digits.png", help="the PNG to write")
options = parser.parse_args()
torch.manual_seed(0)
rng = np.random.default_rng(0)

# The data: 1,498 handwritten digits, which come with scikit-learn.  x_0 is in [-1, 1].
images = to_float(open_dataset("digits").images[:])  # (N, 1, 8, 8)

# The process: x_t = alpha_t * x_0 + sigma_t * noise, from the image at t = 0 to noise at t = 999.  The network learns
# to predict the noise from x_t and t.
diffusion = Diffusion(make_schedule("cosine", timesteps=1000), prediction="epsilon")
model = UNet(channels=1, base_channels=16)

# Training: take images, noise them at random times, predict the noise, and reduce the squared error.
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=options.steps)
for step in range(1, options.steps + 1):
    clean = images[torch.randint(len(images), (64,))]
    noise = torch.randn_like(clean)
    t = diffusion.timesteps(rng.uniform(size=len(clean)))
    loss = diffusion.loss(model, clean, noise, t)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 100 == 0 or step == options.steps:
        print(f"step {step} of {options.steps}, loss {loss.item():.3f}")

# Sampling: start from pure noise; at each level estimate the image and step to the next level, which has less noise.
model.eval()
levels = make_levels(diffusion.schedule, "trailing", 50)
for number, sample in enumerate(ddim(diffusion.denoiser(model), torch.randn(64, 1, 8, 8), levels), start=1):
    if number % 10 == 0:  # sample.x is the noisy image, sample.clean the estimate of x_0
        print(f"sampling step {number} of 50, the noise is down to sigma = {sample.level.sigma:.2f}")
save_png(options.output, grid(to_pictures(sample.x)))
print(f"64 digits are in {options.output}")
