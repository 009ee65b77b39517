"""bf16 on the CPU: passes forward and backward in float32, in plain autocast and in ours, in turns.

Plain autocast leaves attention and group norm to torch's kernels for bfloat16.  Prints how many times as fast as
float32 each is: the median and the quartiles over rounds.  On one thread it measures CPU time, which other programs
disturb less; on several threads, elapsed time.  A gain needs a processor with AVX512_BF16 or AMX.

    python benchmarks/precision.py --rounds 20
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiny_diffusion.config.training import resolve
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.models import layers
from tiny_diffusion.models.build import make_model, to_device
from tiny_diffusion.models.norm import GroupNorm
from tiny_diffusion.runtime.cpu import tune_cpu
from tiny_diffusion.runtime.machine import has_bf16
from tiny_diffusion.training.precision import Probe

CPU = torch.device("cpu")
NETWORKS = {  # options of train, and the batch size
    "mnist, the defaults": ({"dataset": "mnist"}, 64),
    "cifar10, the defaults": ({"dataset": "cifar10"}, 64),
    "`--preset cifar10`": ({"preset": "cifar10"}, 16),
    "`--preset flowers`": ({"preset": "flowers"}, 8),
}
OURS = {layers: layers.attend, GroupNorm: GroupNorm.forward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="passes of each of the three")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch_size", type=int, help="images at once, for all networks")
    parser.add_argument("--only", default="", help="only networks whose name contains this")
    asked = parser.parse_args()
    tune_cpu()  # memory that stays with the process, as training has it
    print(f"instructions for bf16: {'yes' if has_bf16(CPU) else 'no, so bf16 is emulated'}\n")
    print("| network | batch | threads | float32, ms | plain autocast, times as fast | ours, times as fast |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (options, usual) in NETWORKS.items():
        batch_size = asked.batch_size or usual
        for threads in asked.threads if asked.only in name else ():
            print(f"| {name} | {batch_size} | {compare(options, batch_size, threads, asked.rounds)} |", flush=True)


def compare(options: dict[str, object], batch_size: int, threads: int, rounds: int) -> str:
    """The rest of a row of the table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = resolve(options)
    channels = DATASETS[config.dataset].channels
    probe = Probe(to_device(make_model(config, channels, 10), CPU), (batch_size, channels, *config.size))
    clock = time.process_time if threads == 1 else time.perf_counter
    ways = [("fp32", True), ("bf16", False), ("bf16", True)]
    times = {way: [] for way in ways}
    for number in range(-1, rounds):  # the first warms up
        for precision, ours in ways[:: 1 if number % 2 else -1]:
            use(ours)
            started = clock()
            probe.run(precision, batch_size)
            if number >= 0:
                times[precision, ours].append(clock() - started)
    use(True)
    cells = []
    for way in ways[1:]:
        ratios = [single / half for single, half in zip(times[ways[0]], times[way], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    return " | ".join([str(threads), f"{1000 * statistics.median(times[ways[0]]):.0f}", *cells])


def use(ours: bool) -> None:
    """Has the network compute attention and group norm as we do, or as torch does."""
    layers.attend = OURS[layers] if ours else attend_by_torch
    GroupNorm.forward = OURS[GroupNorm] if ours else nn.GroupNorm.forward


def attend_by_torch(q: Tensor, k: Tensor, v: Tensor, head_width: int) -> Tensor:
    """Attention by torch's kernel, in the precision that autocast chooses.  Shapes as in models/attention.py."""
    heads = (x.flatten(2).unflatten(1, (-1, head_width)).mT for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads).mT.flatten(1, 2).unflatten(2, q.shape[2:])


if __name__ == "__main__":
    main()
