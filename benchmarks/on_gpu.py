"""Everything that has to be measured on a GPU, in pieces of at most nine minutes, each of which writes its own JSON.

    python benchmarks/on_gpu.py --output outputs/on_gpu                     all pieces, then the table
    python benchmarks/on_gpu.py --output outputs/on_gpu --piece speed       one piece, and the table of all so far
    python benchmarks/on_gpu.py --output outputs/on_gpu --device cpu --reduced      everything in short, without a GPU

A piece that fails keeps its error message in its JSON, and the next one begins.  Data sets are read from --data_dir;
put them there before, where the machine has no network.  To add a piece: a function that returns rows, and a line in
PIECES.
"""

import argparse
import json
import shutil
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import time_to_quality
import torch

from tiny_diffusion.benchmarking.rates import matrix_rate
from tiny_diffusion.benchmarking.speed import make_trainer, training_speed
from tiny_diffusion.config.training import resolve
from tiny_diffusion.models.build import make_model, to_device
from tiny_diffusion.runs.checkpoint import load_checkpoint
from tiny_diffusion.runtime.machine import versions_on
from tiny_diffusion.training.precision import GRADIENT_TOLERANCE, OUTPUT_TOLERANCE, Probe, errors_of

TF32_TOLERANCE = 0.01  # of fp32 on a GPU, whose convolutions round their inputs to ten bits
SPEED_SETS = ("mnist", "cifar10")
MINUTES = (0.5, 1, 2)  # of MNIST, until one reaches GOAL
GOAL = 0.02  # relative FD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piece", choices=PIECES, help="only this one [all, one after another]")
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files and pictures")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --reduced")
    parser.add_argument("--reduced", action="store_true", help="everything in short, on the digits")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no such GPU. Try --device cpu --reduced.")
    asked.output.mkdir(parents=True, exist_ok=True)
    for name in [asked.piece] if asked.piece else PIECES:
        write(name, asked)
    print(table(asked.output))


