"""Attention on the CPU: our own products against torch's scaled_dot_product_attention, in whole training steps.

For each network, both make a step (forward and backward) in turns, and each is first as often as second.  Prints the
milliseconds per step and how many times as fast ours is: the median and the quartiles over pairs.  On one thread it
measures CPU time, which other programs disturb less; on several threads, elapsed time.

    python benchmarks/attention.py --pairs 20
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from tiny_diffusion.config.training import resolve
from tiny_diffusion.models import attention
from tiny_diffusion.models.build import make_model, to_device
from tiny_diffusion.runtime.cpu import tune_cpu

ALWAYS, NEVER = 10**9, 0  # values of attention.MAX_NARROW: heads of any width by our own products, or of none
# As diffusers' tutorials build UNet2DModel, whose heads have 8 channels by default.
TUTORIAL = {"patch_size": 1, "channel_mult": (1, 2, 2), "layers_per_block": 2, "attention_levels": (1, 2)}
NETWORKS = {  # options of train, and the batch size
    "mnist, the defaults": ({"dataset": "mnist"}, 32),
    "digits, the defaults": ({"dataset": "digits"}, 64),
    "`--preset fashion`": ({"preset": "fashion"}, 8),
    "`--preset cifar10`": ({"preset": "cifar10"}, 8),
    "`--preset flowers`, and folder's": ({"preset": "flowers"}, 4),
    "diffusers, 28x28, 32, 64, 64 channels": ({"dataset": "mnist", **TUTORIAL, "attention_heads": 8}, 16),
    "the same with heads of 16": ({"dataset": "mnist", **TUTORIAL, "attention_heads": 4}, 16),
    "the same with heads of 32": ({"dataset": "mnist", **TUTORIAL, "attention_heads": 2}, 16),
    "diffusers, 32x32, 64, 128, 128 channels": (
        {"dataset": "cifar10", **TUTORIAL, "base_channels": 64, "attention_heads": 16}, 4,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="steps of each of the two")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    asked = parser.parse_args()
    tune_cpu()  # memory that stays with the process, as training has it
    print("| network | batch | head width | threads | torch, ms | ours, ms | times as fast (quartiles) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (options, batch_size) in NETWORKS.items():
        for threads in asked.threads if asked.only in name else ():
            print(f"| {name} | {batch_size} | {compare(options, batch_size, threads, asked.pairs)} |", flush=True)


def compare(options: dict[str, object], batch_size: int, threads: int, pairs: int) -> str:
    """The rest of a row of the table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = resolve(options)
    channels = 3 if config.dataset in ("cifar10", "flowers102") else 1
    network = to_device(make_model(config, channels, 0), torch.device("cpu"))
    with torch.no_grad():  # a new network's attention adds zero
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(batch_size, channels, *config.size).to(memory_format=torch.channels_last)
    t = torch.linspace(0, 999, batch_size)
    clock = time.process_time if threads == 1 else time.perf_counter
    times = {NEVER: [], ALWAYS: []}
    for pair in range(-2, pairs):  # the first two warm up
        for narrow in (NEVER, ALWAYS) if pair % 2 else (ALWAYS, NEVER):
            attention.MAX_NARROW = narrow
            started = clock()
            network.zero_grad(set_to_none=True)
            network(x, t).square().mean().backward()
            if pair >= 0:
                times[narrow].append(1000 * (clock() - started))
    ratios = [theirs / ours for theirs, ours in zip(times[NEVER], times[ALWAYS], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    theirs, ours = (statistics.median(times[narrow]) for narrow in (NEVER, ALWAYS))
    width = config.base_channels * config.channel_mult[-1] // config.attention_heads
    return f"{width} | {threads} | {theirs:.0f} | {ours:.0f} | {middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
