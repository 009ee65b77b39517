"""A folder in diffusers' format: the UNet2DModel, the scheduler, and a pipeline that loads them.

A network without patches and classes is a DDPMPipeline.  For any other, pipeline.txt is written beside it as
pipeline.py, which diffusers loads as the folder's own pipeline.  runs/foreign.py reads the folder back.
"""

import importlib.util
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from tiny_diffusion.config.scheduler import scheduler_config
from tiny_diffusion.config.unet2d import unet2d_config
from tiny_diffusion.errors import FileError
from tiny_diffusion.export.model import ExportedModel, refuse_difference, require
from tiny_diffusion.files import atomic_folder, write_json, write_text
from tiny_diffusion.runs.foreign import INDEX, OURS, PIPELINES, WEIGHTS

TEMPLATE = Path(__file__).with_name("pipeline.txt")
PLAIN, OWN = PIPELINES[0], PIPELINES[-1]
TOLERANCE = 1e-4  # of outputs after reloading


def export_diffusers(model: ExportedModel, path: Path) -> tuple[str, float]:
    """Writes the folder, whole or not at all: (class of its pipeline, largest difference of outputs after reloading).

    Raises OptionError for what diffusers cannot express, FileError if diffusers is missing or loads something else.
    """
    config, embeddings = model.config, model.num_classes + 1 if model.num_classes else 0
    network = unet2d_config(config, model.about["channels"], embeddings)
    scheduler = scheduler_config(config)
    diffusers = require("diffusers", "diffusers", "diffusers")
    from safetensors.torch import save

    version = {"_diffusers_version": diffusers.__version__}
    own = config.patch_size > 1 or embeddings
    index = {"_class_name": ["pipeline", OWN] if own else PLAIN, **version}
    index |= {"scheduler": ["diffusers", scheduler["_class_name"]], "unet": ["diffusers", "UNet2DModel"]}
    with atomic_folder(path) as folder:
        for name in ("unet", "scheduler"):
            (folder / name).mkdir()
        write_json(folder / INDEX, index | ({"patch_size": config.patch_size} if own else {}))
        write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler, **version})
        write_json(folder / "unet" / "config.json", {"_class_name": "UNet2DModel", **version, **network})
        (folder / "unet" / f"{WEIGHTS}.safetensors").write_bytes(save(model.state(), metadata={"format": "pt"}))
        write_text(folder / OURS, json.dumps(model.about))
        if own:
            write_text(folder / "pipeline.py", TEMPLATE.read_text("utf-8"))
        return index["_class_name"][-1] if own else PLAIN, _check(model, folder, diffusers)


def _check(model: ExportedModel, folder: Path, diffusers) -> float:
    """Loads the folder by diffusers.  The largest difference of outputs; raises FileError if anything is not equal."""
    loaded = diffusers.UNet2DModel.from_pretrained(folder / "unet", local_files_only=True, low_cpu_mem_usage=False)
    state, theirs = model.state(), loaded.eval().state_dict()
    different = [name for name in {*state, *theirs} if not _equal(state.get(name), theirs.get(name))]
    if different:
        raise FileError(f"diffusers loads another {min(different)} than was written; nothing is kept.")
    patch, outputs = model.config.patch_size, {}
    with torch.no_grad():
        x, time, label = model.inputs(4)
        output = loaded(F.pixel_unshuffle(x, patch), time, class_labels=label).sample
        outputs["the network"] = model.network(x, time, label), F.pixel_shuffle(output, patch)
    kind = getattr(diffusers, scheduler_config(model.config)["_class_name"])
    scheduler = kind.from_pretrained(folder / "scheduler", local_files_only=True)
    if hasattr(scheduler, "alphas_cumprod"):
        alpha_squared = torch.from_numpy(model.config.make_schedule().alpha ** 2)
        outputs["alphas_cumprod"] = alpha_squared, scheduler.alphas_cumprod.double()
    _pipeline(folder, diffusers)(loaded, scheduler)
    return refuse_difference("what diffusers loads", outputs, TOLERANCE)


def _pipeline(folder: Path, diffusers):
    """The class of the folder's pipeline, without the copy that diffusers makes of a pipeline.py in its cache."""
    if not (folder / "pipeline.py").exists():
        return getattr(diffusers, PLAIN)
    spec = importlib.util.spec_from_file_location("tiny_diffusion_pipeline", folder / "pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, OWN)


def _equal(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    return ours is not None and theirs is not None and torch.equal(ours, theirs)