def write(name: str, asked: argparse.Namespace) -> None:
    """Runs one piece and writes its JSON."""
    started, found = time.monotonic(), {"piece": name, "reduced": asked.reduced}
    try:
        found["rows"] = PIECES[name](asked)
    except Exception as error:  # the other pieces are worth having without this one
        traceback.print_exc()
        found |= {"rows": [], "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    found |= {"seconds": round(time.monotonic() - started, 1), "machine": versions_on(torch.device(asked.device))}
    (asked.output / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def table(folder: Path) -> str:
    """The rows of all pieces that have written a JSON, as Markdown."""
    lines = []
    for name in PIECES:
        if not (folder / f"{name}.json").exists():
            continue
        found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        machine = f"{found['machine']['machine']}, torch {found['machine']['torch']}"
        lines += [f"\n{name}: {machine}, {found['seconds']:.0f} s{', reduced' if found['reduced'] else ''}\n"]
        lines += [f"failed: {found['failed']}\n"] if "failed" in found else []
        headings = list(dict.fromkeys(heading for row in found["rows"] for heading in row))
        lines += [time_to_quality.headings(headings)] if headings else []
        lines += [time_to_quality.line(headings, row) for row in found["rows"]]
    return "\n".join(lines)


def precisions(asked: argparse.Namespace) -> list[str]:
    """Those that the device computes in; a CPU without instructions for bf16 emulates it."""
    return ["fp32", "bf16", *(["fp16"] if asked.device == "cuda" else [])]


# What has to be equal


def agreement(asked: argparse.Namespace) -> list[dict]:
    """Output and gradients of the default network on the device, against fp32 on the CPU."""
    config = resolve({"dataset": "digits" if asked.reduced else "cifar10"})
    channels = 1 if asked.reduced else 3
    torch.manual_seed(0)
    model = make_model(config, channels, 10)
    shape = (4 if asked.reduced else 32, channels, *config.size)
    wanted = Probe(to_device(model, torch.device("cpu")), shape).run("fp32", shape[0])
    layouts = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    cases = [(precision, "channels_last", False) for precision in precisions(asked)] + [("fp32", "contiguous", False)]
    if asked.device == "cuda":
        cases += [(precision, "channels_last", True) for precision in precisions(asked)]
    rows = []
    for precision, layout, compiled in cases:
        probe = Probe(model.to(asked.device).to(memory_format=layouts[layout]), shape)
        if compiled:
            probe.network = torch.compile(probe.network)
        got = [tensor.cpu() for tensor in probe.run(precision, shape[0])]
        errors = errors_of(wanted, got)
        limits = (TF32_TOLERANCE,) * 2 if precision == "fp32" else (OUTPUT_TOLERANCE, GRADIENT_TOLERANCE)
        rows.append({
            "precision": precision, "layout": layout, "compiled": "yes" if compiled else "no",
            "error of the output": errors[0], "of the worst gradient": max(errors[1:]),
            "agrees": "yes" if errors[0] <= limits[0] and max(errors[1:]) <= limits[1] else "no",
        })  # fmt: skip
    return rows


def runs(asked: argparse.Namespace) -> list[dict]:
    """Whether runs repeat and resume bit for bit with --deterministic, and whether one process can talk by NCCL."""
    steps = (2, 4) if asked.reduced else (40, 100)
    short = ["--dataset", "digits", "--device", asked.device, "--deterministic", "--num_samples", 1]
    short += ["--base_channels", 8] if asked.reduced else []
    folders = [asked.output / name for name in ("one", "two", "resumed")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for folder, count in zip(folders, (steps[1], steps[1], steps[0]), strict=True):
        train([*short, "--max_steps", count, "--output_dir", folder])
    train(["--resume", "--deterministic", "--max_steps", steps[1], "--output_dir", folders[2]])
    one, two, resumed = (load_checkpoint(folder / "model_final.pt").tensors for folder in folders)
    return [
        {"what": f"{steps[1]} steps twice, --deterministic", "equal": same(one, two)},
        {"what": f"{steps[0]} steps, then --resume to {steps[1]}", "equal": same(one, resumed)},
        {"what": f"{'NCCL' if asked.device == 'cuda' else 'Gloo'}, one process", "equal": communicates(asked)},
    ]


def train(words: list) -> None:
    """One run.  Raises RuntimeError with its error message."""
    done = time_to_quality.run([time_to_quality.ROOT / "train.py", *words], time_to_quality.child_environment(None))
    if done.error is not None:
        raise RuntimeError(done.error)


def same(one: dict, other: dict) -> str:
    unequal = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    return f"no: {len(unequal)} of {len(one)} tensors differ" if unequal else "yes"


def communicates(asked: argparse.Namespace) -> str:
    import torch.distributed as dist

    dist.init_process_group("nccl" if asked.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    values = torch.arange(5.0, device=asked.device)
    dist.all_reduce(values)
    dist.destroy_process_group()
    return "yes" if values.tolist() == [0, 1, 2, 3, 4] else "no"


# How fast


def speed(asked: argparse.Namespace) -> list[dict]:
    """Training images/s in each precision, and its share of the bf16 rate of a product of large matrices."""
    device, seconds = torch.device(asked.device), 0.1 if asked.reduced else 8.0
    peak = matrix_rate(device, torch.bfloat16, seconds, side=64 if asked.reduced else None)
    rows = []
    for dataset in ("digits",) if asked.reduced else SPEED_SETS:
        for compiled in (False, True) if asked.device == "cuda" else (False,):
            for precision in precisions(asked):
                options = {"dataset": dataset, "batch_size": 16 if asked.reduced else 512, "epochs": 1}
                options |= {"base_channels": 8} if asked.reduced else {}
                trainer = make_trainer(resolve({**options, "precision": precision, "compile": compiled}), device)
                found = training_speed(trainer, seconds)
                rows.append({
                    "images": dataset, "precision": precision, "compiled": "yes" if compiled else "no",
                    "images/s": round(found["images_per_second"], 1), "GFLOP/s": round(found["gflops"], 1),
                    "share of the bf16 matrix rate": found["gflops"] / peak, "MB": round(found["peak_memory_mb"]),
                })  # fmt: skip
    return rows


# How good, how soon


def mnist(asked: argparse.Namespace) -> list[dict]:
    """Runs of growing budgets, until one reaches the goal; wall seconds are those of the whole command."""
    rows = []
    for minutes in (1,) if asked.reduced else MINUTES:
        rows.append(scored(asked, "mnist", minutes, 4000))
        if rows[-1].get("relative FD", 1.0) <= GOAL:
            break
    return rows


def cifar10(asked: argparse.Namespace, minutes: float) -> list[dict]:
    """One run with its samples, which are copied to cifar10_N.png."""
    row = scored(asked, "cifar10", minutes, 1000, " --hflip")
    picture = asked.output / f"cifar10_{minutes}.png"
    shutil.copyfile(asked.output / f"cifar10-{row['minutes']:g}" / "latest.png", picture)
    return [row | {"samples": picture.name}]


def scored(asked: argparse.Namespace, dataset: str, minutes: float, num_images: int, recipe: str = "") -> dict:
    """One run of so many minutes, and its scores.  Raises RuntimeError if a command failed."""
    folder = asked.output / f"{dataset}-{minutes:g}"
    reduced = " --base_channels 8 --num_samples 4 --max_steps 3" if asked.reduced else ""
    how = argparse.Namespace(
        dataset="digits" if asked.reduced else dataset, data_dir=asked.data_dir, features=None,
        num_images=100 if asked.reduced else num_images,
    )  # fmt: skip
    recipe = f"{recipe} --device {asked.device}{reduced}"
    row = time_to_quality.train_and_score(how, recipe, minutes, folder, time_to_quality.child_environment(None))
    if "failed" in row:
        raise RuntimeError(row["failed"])
    row.pop("floor", None)
    return row


PIECES = {
    "agreement": agreement,
    "runs": runs,
    "speed": speed,
    "mnist": mnist,
    "cifar10_2": lambda asked: cifar10(asked, 2),
    "cifar10_5": lambda asked: cifar10(asked, 5),
}

if __name__ == "__main__":
    main()
