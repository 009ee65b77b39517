"""visualize: how noise covers images, and the schedules side by side."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tiny_diffusion.cli.arguments import parse
from tiny_diffusion.config.image_size import default_shift, height_and_width
from tiny_diffusion.config.option import Choice, Int, Text, again, option
from tiny_diffusion.config.rules import refuse_falling_betas, refuse_ignored, refuse_no_folder
from tiny_diffusion.config.training import Config
from tiny_diffusion.data.catalog import DATASETS
from tiny_diffusion.diffusion.schedules import SCHEDULES, make_schedule
from tiny_diffusion.errors import OptionError
from tiny_diffusion.files import check_writable

DESCRIPTION = """
Show how noise covers images, or the noise schedules side by side.

  PROGRAM --dataset digits --num_images 6 --save_path outputs/forward_diffusion.png
  PROGRAM --what schedules
"""
TIMES = (0, 50, 100, 200, 400, 600, 800, 999)  # at T = 1000
MAX_PIXELS = 32_000_000  # of all images in a figure, which takes about 120 bytes of memory per pixel
CURVES_IGNORE = ("dataset", "data_dir", "image_size", "background", "num_images", "schedule", "seed", "device")


@dataclass(frozen=True)
class FigureOptions:
    """What `visualize` shows."""

    what: str = option(
        Choice(("forward", "schedules")),
        "forward",
        "forward: noise covering images; schedules: all, side by side",
    )
    dataset: str = again(Config, "dataset", help="where the images are from")
    data_dir: str | None = again(Config, "data_dir")
    image_size: int | tuple[int, int] | None = again(Config, "image_size")
    background: str | None = again(Config, "background")
    num_images: int = option(Int(1, 100), 8, "images, a row each")
    schedule: str = again(Config, "schedule", type=Choice(SCHEDULES))
    timesteps: int = again(Config, "timesteps")
    beta_start: float | None = again(Config, "beta_start")
    beta_end: float | None = again(Config, "beta_end")
    logsnr_shift: float | None = again(Config, "logsnr_shift")
    save_path: str | None = option(
        Text(), None, "the picture to write [outputs/forward_diffusion.png or outputs/schedules.png]"
    )
    seed: int = again(Config, "seed", help="which images and which noise")
    device: str = again(Config, "device")


OPTIONS = (FigureOptions,)


def run(argv: list[str], program: str, started: float) -> int:
    """Saves one figure.  Returns the exit code."""
    given = parse(argv, program, DESCRIPTION, *OPTIONS)
    options = FigureOptions(**given)
    if options.save_path is not None and Path(options.save_path).suffix.lower() != ".png":
        raise OptionError(f"--save_path {options.save_path}: figures are PNG files. End the name in .png.")
    path = Path(options.save_path or f"outputs/{'forward_diffusion' if options.what == 'forward' else 'schedules'}.png")
    if options.what == "schedules":
        if ignored := [name for name in CURVES_IGNORE if name in given]:
            raise OptionError(
                f"--{ignored[0]} would be ignored by --what schedules, which shows no image. Leave it out."
            )
        _schedules(options, path)
    else:
        refuse_ignored(given, vars(options), FigureOptions)
        refuse_no_folder(options.data_dir, options.dataset)
        _forward(options, path)
    print(f"figure: {path}", file=sys.stderr)
    return 0


def _schedule(options: FigureOptions, name: str, shift: float):
    """The schedule of this name with the options' betas, if it has betas."""
    ends = SCHEDULES[name].ends
    if ends is None:
        return make_schedule(name, options.timesteps, logsnr_shift=shift)
    given = (options.beta_start, options.beta_end)
    start, end = (own if beta is None else beta for own, beta in zip(ends, given, strict=True))
    refuse_falling_betas(start, end)
    return make_schedule(name, options.timesteps, start, end, shift)


def _forward(options: FigureOptions, path: Path) -> None:
    import numpy as np
    import torch

    from tiny_diffusion.data.files.cache import Cache, cache_folder
    from tiny_diffusion.data.pixels import to_float, to_pictures
    from tiny_diffusion.data.sources import open_dataset
    from tiny_diffusion.diffusion.process import Diffusion
    from tiny_diffusion.randomness import stream
    from tiny_diffusion.runs.messages import show_progress
    from tiny_diffusion.runtime.world import choose_device
    from tiny_diffusion.visuals.figures import save_forward_figure

    device = choose_device(options.device)
    height, width = size = height_and_width(options.image_size or DATASETS[options.dataset].size)
    shift = default_shift(size) if options.logsnr_shift is None else options.logsnr_shift
    diffusion = Diffusion(_schedule(options, options.schedule, shift))
    if (max_images := MAX_PIXELS // (len(TIMES) * height * width)) < options.num_images:
        raise OptionError(
            f"--num_images {options.num_images} of {height}x{width} pixels, {len(TIMES)} times each, are too large a "
            f"picture. Use at most {max_images}, or a smaller --image_size."
        )
    check_writable("save_path", path)
    data = open_dataset(
        options.dataset, data_dir=options.data_dir, size=size, background=options.background or "white",
        cache_bytes=0, cache=Cache(cache_folder(path.parent)), progress=show_progress,
    )  # fmt: skip
    random = stream(options.seed, "figure")
    clean = to_float(data.take(random.permutation(len(data))[: options.num_images])).to(device)
    noise = torch.from_numpy(random.standard_normal(tuple(clean.shape), dtype=np.float32)).to(device)
    last = options.timesteps - 1
    times = sorted({round(t * last / TIMES[-1]) for t in TIMES})
    noisy = [to_pictures(diffusion.add_noise(clean, noise, np.full(len(clean), float(t)))) for t in times]
    levels = [diffusion.schedule.level(t) for t in times]
    title = f"{options.dataset}: the forward process, {options.schedule} schedule, T = {options.timesteps}"
    save_forward_figure(
        path, noisy, times, title=title,
        captions=[f"α {level.alpha:.2f}  σ {level.sigma:.2f}" for level in levels],
    )  # fmt: skip


def _schedules(options: FigureOptions, path: Path) -> None:
    import numpy as np

    from tiny_diffusion.visuals.figures import save_schedules_figure

    curves = {}
    for name in SCHEDULES:
        schedule = _schedule(options, name, options.logsnr_shift or 0.0)
        time = np.arange(schedule.timesteps) / (schedule.timesteps - 1)
        curves[name] = {"time": time, "alpha": schedule.alpha, "sigma": schedule.sigma}
    check_writable("save_path", path)
    save_schedules_figure(path, curves, title=f"Noise schedules, T = {options.timesteps}")
