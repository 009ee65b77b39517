"""What `evaluate` shows and writes: the progress of sampling, a table, evaluation.json and the figures."""

import sys
from pathlib import Path

from tiny_diffusion.files import keep_earlier, write_json


def sample_showing_progress(model, request):
    """The images of one request, with a progress bar on a terminal."""
    from tqdm import tqdm

    doing, quiet = f"{request.sampler}, {request.steps} steps{request.describe_guidance()}", not sys.stderr.isatty()
    count = len(request.indices)
    with tqdm(total=count, desc=doing, unit="image", leave=False, disable=quiet, dynamic_ncols=True) as bar:
        return model.sample(request, bar.update)


def likelihood(model, heldout, seed: int) -> dict[str, float]:
    """Prints the bits per dimension of held-out images, and returns them by their full name."""
    from tiny_diffusion.evaluation.likelihood import MAX_IMAGES, heldout_bits
    from tiny_diffusion.runs.messages import show_progress

    images = heldout.subset(MAX_IMAGES).images
    bits, error = heldout_bits(
        model.model, model.diffusion, images, model.world.device, seed=seed, progress=show_progress
    )
    null = ", null class" if model.config.class_cond else ""
    about = f"of {len(images)} held-out images, uniformly dequantised{null}"
    print(f"  bits per dimension {about}: {bits:.3f} ± {error:.3f}")
    return {f"bits_per_dim[n={len(images)}, held-out, uniform dequantisation{null}]": bits}


def write(folder: Path, model, reference, features: str, whole: dict, last) -> None:
    """Prints a sweep's table and the warnings; writes `whole` as JSON, and the figures.  last: of nearest.png."""
    from tiny_diffusion.evaluation.error_by_noise import error_curves, log_snrs_of
    from tiny_diffusion.evaluation.report import relative_distance, sweep_curves, sweep_lines
    from tiny_diffusion.visuals.figures import save_noise_level_losses, save_sweep
    from tiny_diffusion.visuals.images import neighbour_grid, save_png

    results = whole["results"]
    if len(results) > 1:
        print("", *sweep_lines(results), sep="\n")
    for warning in dict.fromkeys(warning for result in results for warning in result["warnings"]):
        print(f"warning: {warning}.", file=sys.stderr)
    earlier = keep_earlier(folder / "evaluation.json")
    write_json(folder / "evaluation.json", whole)
    print(f"\nnumbers    {folder / 'evaluation.json'}" + (f" (earlier ones: {earlier.name})" if earlier else ""))
    nearest, training = last.nearest, reference.real.images.images
    closest = nearest.distances.argsort()[:16]
    pairs = last.images.images[nearest.indices[closest]], training[nearest.nearest[closest]]
    pairs = [images.permute(0, 2, 3, 1).numpy() for images in pairs]
    save_png(folder / "nearest.png", neighbour_grid(*pairs, nearest.distances[closest].tolist()))
    print(f"neighbours {folder / 'nearest.png'}")
    if model and model.knows_no_class:
        curves = error_curves(model.model, model.diffusion, reference.real, model.world.device, results[0]["seed"])
        if model.config.class_cond:
            curves = {f"{name} (null class)": curve for name, curve in curves.items()}
        save_noise_level_losses(folder / "error_by_noise.png", log_snrs_of(model.diffusion.schedule), curves)
        print(f"by noise   {folder / 'error_by_noise.png'}")
    if len(results) > 1:
        floor, title = relative_distance(results[0]["floor"]), f"relative Fréchet distance, {features}"
        save_sweep(folder / "sweep.png", sweep_curves(results), floor, title)
        print(f"sweep      {folder / 'sweep.png'}")
